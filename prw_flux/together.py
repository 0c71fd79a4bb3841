"""Drawing and encoding all samples of a stage once, whatever the number of ranks.

Samples are encoded in chunks, one rank per chunk, and the ranks exchange what they made: each ends
with what one process would have, bit for bit and in the same order. The same pictures go through
the encoders together, and the same texts: a rank is told what those before it will encode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, final

from torch import Tensor

from prw_flux.draws import Draws, Pictures, Tally
from prw_flux.encoded import Encoded, Grid
from prw_flux.ranks import Ranks
from prw_flux.sample_encoder import SampleEncoder, alike
from prw_flux.tasks import Triple

CHUNK: Final = 32
"""Samples that are encoded together, where they have one size."""


@final
@dataclass(frozen=True, kw_only=True)
class Told:
    """What all ranks are told of a chunk that one of them has drawn.

    Attributes:
        texts: of its samples, those of one size together.
        tally, pictures: of drawing it.
    """

    texts: list[list[str]]
    tally: Tally
    pictures: Pictures


@final
class Together:
    """All samples of a stage, a chunk per rank at a time.

    Args:
        draws: what makes the samples; counts and judges those of all ranks.
        encoder: of the samples; its texts are then known on every rank.
        ranks: that share the work.
        reading: opened around drawing and the wait for the ranks that draw.
    """

    def __init__(
        self,
        draws: Draws,
        encoder: SampleEncoder,
        ranks: Ranks,
        reading: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.draws, self.encoder, self.ranks, self.reading = draws, encoder, ranks, reading

    def buckets(self, count: int, tick: Callable[[int], None]) -> tuple[Encoded, ...]:
        """The first `count` samples by their grids, in the order in which the grids come first.

        Args:
            count: N.
            tick: told before each round of chunks, and at the end, how many samples are done, on
                every rank alike.

        Raises:
            SampleError: no usable sample on one of the ranks, or too many unusable pictures on all.
            RankLost: a rank is gone.
        """
        buckets: dict[Any, list[Encoded]] = {}
        step = CHUNK * self.ranks.count
        for start in range(0, count, step):
            tick(start)
            for part in self._round(range(start, min(start + step, count))):
                buckets.setdefault(part.grids, []).append(part)
        tick(count)
        self.draws.judge(last=True)
        return tuple(Encoded.merged(buckets.pop(grids)) for grids in list(buckets))

    def _round(self, indices: range) -> Iterator[Encoded]:
        """The chunks of all ranks, in order."""
        mine = indices[CHUNK * self.ranks.index : CHUNK * (self.ranks.index + 1)]
        drawn: list[list[Triple]] = []
        with self.reading():
            told = self.ranks.each(lambda: self._draw(mine, drawn))
        for chunk in told:
            self.draws.count(chunk.tally, chunk.pictures)
        new = self._new_texts([chunk.texts for chunk in told])
        made: list[Tensor] = []
        grids = self.ranks.each(lambda: self._encode(drawn, new[self.ranks.index], made))
        everything = self.ranks.exchanged(made)
        for chunk, theirs, fresh, sizes in zip(told, everything, new, grids, strict=True):
            tensors = iter(theirs)
            for texts, added, both in zip(chunk.texts, fresh, sizes, strict=True):
                pictures = [next(tensors) for _ in range(self._pictures)]
                if added:
                    self.encoder.texts.add(added, next(tensors), next(tensors))
                yield Encoded.of(pictures, both, self.encoder.texts.rows(texts))

    @property
    def _pictures(self) -> int:
        """Tensors that samples of one size have, beside those of their texts."""
        return 2 if self.encoder.feature_encoder is None else 3

    def _draw(self, indices: range, drawn: list[list[Triple]]) -> Told:
        """Draw samples into a list, those of one size together."""
        apart = self.draws.apart()
        drawn += alike(apart.triple(index) for index in indices)
        texts = [[triple.text for triple in group] for group in drawn]
        return Told(texts=texts, tally=apart.tally, pictures=apart.pictures)

    def _new_texts(self, chunks: list[list[list[str]]]) -> list[list[list[str]]]:
        """Which texts are encoded with each group of each chunk: those that no earlier one has."""
        seen: set[str] = set()
        found: list[list[list[str]]] = []
        for chunk in chunks:
            found.append([])
            for texts in chunk:
                new = [text for text in self.encoder.texts.new(texts) if text not in seen]
                seen.update(new)
                found[-1].append(new)
        return found

    def _encode(
        self, drawn: list[list[Triple]], new: list[list[str]], made: list[Tensor]
    ) -> list[tuple[Grid, Grid]]:
        """Encode samples and the new texts among theirs into a list; the grids of each group."""
        grids = []
        for group, texts in zip(drawn, new, strict=True):
            pictures, both = self.encoder.pictures(group)
            made += pictures
            if texts:
                made += self.encoder.texts.encoded(texts)
            grids.append(both)
        return grids
