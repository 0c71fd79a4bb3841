"""From the samples of a stage to encoded training batches.

Sample i is a pure function of (seed, stage, i) (`prw_flux.draws`), and the batch of a step one of
(seed, stage, step) (`prw_flux.batch_order`): a resumed run sees what an uninterrupted one would
have seen. Rotary positions have no batch axis in FLUX.1, so a batch holds samples of one source and
one target size: samples of several sizes are kept in buckets, one per pair of sizes.

Shapes: B samples of a batch, N samples of a stage, C packed latent channels, R x C grid and D width
of semantic features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from prw_flux.ahead import Ahead, Check
from prw_flux.batch_order import batch_indices, bucket_of
from prw_flux.coredi.encoders import FeatureEncoder
from prw_flux.draws import Draws, SampleError
from prw_flux.encode import position_ids, source_offset
from prw_flux.encoded import Batch, Encoded, Ready, Texts
from prw_flux.ranks import Ranks
from prw_flux.sample_encoder import SampleEncoder, semantic
from prw_flux.tasks import DataSource, Task, Triple
from prw_flux.together import CHUNK, Together

if TYPE_CHECKING:
    from prw_flux.sample_cache.table import Bucket, StoredTexts, Table

NOTHING: Final = nullcontext()


class Samples:
    """The training samples of one stage.

    Args:
        data: where examples come from.
        task: what makes samples of them.
        pipe: a FLUX.1 pipeline, whose autoencoder and text encoders are used.
        stage: name of the stage; with the seed it decides everything that is random.
        seed: of the run.
        batch_size: B.
        count: N, encoded by `prepare`; None encodes each batch when it is asked for.
        encoder: of the targets' semantic features, where they are wanted.
        max_rejected: largest share of the drawn pictures that may be unusable; see `DataConfig`.
        reading: opened around whatever reads data, or waits for it, in the thread that trains.
        encoding: opened around whatever uses the encoders of `pipe`, in any thread.
        cache: the samples, encoded before; `data` and the encoders of `pipe` are then not used.
        ranks: that share the work of `prepare`, which they all call.

    Attributes:
        tally: what was drawn by `prepare`, on all ranks; where samples are drawn step by step, by
            this process since the last resume; with a cache, when it was built.
    """

    def __init__(
        self,
        data: DataSource,
        task: Task,
        pipe: Any,
        *,
        stage: str,
        seed: int,
        batch_size: int,
        count: int | None,
        encoder: FeatureEncoder | None = None,
        max_rejected: float = 1.0,
        reading: Callable[[], AbstractContextManager[None]] = nullcontext,
        encoding: AbstractContextManager[Any] = NOTHING,
        cache: Table | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.data, self.task, self.pipe = data, task, pipe
        self.stage, self.seed, self.batch_size, self.count = stage, seed, batch_size, count
        self.reading, self.encoding, self.cache = reading, encoding, cache
        self.ranks = ranks or Ranks()
        self.draws = Draws(data, task, stage=stage, seed=seed, max_rejected=max_rejected)
        self.tally = self.draws.tally if cache is None else cache.tally()
        self.encoder: SampleEncoder | None = None
        self.texts: Texts | StoredTexts
        if cache is None:
            self.encoder = SampleEncoder(pipe, Texts(pipe), encoder)
            self.texts = self.encoder.texts
        else:
            self.texts = cache.texts
        self._buckets: tuple[Encoded | Bucket, ...] = ()
        self._alone: dict[str, tuple[Tensor, Tensor]] = {}
        self._ahead: Ahead[Ready] | None = None
        self._last: tuple[int, range, Ready] | None = None

    def prepare(self, tick: Callable[[int], None] = lambda done: None) -> None:
        """Draw and encode all N samples; nothing where batches are encoded one by one.

        Args:
            tick: told now and then how many samples are done; may raise to stop, on all ranks.

        Raises:
            SampleError: no usable sample, on any rank.
            RankLost: a rank is gone.
        """
        if self.count is None:
            return
        if self.cache is not None:
            self._buckets = self.cache.buckets(self.count)
            return
        assert self.encoder is not None
        together = Together(self.draws, self.encoder, self.ranks, self.reading)
        self._buckets = together.buckets(self.count, tick)

    def features(self, count: int) -> Tensor:
        """[at most `count`, R, C, D] semantic features of first samples of one size, float32."""
        if self._buckets:
            return max(self._buckets, key=len).features(count).float()
        if self.cache is not None:
            return self.cache.first_features(count).float()
        assert self.encoder is not None and self.encoder.feature_encoder is not None
        found: list[Tensor] = []
        shape: tuple[int, ...] = ()
        for start in range(0, count, CHUNK):
            with self.reading():
                chunk = range(start, min(start + CHUNK, count))
                images = [self.triple(index).target for index in chunk]
            shape = shape or images[0].shape
            alike = [image for image in images if image.shape == shape]
            if alike:
                grid = self.encoder.latents(alike[:1])[1]
                found.append(semantic(self.encoder.feature_encoder, alike, grid))
        return torch.cat(found).float()

    @contextmanager
    def ahead(self, steps: range, share: range, depth: int) -> Iterator[None]:
        """While open, what is read or encoded for single steps is so in another thread.

        Batches are bit for bit what they are without. Those that were encoded by `prepare` are in
        memory: nothing is done ahead for them.

        Args:
            steps: that `batch` will be asked for, one after another.
            share: of their batches.
            depth: batches that may wait for their step; 0 is no other thread.
        """
        if depth == 0 or (self.count is not None and self.cache is None):
            yield
            return
        self.alone("")
        with Ahead(partial(self._make, share), steps, depth) as self._ahead:
            try:
                yield
            finally:
                self._ahead = None

    def batch(self, step: int, dropped: Sequence[bool] = (), share: range | None = None) -> Batch:
        """The batch of a step, float32; a `dropped` sample has the empty text.

        The last one that was asked for is not made again.

        Args:
            step: of the stage.
            dropped: of every sample of the batch.
            share: positions in the batch that are wanted; None wants all.

        Raises:
            SampleError: no usable sample; or, where batches are encoded one by one, several sizes.
        """
        share = range(self.batch_size) if share is None else share
        if self._last is None or self._last[:2] != (step, share):
            self._last = None
            self._last = step, share, self._ready(step, share)
        ready = self._last[2]
        text_BLE, pooled_BP = ready.text_BLE.float(), ready.pooled_BP.float()
        for index, drop in enumerate(dropped[share.start : share.stop]):
            if drop:
                text_BLE[index], pooled_BP[index] = (part[0] for part in self.alone(""))
        return self._collated(ready.encoded, text_BLE, pooled_BP)

    def alone(self, text: str) -> tuple[Tensor, Tensor]:
        """text [1, L, E] and pooled [1, P] of a text that is no sample's, encoded once; float32."""
        if text not in self._alone:
            with self.encoding:
                self._alone[text] = self.texts.gather(self.texts.rows([text]))
        return self._alone[text]

    def every(self, size: int) -> Iterator[tuple[list[int], Batch]]:
        """Every prepared sample once: batches of at most `size` of one picture size, numbered."""
        first = 0
        for bucket in self._buckets:
            for start in range(0, len(bucket), size):
                chosen = list(range(start, min(start + size, len(bucket))))
                part = bucket.taken(chosen)
                texts = self.texts.gather(part.rows)
                yield [first + i for i in chosen], self._collated(part, *texts)
            first += len(bucket)

    def first(self, count: int) -> list[tuple[list[int], Encoded]]:
        """The first samples with their numbers, prepared or not; those of one size together."""
        alike: dict[Any, list[tuple[int, Encoded]]] = {}
        for i in range(count):
            if self.cache is not None:
                (one,) = self.cache.parts([i])
            else:
                assert self.encoder is not None
                (one,) = self.encoder.parts(self._drawn(range(i, i + 1)))
            alike.setdefault(one.grids, []).append((i, one))
        found = [zip(*group, strict=True) for group in alike.values()]
        return [(list(numbers), Encoded.merged(parts)) for numbers, parts in found]

    def _collated(self, encoded: Encoded, text_BLE: Tensor, pooled_BP: Tensor) -> Batch:
        """Samples with their texts."""
        columns = encoded.source_grid[1]
        return Batch(
            target_BTC=encoded.target_NTC.float(),
            source_BSC=encoded.source_NSC.float(),
            text_BLE=text_BLE,
            pooled_BP=pooled_BP,
            target_ids_T3=position_ids(*encoded.target_grid),
            source_ids_S3=position_ids(
                *encoded.source_grid, offset=source_offset(self.task.aligned, columns)
            ),
            features_BRCD=(
                None if encoded.features_NRCD is None else encoded.features_NRCD.float()
            ),
        )

    def triple(self, index: int) -> Triple:
        """Sample `index` before it is encoded; raises like `Draws.triple`."""
        return self.draws.triple(index)

    def _ready(self, step: int, share: range) -> Ready:
        """Some of a step's samples, from the other thread where there is one."""
        if self._ahead is None:
            return self._make(share, step)
        with self.reading():
            return self._ahead.take(step)

    def _make(self, share: range, step: int, check: Check | None = None) -> Ready:
        """Some of a step's samples, now; in another thread there is a `check`."""
        if self.count is not None:
            assert self._buckets, "prepare() comes first"
            sizes = [len(bucket) for bucket in self._buckets]
            bucket, turn = bucket_of(self.seed, self.stage, step, sizes)
            chosen = batch_indices(self.seed, self.stage, turn, self.batch_size, sizes[bucket])
            encoded = self._buckets[bucket].taken(chosen[share.start : share.stop])
            return Ready.of(encoded, self.texts.gather(encoded.rows))
        start = step * self.batch_size
        indices = range(start + share.start, start + share.stop)
        if self.cache is not None:
            parts = self.cache.parts(indices)
        else:
            assert self.encoder is not None
            triples = self._drawn(indices, check)
            with self.encoding:
                self.texts.trim()
                parts = self.encoder.parts(triples)
        if len(parts) != 1:
            raise SampleError(
                f"samples of {self.task.name!r} in one batch must agree in size; got token grids "
                f"of (source, target) {', '.join(str(part.grids) for part in parts)}: set "
                "data.samples to a number, so that they are encoded before and sorted by size"
            )
        return Ready.of(parts[0], self.texts.gather(parts[0].rows))

    def _drawn(self, indices: range, check: Check | None = None) -> list[Triple]:
        """Samples before they are encoded."""
        if check is None:
            with self.reading():
                return [self.triple(index) for index in indices]
        triples = []
        for index in indices:
            check()
            triples.append(self.triple(index))
        return triples
