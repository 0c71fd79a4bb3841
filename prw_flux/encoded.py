"""Encoded samples, and what a step gets of them.

Shapes: B samples of a batch, N samples of a stage, S source and T target tokens, C packed latent
channels, L text tokens, E and P widths of the text and pooled embeddings, R x C grid and D width of
semantic features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from prw_flux.encode import encode_prompts

Grid: TypeAlias = tuple[int, int]
"""Rows and columns of tokens."""


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
        new = self.new(texts)
        if new:
            self.add(new, *self.encoded(new))
        return [self._rows[text] for text in texts]

    def new(self, texts: Sequence[str]) -> list[str]:
        """Those that have no row, once."""
        return [text for text in dict.fromkeys(texts) if text not in self._rows]

    def encoded(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """text [B, L, E] and pooled [B, P] of texts, in bf16 on the CPU, encoded together."""
        device = self._parts["text_encoder_2"].device.type
        with torch.autocast(device, enabled=False):  # the same bits whoever asks, and when
            text_BLE, pooled_BP = encode_prompts(texts, **self._parts)
        text_BLE, pooled_BP = (x.to("cpu", torch.bfloat16) for x in (text_BLE, pooled_BP))
        return text_BLE.contiguous(), pooled_BP.contiguous()

    def add(self, new: Sequence[str], text_BLE: Tensor, pooled_BP: Tensor) -> None:
        """Give texts rows of their own, with what `encoded` made of them, here or elsewhere."""
        for name, text, pooled in zip(new, text_BLE, pooled_BP, strict=True):
            self._rows[name] = len(self._rows)
            self._text_LE.append(text)
            self._pooled_P.append(pooled)

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
    source_grid: Grid
    target_grid: Grid
    features_NRCD: Tensor | None = None

    @classmethod
    def of(cls, pictures: Sequence[Tensor], grids: tuple[Grid, Grid], rows: list[int]) -> Encoded:
        """From sources, targets and, where there are some, features."""
        source, target, *features = pictures
        return cls(source, target, rows, *grids, features[0] if features else None)

    @property
    def grids(self) -> tuple[Grid, Grid]:
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

    def features(self, count: int) -> Tensor:
        """[at most `count`, R, C, D] semantic features of the first samples, bf16."""
        assert self.features_NRCD is not None
        return self.features_NRCD[:count]

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


@dataclass(frozen=True, eq=False)
class Ready:
    """What a step has of its samples before any caption is dropped: texts in bf16, as all else."""

    encoded: Encoded
    text_BLE: Tensor
    pooled_BP: Tensor

    @classmethod
    def of(cls, encoded: Encoded, texts: tuple[Tensor, Tensor]) -> Ready:
        """Samples and their texts, which are stored in bf16, whatever they are given in."""
        return cls(encoded, *(part.to(torch.bfloat16) for part in texts))
