"""What every loss on recorded routings must promise, and `check_loss`, which tries it.

Shape suffixes: S samples, T tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from hypothesis import strategies as st
from torch import Tensor

from prw.call import Record
from prw.config import Config
from prw.testing.invariant import Invariant, check, near, require, same_bits
from prw.testing.strategies import PoolPlan, disturb
from prw.weaving import Weave

Loss: TypeAlias = Callable[[Sequence[Record]], Tensor]

WIDTH = 3
SUMS = 1e-9  # everything is fp64: sums of at most a few hundred numbers around 1, in two orders


@dataclass(frozen=True)
class LossCase:
    """One situation a loss is tried in; its numbers follow from the seed.

    Attributes:
        samples, tokens: of the batch.
        experts: how many stages there are; the last one is open.
        blocks: how many routed groups.
        granularity: one routing per token or per sample.
        seed: of all numbers.
    """

    samples: int
    tokens: int
    experts: int = 2
    blocks: int = 1
    granularity: Literal["token", "sample"] = "token"
    seed: int = 0

    def begin(self) -> Begun:
        """A weave with trained-looking columns and a batch."""
        config = Config(rank=1, granularity=self.granularity, noise=False)
        plan = PoolPlan(config, WIDTH, (2,), self.blocks, torch.float64, self.seed)
        weave = plan.build()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for stage in range(self.experts):
                weave.unlock(f"s{stage}")
                disturb(weave)
        return Begun(plan, weave, plan.inputs(self.samples, self.tokens).requires_grad_())


@dataclass(frozen=True)
class Begun:
    """A weave, what it was built from, and a batch ``[S, T, D]``."""

    plan: PoolPlan
    weave: Weave
    x_STD: Tensor

    def record(self, *batches: Tensor, mask: Tensor | None = None) -> Record:
        """A record of the given forwards, with what the routers read."""
        with self.weave.record(mask=mask, keep_inputs=True, key=0) as record:
            for batch in batches:
                self.plan.forward(self.weave, batch)
        return record

    def columns(self) -> dict[str, Tensor]:
        """The router columns that learn, by name."""
        return {n: p for n, p in self.weave.named_parameters() if ".columns." in n}

    def slopes(self, loss: Tensor) -> dict[str, Tensor]:
        """The derivative of a loss by every column."""
        require(loss.requires_grad, "the loss has no gradient")
        columns = self.columns()
        found = torch.autograd.grad(
            loss,
            list(columns.values()),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return dict(zip(columns, found, strict=True))

    def same(self, found: Tensor, wanted: Tensor, what: str) -> None:
        """Raise AssertionError unless value and gradient of two losses agree."""
        near(found, wanted, SUMS, f"value {what}")
        slopes = self.slopes(wanted)
        for name, slope in self.slopes(found).items():
            near(slope, slopes[name], SUMS, f"gradient of {name} {what}")


def _scalar(loss: Loss, case: LossCase) -> None:
    begun = case.begin()
    found = loss([begun.record(begun.x_STD)])
    require(isinstance(found, Tensor), f"it returned a {type(found).__name__}")
    require(found.dim() == 0, f"a loss of shape {list(found.shape)}")
    require(found.dtype == torch.float64, f"{found.dtype} although routers computed in fp64")
    require(bool(found.isfinite()), f"a loss of {float(found.detach())}")


def _pure(loss: Loss, case: LossCase) -> None:
    begun = case.begin()
    record = begun.record(begun.x_STD)
    usage, first = record.usage(), loss([record]).detach()
    same_bits(loss([record]).detach(), first, "value of the second evaluation")
    require(record.usage() == usage, "the record was changed")


def _reach(loss: Loss, case: LossCase) -> None:
    begun = case.begin()
    found = loss([begun.record(begun.x_STD)])
    require(found.requires_grad, "the loss has no gradient")
    found.backward()
    columns = begun.columns()
    for name, column in columns.items():
        require(column.grad is not None, f"{name} got no gradient")
        require(bool(column.grad.isfinite().all()), f"the gradient of {name} is not finite")  # type: ignore[union-attr]
    for name, parameter in begun.weave.named_parameters():
        require(name in columns or parameter.grad is None, f"{name} got a gradient")
    require(begun.x_STD.grad is None, "the input of the model got a gradient")


def _split(loss: Loss, case: LossCase) -> None:
    begun = case.begin()
    whole = loss([begun.record(begun.x_STD)])
    first = 1 + case.seed % max(case.samples - 1, 1)
    parts = begun.x_STD[:first], begun.x_STD[first:]
    begun.same(loss([begun.record(*parts)]), whole, "with two forwards in the record")
    begun.same(loss([begun.record(p) for p in parts]), whole, "with two records")
    beside = loss([begun.record(begun.x_STD), begun.record(begun.x_STD[:0])])
    begun.same(beside, whole, "with an empty micro-batch besides")


def _order(loss: Loss, case: LossCase) -> None:
    begun = case.begin()
    random = torch.Generator().manual_seed(case.seed)
    order = torch.randperm(case.samples, generator=random)
    wanted = loss([begun.record(begun.x_STD)])
    begun.same(loss([begun.record(begun.x_STD[order])]), wanted, "with samples in another order")
    pair = [begun.record(begun.x_STD), begun.record(begun.x_STD[:1])]
    begun.same(loss(pair[::-1]), loss(pair), "with records in another order")


def _mask(loss: Loss, case: LossCase) -> None:
    begun = case.begin()
    kept = 1 + case.seed % max(case.tokens, 1)
    wanted = loss([begun.record(begun.x_STD[:, :kept])])
    x_STD = torch.cat([begun.x_STD[:, :kept], torch.full_like(begun.x_STD, torch.nan)], dim=1)
    mask = torch.arange(x_STD.shape[1]).expand(x_STD.shape[:2]) < kept
    begun.same(loss([begun.record(x_STD, mask=mask)]), wanted, "with masked NaN tokens behind")


def _nothing(loss: Loss, case: LossCase) -> None:
    begun = case.begin()
    mask = torch.zeros(begun.x_STD.shape[:2], dtype=torch.bool)
    for what, record in {
        "no samples": begun.record(begun.x_STD[:0]),
        "every token masked": begun.record(begun.x_STD, mask=mask),
    }.items():
        found = loss([record])
        require(float(found.detach()) == 0.0, f"{what}: a loss of {float(found.detach())}")
        for name, slope in begun.slopes(found).items():
            require(not bool(slope.any()), f"{what}: {name} got the gradient {slope.tolist()}")


LossInvariant: TypeAlias = Invariant[Loss, LossCase]

LOSS_INVARIANTS: tuple[LossInvariant, ...] = (
    Invariant("scalar", "a loss is a finite scalar with the dtype of the routers", _scalar),
    Invariant("purity", "the same records give the same bits and are not changed", _pure),
    Invariant(
        "reach", "a gradient reaches every router column that learns, and nothing else", _reach
    ),
    Invariant("nothing counted", "where nothing counts, loss and gradient are zero", _nothing),
    Invariant("mask", "masked tokens, NaN among them, are as if removed", _mask),
    Invariant("split", "the split into forwards and records does not matter", _split),
    Invariant("order", "the order of samples and of records does not matter", _order),
)
"""The promises of a loss, in the order in which `check_loss` tries them."""


def loss_cases() -> st.SearchStrategy[LossCase]:
    """Situations to try a loss in, the simplest first."""
    return st.builds(
        LossCase,
        samples=st.integers(2, 5),
        tokens=st.integers(1, 4),
        experts=st.integers(2, 4),
        blocks=st.integers(1, 3),
        granularity=st.sampled_from(["token", "sample"]),
        seed=st.integers(0, 2**16),
    )


def check_loss(loss: Loss, *, examples: int = 30) -> None:
    """Try whether a loss is a pure function of records that does not care how a batch was split.

    Args:
        loss: takes a list of records made with ``keep_inputs=True`` and returns a scalar; give
            settings to it with a lambda or `functools.partial`. It is a mean over what counts, or
            a function of such means: zero where nothing counts.
        examples: how many situations each invariant of `LOSS_INVARIANTS` is tried in.

    Raises:
        BrokenInvariant: one does not hold; the message names it and the smallest situation found.
    """
    label = getattr(loss, "__name__", type(loss).__name__)
    check(loss, label, LOSS_INVARIANTS, loss_cases(), examples)
