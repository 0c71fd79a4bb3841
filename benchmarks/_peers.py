"""The same layer by ours and by others: a frozen linear and the routed residual, with gradients.

Every variant includes the base, because that is what a user waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._shapes import Shape
from prw_kernels import routed_linear
from prw_kernels.routed_lora import reference

SCALING = 2.0
PIECE = 4096


class Problem:
    """Random factors, and one batch at a time in the same memory (so that graphs can replay)."""

    def __init__(self, shape: Shape, device: str) -> None:
        self.shape, self.device = shape, device
        # The device's own: 2e8 numbers of a CPU per round would take longer than what is timed.
        self.random = torch.Generator(device).manual_seed(0)
        T, D, R, N = shape.tokens, shape.width, shape.rank, shape.experts
        sides = range(shape.projections)
        self.W = [self._draw(D, D) / D**0.5 for _ in sides]
        self.A = [[self._draw(R, D) / D**0.5 for _ in range(N)] for _ in sides]
        self.B = [[self._draw(D, R) / R**0.5 for _ in range(N)] for _ in sides]
        for factors in (*self.A, *self.B):
            for factor in factors[-shape.learning :]:
                factor.requires_grad_()
        lead = (8, T // 8) if shape.skew == "sample" else (T,)
        self.x = self._draw(*lead, D).requires_grad_()
        self.dy = [self._draw(*lead, D) for _ in sides]
        self.expert = shape.choices(self.random)
        self.gate = torch.rand(self.expert.shape, device=device).requires_grad_()
        self.scaling = [[SCALING] * N for _ in sides]

    def _draw(self, *size: int) -> Tensor:
        drawn = torch.randn(size, generator=self.random, device=self.device)
        return drawn.to(self.shape.kind)

    @torch.no_grad()
    def refresh(self) -> None:
        """Another batch, another routing."""
        self.x.copy_(self._draw(*self.x.shape))
        self.expert.copy_(self.shape.choices(self.random))
        self.gate.uniform_(generator=self.random)

    def leaves(self) -> list[Tensor]:
        """What wants a gradient."""
        factors = [f for side in (self.A, self.B) for of in side for f in of if f.requires_grad]
        return [self.x, self.gate, *factors]

    def weight(self, index: Tensor) -> Tensor:
        """Scaling times gate of some units, against their rows."""
        return (SCALING * self.gate[index]).view(-1, *[1] * (self.x.dim() - 1))

    def spread(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows ``[T, D]``, and an expert and a gate for each."""
        rows = self.x.flatten(0, -2)
        each = rows.shape[0] // self.expert.shape[0]
        return rows, self.expert.repeat_interleave(each), self.gate.repeat_interleave(each)


def base(p: Problem) -> list[Tensor]:
    """The frozen linears alone."""
    return [F.linear(p.x, W) for W in p.W]


def ours(p: Problem) -> Sequence[Tensor]:
    """The package's operation, as a layer calls it: where kernels run, the base is part of it."""
    nothing = [None] * len(p.W)
    return routed_linear(p.x, p.W, nothing, p.A, p.B, p.scaling, p.expert, p.gate)


def loop(p: Problem) -> list[Tensor]:
    """PEFT's `_mixed_batch_forward` with index tensors instead of lists."""
    outputs = base(p)
    for e in range(p.shape.experts):
        index = (p.expert == e).nonzero()[:, 0]
        if not len(index):
            continue  # PEFT visits the adapters of the batch only
        part, weight = p.x[index], p.weight(index)
        for y, A, B in zip(outputs, p.A, p.B, strict=True):
            y[index] += (F.linear(F.linear(part, A[e]), B[e]) * weight).to(y.dtype)
    return outputs


def tuned_loop(p: Problem) -> list[Tensor]:
    """The same with `index_select` and `index_add_`, which PEFT does not use."""
    outputs = base(p)
    for e in range(p.shape.experts):
        index = (p.expert == e).nonzero()[:, 0]
        if not len(index):
            continue
        part, weight = p.x.index_select(0, index), p.weight(index)
        for y, A, B in zip(outputs, p.A, p.B, strict=True):
            y.index_add_(0, index, (F.linear(F.linear(part, A[e]), B[e]) * weight).to(y.dtype))
    return outputs


def dense(p: Problem) -> list[Tensor]:
    """X-LoRA: every expert on every token, its input scaled by the routing weight."""
    rows, expert, gate = p.spread()
    outputs = [y.flatten(0, -2) for y in base(p)]
    for e in range(p.shape.experts):
        scaled = rows * torch.where(expert == e, gate, 0.0)[:, None].to(rows.dtype)
        outputs = [
            y + F.linear(F.linear(scaled, A[e]), B[e]) * SCALING
            for y, A, B in zip(outputs, p.A, p.B, strict=True)
        ]
    return [y.view(p.x.shape) for y in outputs]


