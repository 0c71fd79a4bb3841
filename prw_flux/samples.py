"""From the samples of a stage to encoded training batches.

Sample i is a pure function of (seed, stage, i) (`prw_flux.draws`), and the batch of a step one of
(seed, stage, step) (`prw_flux.batch_order`): a resumed run sees what an uninterrupted one would
have seen. Rotary positions have no batch axis in FLUX.1, so a batch holds samples of one source and
one target size: samples of several sizes are kept in buckets, one per pair of sizes.

Shapes: B samples of a batch, N samples of a stage, S source and T target tokens, C packed latent
channels, L text tokens, E and P widths of the text and pooled embeddings, R x C grid and D width of
semantic features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from prw_flux.batch_order import batch_indices, bucket_of
from prw_flux.coredi.encoders import FeatureEncoder
from prw_flux.draws import Draws, SampleError
from prw_flux.encode import (
    encode_image,
    encode_prompts,
    pack,
    position_ids,
    source_offset,
    to_pixels,
)
from prw_flux.tasks import DataSource, Task, Triple

if TYPE_CHECKING:
    from prw_flux.sample_cache.table import Bucket, StoredTexts, Table

CHUNK: Final = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """What one step trains on, with the rotary positions of both pictures.

    Features, one place per target token, are there where the run has an encoder of them.
    """

    target_BTC: Tensor
    source_BSC: Tensor
    text_BLE: Tensor
    pooled_BP: Tensor
    target_ids_T3: Tensor
    source_ids_S3: Tensor
    features_BRCD: Tensor | None = None

    def part(self, start: int, stop: int) -> Batch:
        """Some of its samples."""
        if (start, stop) == (0, len(self.target_BTC)):
            return self
        features = self.features_BRCD
        return replace(
            self,
            target_BTC=self.target_BTC[start:stop],
            source_BSC=self.source_BSC[start:stop],
            text_BLE=self.text_BLE[start:stop],
            pooled_BP=self.pooled_BP[start:stop],
            features_BRCD=None if features is None else features[start:stop],
        )

    def drawn(self, count: int) -> Batch:
        """Each target and text `count` times in a row, for as many draws of noise; one source."""
        if count == 1:
            return self
        return replace(
            self,
            target_BTC=self.target_BTC.repeat_interleave(count, dim=0),
            text_BLE=self.text_BLE.repeat_interleave(count, dim=0),
            pooled_BP=self.pooled_BP.repeat_interleave(count, dim=0),
            features_BRCD=(
                None
                if self.features_BRCD is None
                else self.features_BRCD.repeat_interleave(count, dim=0)
            ),
        )


class Texts:
    """Text embeddings, each text encoded once. Row 0 is the empty text."""

    def __init__(self, pipe: Any) -> None:
        self._parts = {
            name: getattr(pipe, name)
            for name in ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
        }
        self._rows: dict[str, int] = {}
        self._text_LE: list[Tensor] = []
        self._pooled_P: list[Tensor] = []
        self.rows([""])

    def rows(self, texts: Sequence[str]) -> list[int]:
        """Row of each text; new ones are encoded together."""
        new = [text for text in dict.fromkeys(texts) if text not in self._rows]
        if new:
            device = self._parts["text_encoder_2"].device.type
            with torch.autocast(device, enabled=False):  # the same bits whoever asks, and when
                text_BLE, pooled_BP = encode_prompts(new, **self._parts)
            for name, text, pooled in zip(new, text_BLE, pooled_BP, strict=True):
                self._rows[name] = len(self._rows)
                self._text_LE.append(text.to("cpu", torch.bfloat16))
                self._pooled_P.append(pooled.to("cpu", torch.bfloat16))
        return [self._rows[text] for text in texts]

    def gather(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """text [B, L, E] and pooled [B, P] of some rows, float32."""
        text = torch.stack([self._text_LE[row] for row in rows]).float()
        return text, torch.stack([self._pooled_P[row] for row in rows]).float()

    def pair(self, row: int) -> tuple[Tensor, Tensor]:
        """[L, E] and [P] of one row, bf16."""
        return self._text_LE[row], self._pooled_P[row]

    def trim(self) -> None:
        """Forget all texts but the empty one."""
        self._rows = {"": 0}
        del self._text_LE[1:], self._pooled_P[1:]


@dataclass(frozen=True, eq=False)
class Encoded:
    """Encoded samples of one size: packed latents in bf16, and rows of the texts."""

    source_NSC: Tensor
    target_NTC: Tensor
    rows: list[int]
    source_grid: tuple[int, int]
    target_grid: tuple[int, int]
    features_NRCD: Tensor | None = None

    @property
    def grids(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """What the samples of a bucket agree in: the token grids of source and target."""
        return self.source_grid, self.target_grid

    def __len__(self) -> int:
        return len(self.rows)

    def taken(self, chosen: Sequence[int]) -> Encoded:
        """Some of the samples."""
        features = self.features_NRCD
        return replace(
            self,
            source_NSC=self.source_NSC[chosen],
            target_NTC=self.target_NTC[chosen],
            rows=[self.rows[i] for i in chosen],
            features_NRCD=None if features is None else features[chosen],
        )

    @classmethod
    def merged(cls, parts: Sequence[Encoded]) -> Encoded:
        """Parts of one size as one."""
        features = [part.features_NRCD for part in parts if part.features_NRCD is not None]
        return cls(
            torch.cat([part.source_NSC for part in parts]),
            torch.cat([part.target_NTC for part in parts]),
            [row for part in parts for row in part.rows],
            *parts[0].grids,
            torch.cat(features) if features else None,
        )


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
        reading: opened around whatever reads data.
        cache: the samples, encoded before; `data` and the encoders of `pipe` are then not used.

    Attributes:
        tally: what this process has drawn, so where samples are drawn step by step, since the last
            resume; with a cache, what was drawn when it was built.
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
        cache: Table | None = None,
    ) -> None:
        self.data, self.task, self.pipe = data, task, pipe
        self.stage, self.seed, self.batch_size, self.count = stage, seed, batch_size, count
        self.encoder, self.reading, self.cache = encoder, reading, cache
        self.draws = Draws(data, task, stage=stage, seed=seed, max_rejected=max_rejected)
        self.tally = self.draws.tally if cache is None else cache.tally()
        self.texts: Texts | StoredTexts = Texts(pipe) if cache is None else cache.texts
        self._buckets: tuple[Encoded | Bucket, ...] = ()

    def prepare(self, tick: Callable[[int], None] = lambda done: None) -> None:
        """Draw and encode all N samples; nothing where batches are encoded one by one.

        Args:
            tick: told after each chunk how many samples are done; may raise to stop.

        Raises:
            SampleError: no usable sample.
        """
        if self.count is None:
            return
        if self.cache is not None:
            self._buckets = self.cache.buckets(self.count)
            return
        buckets: dict[Any, list[Encoded]] = {}
        for start in range(0, self.count, CHUNK):
            tick(start)
            for part in self._encode(range(start, min(start + CHUNK, self.count))):
                buckets.setdefault(part.grids, []).append(part)
        tick(self.count)
        self.draws.judge(last=True)
        self._buckets = tuple(Encoded.merged(parts) for parts in buckets.values())

    def features(self, count: int) -> Tensor:
        """[at most `count`, R, C, D] semantic features of first samples of one size, float32."""
        if self._buckets:
            largest = max(self._buckets, key=len)
            assert isinstance(largest, Encoded) and largest.features_NRCD is not None
            return largest.features_NRCD[:count].float()
        assert self.encoder is not None
        found = []
        for start in range(0, count, CHUNK):
            chunk = range(start, min(start + CHUNK, count))
            images = [self.triple(index).target for index in chunk]
            found.append(self._features(images, self.latents(images[:1])[1]))
        return torch.cat(found).float()

    def batch(self, step: int, dropped: Sequence[bool] = (), share: range | None = None) -> Batch:
        """The batch of a step, float32; a `dropped` sample has the empty text.

        Args:
            step: of the stage.
            dropped: of every sample of the batch.
            share: positions in the batch that are wanted; None wants all.

        Raises:
            SampleError: no usable sample; or, where batches are encoded one by one, several sizes.
        """
        share = range(self.batch_size) if share is None else share
        if self.count is None:
            encoded = self._encode_batch(step, share)
        else:
            assert self._buckets, "prepare() comes first"
            sizes = [len(bucket) for bucket in self._buckets]
            bucket, turn = bucket_of(self.seed, self.stage, step, sizes)
            chosen = batch_indices(self.seed, self.stage, turn, self.batch_size, sizes[bucket])
            encoded = self._buckets[bucket].taken(chosen[share.start : share.stop])
        rows = list(encoded.rows)
        for index, drop in enumerate(dropped[share.start : share.stop]):
            rows[index] = 0 if drop else rows[index]
        return self._collated(encoded, rows)

    def every(self, size: int) -> Iterator[tuple[list[int], Batch]]:
        """Every prepared sample once: batches of at most `size` of one picture size, numbered."""
        first = 0
        for bucket in self._buckets:
            for start in range(0, len(bucket), size):
                chosen = list(range(start, min(start + size, len(bucket))))
                part = bucket.taken(chosen)
                yield [first + i for i in chosen], self._collated(part, part.rows)
            first += len(bucket)

    def first(self, count: int) -> list[tuple[list[int], Encoded]]:
        """The first samples with their numbers, prepared or not; those of one size together."""
        alike: dict[Any, list[tuple[int, Encoded]]] = {}
        for i in range(count):
            (one,) = self._encode(range(i, i + 1)) if self.cache is None else self.cache.parts([i])
            alike.setdefault(one.grids, []).append((i, one))
        found = [zip(*group, strict=True) for group in alike.values()]
        return [(list(numbers), Encoded.merged(parts)) for numbers, parts in found]

    def _collated(self, encoded: Encoded, rows: Sequence[int]) -> Batch:
        """Samples with the texts of some rows."""
        text_BLE, pooled_BP = self.texts.gather(rows)
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

    def _encode_batch(self, step: int, share: range) -> Encoded:
        """Some of a step whose samples are made when they are needed, in their order."""
        self.texts.trim()
        start = step * self.batch_size
        indices = range(start + share.start, start + share.stop)
        parts = self._encode(indices) if self.cache is None else self.cache.parts(indices)
        if len(parts) != 1:
            raise SampleError(
                f"samples of {self.task.name!r} in one batch must agree in size; got token grids "
                f"of (source, target) {', '.join(str(part.grids) for part in parts)}: set "
                "data.samples to a number, so that they are encoded before and sorted by size"
            )
        return parts[0]

    def _encode(self, indices: range) -> list[Encoded]:
        """Samples, those of one size together."""
        groups: dict[Any, list[Triple]] = {}
        with self.reading():
            triples = [self.triple(index) for index in indices]
        for triple in triples:
            groups.setdefault((triple.source.shape, triple.target.shape), []).append(triple)
        return [self._encode_group(group) for group in groups.values()]

    def _encode_group(self, triples: list[Triple]) -> Encoded:
        source, source_grid = self.latents([t.source for t in triples])
        target, target_grid = self.latents([t.target for t in triples])
        rows = self.texts.rows([t.text for t in triples])
        features = None
        if self.encoder is not None:
            features = self._features([t.target for t in triples], target_grid)
        return Encoded(source, target, rows, source_grid, target_grid, features)

    def _features(self, images: list[np.ndarray[Any, Any]], grid: tuple[int, int]) -> Tensor:
        """Semantic features [B, R, C, D] in bf16 on the CPU, one place per token."""
        assert self.encoder is not None
        return self.encoder(to_pixels(np.stack(images)), grid).to("cpu", torch.bfloat16)

    def latents(self, images: list[np.ndarray[Any, Any]]) -> tuple[Tensor, tuple[int, int]]:
        """Packed latents [B, tokens, C] in bf16 on the CPU, and the grid of tokens."""
        vae = self.pipe.vae
        pixels = to_pixels(np.stack(images)).contiguous(memory_format=torch.channels_last)
        with torch.autocast(vae.device.type, torch.bfloat16):
            latents = encode_image(vae, pixels)
        grid = latents.shape[-2] // 2, latents.shape[-1] // 2
        return pack(latents).to("cpu", torch.bfloat16), grid
