"""What every implementation of routed LoRA must promise, and `check_backend`, which tries it.

Shape suffixes: D input width, O output width, R rank, ``...`` the leading axes of the input.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from hypothesis import strategies as st
from torch import Tensor

from prw.testing.invariant import Invariant, check, draw, near, require, same_bits
from prw.testing.strategies import AWKWARD_SHAPES, shapes
from prw_kernels.routed_lora import reference

Op: TypeAlias = Callable[..., Sequence[Tensor]]

# Numbers around 1, at most 63 * 24 products each: 1e3 roundings, in units of the dtype's epsilon.
ROUNDINGS = 1e3


@dataclass(frozen=True)
class BackendCase:
    """One situation an implementation is tried in; its numbers follow from the seed.

    Attributes:
        leading: axes of x before D.
        ranks: R of the experts, one each.
        width: D.
        sizes: O of the projections.
        per_sample: one choice per sample, not per token.
        choice: random, or everything goes to the first or the last expert.
        layout: strides of x.
        alike: all experts have one scaling.
        gated: whether there is a gate; without it the gate is 1.
        dtype: of everything but the gate, which is at least fp32.
        seed: of all numbers.
    """

    leading: tuple[int, ...]
    ranks: tuple[int, ...] = (3, 3)
    width: int = 5
    sizes: tuple[int, ...] = (4,)
    per_sample: bool = False
    choice: Literal["random", "first", "last"] = "random"
    layout: Literal["contiguous", "transposed", "sliced", "expanded"] = "contiguous"
    alike: bool = True
    gated: bool = True
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def begin(self, device: str | torch.device = "cpu") -> Given:
        """The arguments of ``routed_lora``, every float a leaf that wants a gradient."""
        random = torch.Generator().manual_seed(self.seed)

        def leaf(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return draw(random, *shape).to(device, dtype).requires_grad_()

        count = len(self.ranks)
        x = self._laid_out(leaf(*self.leading, self.width).detach()).requires_grad_()
        chosen = self.leading[:1] if self.per_sample else self.leading
        expert = torch.randint(0, count, chosen, generator=random).to(device)
        if self.choice != "random":
            expert.fill_(0 if self.choice == "first" else count - 1)
        gate_dtype = torch.promote_types(self.dtype, torch.float32)
        return Given(
            [leaf(*self.leading, size) for size in self.sizes],
            x,
            [[leaf(rank, self.width) for rank in self.ranks] for _ in self.sizes],
            [[leaf(size, rank) for rank in self.ranks] for size in self.sizes],
            [[2.0 if self.alike else 2.0 / (e + 1) for e in range(count)] for _ in self.sizes],
            expert,
            leaf(*chosen, dtype=gate_dtype) if self.gated else None,
        )

    def _laid_out(self, x: Tensor) -> Tensor:
        """The same values, or for ``expanded`` those of the first sample, with other strides."""
        if self.layout == "transposed":
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        if self.layout == "sliced":
            return torch.stack([x, x], dim=-1)[..., 0]
        if self.layout == "expanded" and x.shape[0]:
            return x[:1].expand(x.shape)
        return x


@dataclass(frozen=True)
class Given:
    """The arguments of ``routed_lora``."""

    results: list[Tensor]
    x: Tensor
    A: list[list[Tensor]]
    B: list[list[Tensor]]
    scaling: list[list[float]]
    expert: Tensor
    gate: Tensor | None

    def run(self, op: Op) -> tuple[Tensor, ...]:
        """What the implementation makes of them."""
        given = self.results, self.x, self.A, self.B, self.scaling, self.expert, self.gate
        return tuple(op(*given))

    def truth(self) -> tuple[Given, tuple[Tensor, ...]]:
        """The same values in fp64, and what the reference makes of them."""

        def exact(value: Any) -> Any:
            if isinstance(value, list):
                return [exact(item) for item in value]
            return value.detach().double().requires_grad_()

        twin = replace(
            self,
            results=exact(self.results),
            x=exact(self.x),
            A=exact(self.A),
            B=exact(self.B),
            gate=None if self.gate is None else exact(self.gate),
        )
        deltas = reference(twin.x, twin.A, twin.B, twin.scaling, twin.expert, twin.gate)
        return twin, tuple(r + d for r, d in zip(twin.results, deltas, strict=True))

    def leaves(self) -> dict[str, Tensor]:
        """Everything that wants a gradient, by name."""
        found = {"x": self.x} | ({} if self.gate is None else {"gate": self.gate})
        found |= {f"results[{p}]": result for p, result in enumerate(self.results)}
        for p, e in itertools.product(range(len(self.A)), range(len(self.A[0]))):
            found |= {f"A[{p}][{e}]": self.A[p][e], f"B[{p}][{e}]": self.B[p][e]}
        return found

    def gradients(self, outputs: Sequence[Tensor]) -> dict[str, Tensor | None]:
        """Of a weighted sum of the outputs by every leaf; None where none arrives."""
        random = torch.Generator().manual_seed(1)
        weights = [draw(random, *y.shape).to(y.device, y.dtype) for y in outputs]
        leaves = self.leaves()
        found = torch.autograd.grad(outputs, list(leaves.values()), weights, allow_unused=True)
        return dict(zip(leaves, found, strict=True))


@dataclass(frozen=True)
class Backend:
    """An implementation and where it runs."""

    op: Op
    device: str | torch.device


def _tolerance(dtype: torch.dtype) -> float:
    return ROUNDINGS * torch.finfo(dtype).eps if dtype.itemsize > 2 else 8 * torch.finfo(dtype).eps


def _typed(backend: Backend, case: BackendCase) -> None:
    given = case.begin(backend.device)
    outputs = given.run(backend.op)
    require(len(outputs) == len(given.results), f"{len(outputs)} outputs")
    for found, result in zip(outputs, given.results, strict=True):
        require(
            found.shape == result.shape and found.dtype == result.dtype,
            f"an output {found.dtype} {list(found.shape)} for a result {result.dtype} "
            f"{list(result.shape)}",
        )


def _forward(backend: Backend, case: BackendCase) -> None:
    given = case.begin(backend.device)
    _, wanted = given.truth()
    for p, found in enumerate(given.run(backend.op)):
        near(found, wanted[p], _tolerance(case.dtype), f"output {p} beside the reference")


def _gradients(backend: Backend, case: BackendCase) -> None:
    given = case.begin(backend.device)
    twin, outputs = given.truth()
    wanted = twin.gradients(outputs)
    for name, found in given.gradients(given.run(backend.op)).items():
        exact = wanted[name]
        if found is None:
            require(exact is None or not bool(exact.any()), f"no gradient reaches {name}")
        else:
            exact = torch.zeros_like(found) if exact is None else exact
            near(found, exact, _tolerance(case.dtype), f"gradient of {name} beside the reference")


def _starving(backend: Backend, case: BackendCase) -> None:
    given = case.begin(backend.device)
    for name, found in given.gradients(given.run(backend.op)).items():
        require(found is not None, f"the gradient of {name} is absent instead of zero")


def _strides(backend: Backend, case: BackendCase) -> None:
    given = case.begin(backend.device)
    plain = replace(given, x=given.x.detach().contiguous().requires_grad_())
    outputs, wanted = given.run(backend.op), plain.run(backend.op)
    for p, (found, exact) in enumerate(zip(outputs, wanted, strict=True)):
        near(found, exact, _tolerance(case.dtype), f"output {p} beside that of a contiguous x")


def _pure(backend: Backend, case: BackendCase) -> None:
    given = case.begin(backend.device)
    before = {name: leaf.detach().clone() for name, leaf in given.leaves().items()}
    first, second = given.run(backend.op), given.run(backend.op)
    for p, (one, two) in enumerate(zip(first, second, strict=True)):
        same_bits(two.detach(), one.detach(), f"output {p} of the second evaluation")
    for name, leaf in given.leaves().items():
        same_bits(leaf.detach(), before[name], f"{name} afterwards")


BackendInvariant: TypeAlias = Invariant[Backend, BackendCase]

BACKEND_INVARIANTS: tuple[BackendInvariant, ...] = (
    Invariant("outputs", "every output has the shape and dtype of its result", _typed),
    Invariant("purity", "the same arguments give the same bits and are not changed", _pure),
    Invariant("strides", "the strides of x do not matter", _strides),
    Invariant("forward", "every output is that of the reference", _forward),
    Invariant("gradients", "every gradient is that of the reference", _gradients),
    Invariant("starving expert", "a factor that nobody chose gets zeros, not nothing", _starving),
)
"""The promises of an implementation, in the order in which `check_backend` tries them."""


def backend_cases(
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64),
) -> st.SearchStrategy[BackendCase]:
    """Situations to try an implementation in, the simplest first."""
    rank = st.sampled_from([1, 3, 24])
    alike = st.tuples(rank, st.integers(1, 4)).map(lambda pair: (pair[0],) * pair[1])
    return st.builds(
        BackendCase,
        leading=shapes(),
        ranks=st.one_of(alike, st.lists(rank, min_size=1, max_size=3).map(tuple)),
        width=st.sampled_from([1, 5, 16]),
        sizes=st.lists(st.sampled_from([1, 4, 7]), min_size=1, max_size=2).map(tuple),
        per_sample=st.booleans(),
        choice=st.sampled_from(["random", "first", "last"]),
        layout=st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]),
        alike=st.booleans(),
        gated=st.booleans(),
        dtype=st.sampled_from(list(dtypes)),
        seed=st.integers(0, 2**16),
    )


def check_backend(
    op: Op,
    *,
    device: str | torch.device = "cpu",
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64),
    examples: int = 60,
) -> None:
    """Try whether an implementation of routed LoRA is the reference, forward and every gradient.

    Every invariant is tried on drawn cases and besides on every one of `AWKWARD_SHAPES`, per token
    and per sample.

    Args:
        op: with the positional arguments of `prw_kernels.routed_lora`.
        device: where it runs.
        dtypes: of the inputs.
        examples: how many drawn cases each invariant of `BACKEND_INVARIANTS` is tried on.

    Raises:
        BrokenInvariant: one does not hold; the message names it and the smallest situation found.
    """
    label = getattr(op, "__name__", type(op).__name__)
    always = [
        BackendCase(leading, per_sample=per_sample, dtype=dtypes[0])
        for leading, per_sample in itertools.product(AWKWARD_SHAPES, (False, True))
    ]
    cases = backend_cases(dtypes)
    check(Backend(op, device), label, BACKEND_INVARIANTS, cases, examples, always=always)
