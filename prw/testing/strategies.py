"""Hypothesis strategies for what prw works on: shapes, dtypes, pools and stage histories.

Shape suffixes: D input width, O output width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from prw.config import Config
from prw.pool import Pool
from prw.weaving import Weave

AWKWARD_SHAPES = ((1,), (0,), (63,), (1, 1), (2, 0), (0, 3), (3, 21), (2, 3, 4), (4, 1, 5))
"""Leading axes on which kernels fail first: nothing, one token, no multiple of a block, 2-D to 4-D
once the feature axis is added."""


def shapes(max_size: int = 6) -> st.SearchStrategy[tuple[int, ...]]:
    """Leading axes of an input, one to three, with the awkward ones among them."""
    drawn = st.lists(st.integers(0, max_size), min_size=1, max_size=3).map(tuple)
    return st.one_of(st.sampled_from(AWKWARD_SHAPES), drawn)


def dtypes(*, exact: bool = False) -> st.SearchStrategy[torch.dtype]:
    """Floating point dtypes; with `exact` only fp32 and fp64."""
    found = [torch.float32, torch.float64]
    return st.sampled_from(found if exact else [*found, torch.bfloat16, torch.float16])


@dataclass(frozen=True)
class PoolPlan:
    """What a weave over bare pools is made from; `build` makes it, always the same.

    Attributes:
        config: of the weave; ``share_router="parent"`` puts all projections of a block in one pool.
        width: D.
        sizes: O of the projections ``p0``, ``p1``, ... of every block.
        blocks: how many blocks.
        dtype: of the parameters.
        seed: of all numbers.
    """

    config: Config
    width: int = 4
    sizes: tuple[int, ...] = (3,)
    blocks: int = 1
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def build(self) -> Weave:
        """A weave without stages."""
        pools = {}
        for block in range(self.blocks):
            sizes = {f"p{i}": size for i, size in enumerate(self.sizes)}
            groups: Mapping[str, Mapping[str, int]] = {f"b{block}": sizes}
            if self.config.share_router == "module":
                groups = {f"b{block}.{p}": {p: size} for p, size in sizes.items()}
            for name, group in groups.items():
                pools[name] = Pool(name, self.width, group, self.config).to(self.dtype)
        return Weave(pools, self.config, fingerprint={"class": "PoolPlan"})

    def inputs(self, *leading: int, seed: int = 0) -> Tensor:
        """``[*leading, D]``, standard normal."""
        random = torch.Generator().manual_seed(self.seed + seed)
        return torch.randn(*leading, self.width, generator=random, dtype=torch.float64).to(
            self.dtype
        )

    def forward(self, weave: Weave, x: Tensor) -> dict[str, Tensor]:
        """The residual of every projection of every pool for one input, ``[..., O]``."""
        found: dict[str, Tensor] = {}
        for name, pool in weave.pools.items():
            zeros = {p: x.new_zeros(*x.shape[:-1], size) for p, size in pool.projections.items()}
            outputs, _ = pool.add(zeros, x)
            found |= {f"{name}.{p}": y for p, y in outputs.items()}
        return found


def pools(**fixed: Any) -> st.SearchStrategy[PoolPlan]:
    """Plans of pools: sizes, rank, granularity, shared routers, gate, noise, dtype.

    Args:
        fixed: fields of `Config` or of `PoolPlan` that are not drawn.
    """

    def plan(drawn: dict[str, Any]) -> PoolPlan:
        values = drawn | fixed
        rest = {name: values.pop(name) for name in ("width", "sizes", "blocks", "dtype", "seed")}
        size = min(rest["width"], *rest["sizes"])
        return PoolPlan(Config(**values | {"rank": min(values["rank"], size)}), **rest)

    return st.fixed_dictionaries(
        {
            "width": st.integers(1, 9),
            "sizes": st.lists(st.integers(1, 7), min_size=1, max_size=2).map(tuple),
            "blocks": st.integers(1, 2),
            "dtype": dtypes(exact=True),
            "seed": st.integers(0, 2**16),
            "rank": st.integers(1, 3),
            "granularity": st.sampled_from(["token", "sample"]),
            "share_router": st.sampled_from(["module", "parent"]),
            "router_train": st.sampled_from(["all", "new"]),
            "gate": st.sampled_from(["softmax", "one"]),
            "noise": st.booleans(),
        }
    ).map(plan)


def histories(max_events: int = 8) -> st.SearchStrategy[tuple[str, ...]]:
    """What may happen to a weave: ``"unlock"``, ``"train"``, ``"close"`` and ``"rollback N"``.

    ``rollback N`` goes back to the stage with index N, counted at that time. Every history begins
    with ``unlock`` and can be given to `play`.
    """

    def possible(wishes: list[tuple[str, int]]) -> tuple[str, ...]:
        events, stages = ["unlock"], 1
        for wish, number in wishes:
            if wish == "rollback":
                stages = number % stages + 1
                events.append(f"rollback {stages - 1}")
            else:
                stages += wish == "unlock"
                events.append(wish)
        return tuple(events)

    wish = st.tuples(
        st.sampled_from(["train", "unlock", "close", "rollback"]), st.integers(0, max_events)
    )
    return st.lists(wish, max_size=max_events - 1).map(possible)


def disturb(weave: Weave) -> None:
    """Give everything that may learn now new random values, from torch's default generator."""
    with torch.no_grad():
        for parameter in weave.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64))


def play(weave: Weave, history: tuple[str, ...], train: Callable[[Weave], None] = disturb) -> None:
    """Let a history happen.

    Args:
        weave: without stages, or with stages named otherwise than ``s0``, ``s1``, ...
        history: drawn from `histories`.
        train: what ``"train"`` does.
    """
    for count, event in enumerate(history):
        if event == "unlock":
            weave.unlock(f"s{count}")
        elif event == "train":
            train(weave)
        elif event == "close":
            weave.close()
        else:
            weave.rollback(weave.stages[int(event.split()[1])].name)
