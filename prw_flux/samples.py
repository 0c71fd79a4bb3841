"""From a data source and a task to encoded training batches.

Sample i of a stage is a pure function of (seed, stage, i), and the batch of a step one of
(seed, stage, step): a resumed run sees what an uninterrupted one would have seen.

Shapes: B samples of a batch, N samples of a stage, S source and T target tokens, C packed latent
channels, L text tokens, E and P widths of the text and pooled embeddings, R x C grid and D width of
semantic features.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from prw import PRWError
from prw_flux.coredi.encoders import FeatureEncoder
from prw_flux.encode import (
    encode_image,
    encode_prompts,
    pack,
    position_ids,
    source_offset,
    to_pixels,
)
from prw_flux.tasks import DataSource, Task, TaskReject, Triple

CHUNK: Final = 32
TRIES: Final = 20
STRIDE: Final = 1_000_003
"""Distance to the example that replaces a rejected one; prime: a small source is covered."""


class SampleError(PRWError, ValueError):
    """A stage has no usable samples, or samples of several sizes."""


def stable_hash(*parts: object) -> int:
    """63 bits that depend on the parts alone, on every machine and in every process."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def batch_indices(seed: int, stage: str, step: int, batch_size: int, count: int) -> list[int]:
    """Which of `count` samples make up a step: shuffled epochs, laid end to end."""
    start = step * batch_size
    indices: list[int] = []
    for epoch in range(start // count, (start + batch_size - 1) // count + 1):
        rng = np.random.default_rng(stable_hash(seed, stage, "order", epoch))
        order = rng.permutation(count)
        low, high = max(start - epoch * count, 0), start + batch_size - epoch * count
        indices += [int(i) for i in order[low:high]]
    return indices


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

    def trim(self) -> None:
        """Forget all texts but the empty one."""
        self._rows = {"": 0}
        del self._text_LE[1:], self._pooled_P[1:]


@dataclass(frozen=True, eq=False)
class Encoded:
    """Encoded samples: packed latents in bf16, and rows of the texts."""

    source_NSC: Tensor
    target_NTC: Tensor
    rows: list[int]
    source_grid: tuple[int, int]
    target_grid: tuple[int, int]
    features_NRCD: Tensor | None = None


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

    Attributes:
        rejected: rejected draws by reason.
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
    ) -> None:
        self.data, self.task, self.pipe = data, task, pipe
        self.stage, self.seed, self.batch_size, self.count = stage, seed, batch_size, count
        self.encoder = encoder
        self.rejected: Counter[str] = Counter()
        self.texts = Texts(pipe)
        self._encoded: Encoded | None = None

    def prepare(self, tick: Callable[[int], None] = lambda done: None) -> None:
        """Draw and encode all N samples; nothing where batches are encoded one by one.

        Args:
            tick: told after each chunk how many samples are done; may raise to stop.

        Raises:
            SampleError: no usable sample, or samples of several sizes.
        """
        if self.count is None:
            return
        parts = []
        for start in range(0, self.count, CHUNK):
            tick(start)
            parts.append(self._encode(range(start, min(start + CHUNK, self.count))))
        tick(self.count)
        features = [part.features_NRCD for part in parts if part.features_NRCD is not None]
        self._encoded = Encoded(
            torch.cat([part.source_NSC for part in parts]),
            torch.cat([part.target_NTC for part in parts]),
            [row for part in parts for row in part.rows],
            *self._one_size(parts),
            torch.cat(features) if features else None,
        )

    def features(self, count: int) -> Tensor:
        """[at most `count`, R, C, D] semantic features of the stage's first samples, float32."""
        if self._encoded is not None:
            assert self._encoded.features_NRCD is not None
            return self._encoded.features_NRCD[:count].float()
        assert self.encoder is not None
        found = []
        for start in range(0, count, CHUNK):
            chunk = range(start, min(start + CHUNK, count))
            images = [self.triple(index).target for index in chunk]
            found.append(self._features(images, self._latents(images[:1])[1]))
        return torch.cat(found).float()

    def batch(self, step: int, dropped: Sequence[bool] = ()) -> Batch:
        """The batch of a step, float32; a `dropped` sample has the empty text."""
        if self.count is None:
            self.texts.trim()
            start = step * self.batch_size
            encoded = self._encode(range(start, start + self.batch_size))
            chosen = list(range(self.batch_size))
        else:
            assert self._encoded is not None, "prepare() comes first"
            encoded = self._encoded
            chosen = batch_indices(self.seed, self.stage, step, self.batch_size, self.count)
        rows = [encoded.rows[i] for i in chosen]
        for position, drop in enumerate(dropped):
            rows[position] = 0 if drop else rows[position]
        text_BLE, pooled_BP = self.texts.gather(rows)
        columns = encoded.source_grid[1]
        return Batch(
            target_BTC=encoded.target_NTC[chosen].float(),
            source_BSC=encoded.source_NSC[chosen].float(),
            text_BLE=text_BLE,
            pooled_BP=pooled_BP,
            target_ids_T3=position_ids(*encoded.target_grid),
            source_ids_S3=position_ids(
                *encoded.source_grid, offset=source_offset(self.task.aligned, columns)
            ),
            features_BRCD=(
                None if encoded.features_NRCD is None else encoded.features_NRCD[chosen].float()
            ),
        )

    def triple(self, index: int) -> Triple:
        """Sample `index`: the first usable one of a fixed sequence of examples.

        Raises:
            SampleError: none of the first 20 is usable.
        """
        reasons: Counter[str] = Counter()
        for attempt in range(TRIES):
            example = self.data.example(self.task.name, index + attempt * STRIDE)
            try:
                triple = self.task(example, stable_hash(self.seed, self.stage, index, attempt))
            except TaskReject as refusal:
                reasons[refusal.reason] += 1
                continue
            self.rejected += reasons
            return triple
        told = ", ".join(f"{reason} ({n} x)" for reason, n in reasons.most_common())
        raise SampleError(f"{self.data.name} gives no sample for {self.task.name!r}: {told}")

    def _encode(self, indices: range) -> Encoded:
        triples = [self.triple(index) for index in indices]
        sizes = {(t.source.shape, t.target.shape) for t in triples}
        if len(sizes) != 1:
            raise SampleError(
                f"samples of {self.task.name!r} must agree in size; got (source, target) of "
                f"{', '.join(map(str, sorted(sizes)))}"
            )
        source, source_grid = self._latents([t.source for t in triples])
        target, target_grid = self._latents([t.target for t in triples])
        rows = self.texts.rows([t.text for t in triples])
        features = None
        if self.encoder is not None:
            features = self._features([t.target for t in triples], target_grid)
        return Encoded(source, target, rows, source_grid, target_grid, features)

    def _features(self, images: list[np.ndarray[Any, Any]], grid: tuple[int, int]) -> Tensor:
        """Semantic features [B, R, C, D] in bf16 on the CPU, one place per token."""
        assert self.encoder is not None
        return self.encoder(to_pixels(np.stack(images)), grid).to("cpu", torch.bfloat16)

    def _latents(self, images: list[np.ndarray[Any, Any]]) -> tuple[Tensor, tuple[int, int]]:
        """Packed latents [B, tokens, C] in bf16 on the CPU, and the grid of tokens."""
        vae = self.pipe.vae
        pixels = to_pixels(np.stack(images)).contiguous(memory_format=torch.channels_last)
        with torch.autocast(vae.device.type, torch.bfloat16):
            latents = encode_image(vae, pixels)
        grid = latents.shape[-2] // 2, latents.shape[-1] // 2
        return pack(latents).to("cpu", torch.bfloat16), grid

    def _one_size(self, parts: Sequence[Encoded]) -> tuple[tuple[int, int], tuple[int, int]]:
        grids = {(part.source_grid, part.target_grid) for part in parts}
        if len(grids) != 1:
            raise SampleError(f"samples of {self.task.name!r} must agree in size; got {grids}")
        return grids.pop()