def grouped(p: Problem) -> list[Tensor]:
    """Sorted rows and `grouped_mm`, differentiated by autograd."""
    rows, expert, gate = p.spread()
    key, order = torch.sort(expert, stable=True)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=rows.device))
    last = torch.arange(1, p.shape.experts + 1, device=rows.device)
    ends = torch.searchsorted(key, last).to(torch.int32)
    part, weight = rows.index_select(0, order), (SCALING * gate.index_select(0, order))[:, None]
    found = []
    for y, A, B in zip(base(p), p.A, p.B, strict=True):
        h = (F.grouped_mm(part, torch.stack(A).mT, offs=ends) * weight).to(rows.dtype)
        delta = F.grouped_mm(h, torch.stack(B).mT, offs=ends).index_select(0, back)
        found.append(y + delta.view(y.shape))
    return found


class Plain:
    """One LoRA for every token, of the peft library where that is installed."""

    def __init__(self, p: Problem) -> None:
        try:
            self.layers: list[nn.Module] = [_peft(W, A[-1], B[-1]) for W, A, B in
                                            zip(p.W, p.A, p.B, strict=True)]  # fmt: skip
            self.name = "peft"
        except ImportError:
            pairs = zip(p.W, p.A, p.B, strict=True)
            self.layers = [_Lora(W, A[-1], B[-1]) for W, A, B in pairs]
            self.name = "F.linear"

    def __call__(self, p: Problem) -> list[Tensor]:
        """Outputs of the projections."""
        return [layer(p.x) for layer in self.layers]

    def leaves(self, p: Problem) -> list[Tensor]:
        """What wants a gradient."""
        factors = [f for layer in self.layers for f in layer.parameters() if f.requires_grad]
        return [p.x, *factors]


class _Lora(nn.Module):
    def __init__(self, W: Tensor, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.W = W
        self.A, self.B = nn.Parameter(A.detach().clone()), nn.Parameter(B.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.W) + F.linear(F.linear(x, self.A), self.B) * SCALING


def _peft(W: Tensor, A: Tensor, B: Tensor) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    frozen = nn.Linear(W.shape[1], W.shape[0], bias=False, device=W.device, dtype=W.dtype)
    frozen.weight.data.copy_(W)
    rank = A.shape[0]
    config = LoraConfig(r=rank, lora_alpha=int(SCALING * rank), target_modules=["0"])
    model = inject_adapter_in_model(config, nn.Sequential(frozen))
    layer: nn.Module = model[0]  # type: ignore[index,assignment]
    for side, value in ((layer.lora_A, A), (layer.lora_B, B)):
        weight = side["default"].weight  # type: ignore[index,union-attr]
        weight.data = value.detach().clone()
    return layer


ROUTED: dict[str, Callable[[Problem], Sequence[Tensor]]] = {
    "ours": ours, "loop": loop, "tuned": tuned_loop, "dense": dense, "grouped": grouped,
}  # fmt: skip


def gradients(outputs: Sequence[Tensor], p: Problem, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Of the outputs against the batch's own weights."""
    return torch.autograd.grad(list(outputs), leaves, p.dy, materialize_grads=True)


def truth(p: Problem) -> list[Tensor]:
    """Outputs and gradients by the reference in fp64, on the same numbers.

    In pieces of `PIECE` tokens, because the reference keeps the outputs of every expert.
    """
    size = max(1, PIECE * len(p.x) // p.shape.tokens)
    pieces = [_exact(p, slice(i, i + size)) for i in range(0, len(p.x), size)]
    by_rows = p.shape.projections + 2  # outputs, and the gradients of x and of the gate
    parts = list(zip(*pieces, strict=True))
    return [torch.cat(part) for part in parts[:by_rows]] + [sum(part) for part in parts[by_rows:]]


def _exact(p: Problem, rows: slice) -> list[Tensor]:
    """`truth` of some rows alone."""
    twin = Problem.__new__(Problem)
    twin.__dict__.update(p.__dict__)

    def exact(value: Tensor) -> Tensor:
        return value.detach().double().requires_grad_(value.requires_grad)

    twin.x, twin.gate, twin.W = exact(p.x[rows]), exact(p.gate[rows]), [exact(W) for W in p.W]
    twin.A, twin.B = ([[exact(f) for f in of] for of in side] for side in (p.A, p.B))
    twin.dy, twin.expert = [exact(dy[rows]) for dy in p.dy], p.expert[rows]
    deltas = reference(twin.x, twin.A, twin.B, twin.scaling, twin.expert, twin.gate)
    outputs = [y + delta for y, delta in zip(base(twin), deltas, strict=True)]
    return [y.detach() for y in outputs] + list(gradients(outputs, twin, twin.leaves()))


def error(p: Problem, way: Callable[[Problem], Sequence[Tensor]], exact: list[Tensor]) -> float:
    """The largest error of outputs and gradients, each relative to its largest value."""
    outputs = way(p)
    found = [*(y.detach() for y in outputs), *gradients(outputs, p, p.leaves())]
    return max(
        float((mine.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9))
        for mine, wanted in zip(found, exact, strict=True)
    )


def saved_bytes(p: Problem, run: Callable[[], object]) -> int:
    """Bytes that a forward keeps for its backward, weights and factors left out."""
    known = {t.untyped_storage().data_ptr() for t in (*p.W, *p.leaves()[2:])}
    known |= {f.untyped_storage().data_ptr() for side in (p.A, p.B) for of in side for f in of}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = run()
    del outputs
    return sum(kept.values())
