"""What `benchmarks.kernels` runs: suites of shapes, and how tokens are spread over experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Skew = Literal["uniform", "zipf", "one", "sample"]


@dataclass(frozen=True)
class Shape:
    """One case.

    Attributes:
        tokens: T. With skew "sample" they are 8 samples of T / 8 tokens.
        width: D, and O of every projection.
        projections: linears that share the input and the routing.
        rank: R of every expert.
        experts: N.
        dtype: of everything but the gate, which is fp32.
        skew: tokens spread evenly, as 1, 1/2, 1/3, ..., all on one expert, or sample by sample.
        learning: how many experts learn, the newest ones.
    """

    tokens: int
    width: int
    projections: int = 1
    rank: int = 32
    experts: int = 5
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    skew: Skew = "uniform"
    learning: int = 5

    @property
    def name(self) -> str:
        """Short, and the same for the same case in every run."""
        learning = "" if self.learning >= self.experts else f" {self.learning} learn"
        return (
            f"T{self.tokens} d{self.width}x{self.projections} r{self.rank} N{self.experts} "
            f"{self.dtype} {self.skew}{learning}"
        )

    @property
    def kind(self) -> torch.dtype:
        """The dtype."""
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found

    def choices(self, random: torch.Generator) -> Tensor:
        """An expert for every token, or for every sample, on the generator's device."""
        count = 8 if self.skew == "sample" else self.tokens
        share = torch.ones(self.experts)
        if self.skew == "zipf":
            share = 1 / torch.arange(1, self.experts + 1)
        if self.skew == "one":
            share = torch.eye(self.experts)[-1]
        share = share.to(random.device)
        return torch.multinomial(share, count, replacement=True, generator=random)


def suite(name: str, quick: bool) -> list[Shape]:
    """The cases of a suite; `quick` keeps a few small ones."""
    made = {"cpu": _cpu, "flux": _flux, "llm": _llm}[name]()
    if not quick:
        return made
    small = Shape(512, 256)
    kinds = [small, replace(small, skew="sample"), replace(small, rank=8, dtype="bfloat16")]
    return kinds if name == "cpu" else [s for s in made if s.tokens == 1024][:3]


def _cpu() -> list[Shape]:
    plain = [
        Shape(tokens, width, rank=rank, dtype=dtype)
        for dtype in ("float32", "bfloat16")
        for tokens, width, rank in (
            (1024, 512, 8), (1024, 512, 32), (4096, 512, 32),
            (1024, 1024, 32), (4096, 1024, 32), (1024, 1024, 128),
        )
    ]  # fmt: skip
    one = Shape(1024, 512)
    skews = [replace(one, skew=skew) for skew in ("zipf", "one", "sample")]
    others = [replace(one, learning=1), replace(one, projections=2), replace(one, experts=64)]
    return plain + skews + [replace(o, learning=min(o.learning, o.experts)) for o in others]


def _flux() -> list[Shape]:
    big = Shape(4096, 3072, projections=2, rank=128, dtype="bfloat16", learning=64)
    grid = [
        replace(big, tokens=tokens, rank=rank, experts=experts)
        for tokens in (1024, 4096, 16384, 65536)
        for rank in (16, 64, 128)
        for experts in (1, 2, 5, 8, 64)
    ]
    return grid + [replace(big, skew=skew) for skew in ("zipf", "one", "sample")]


def _llm() -> list[Shape]:
    return [
        Shape(tokens, 4096, 2, rank, experts, "bfloat16", learning=64)
        for tokens in (1024, 8192)
        for rank in (16, 64)
        for experts in (5, 16)
    ]
