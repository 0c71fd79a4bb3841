"""What a routed LoRA costs beside one plain LoRA, forward and backward, K and V together.

    python -m benchmarks.kernels [--device cpu|cuda] [--quick] [--json FILE]

``plain``       one LoRA pair on every sample, without routing: the floor
``per_sample``  one expert per sample, gathered factors, written backward
``autograd``    the same batched products, differentiated by autograd
``reference``   every expert on every token

One of the experts learns, as in a stage. Outputs and every gradient are compared with the reference
in fp64 before anything is timed: a wrong result has no speed.

Shapes: B samples, T tokens, D input and output width, E experts, R rank.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._common import interleaved, machine, parser, spread
from prw_kernels.routed_lora.per_sample import per_sample
from prw_kernels.routed_lora.reference import reference

Deltas = Callable[["Problem"], list[Tensor]]


class Problem:
    """Random factors of E experts for two projections, and one batch."""

    def __init__(self, shape: tuple[int, int, int, int, int], device: str, dtype: torch.dtype):
        torch.manual_seed(0)
        samples, tokens, width, experts, rank = shape
        options = {"device": device, "dtype": dtype}
        self.A = [[torch.randn(rank, width, **options) / width**0.5 for _ in range(experts)]
                  for _ in "kv"]  # fmt: skip
        self.B = [[torch.randn(width, rank, **options) / rank**0.5 for _ in range(experts)]
                  for _ in "kv"]  # fmt: skip
        self.expert_B = torch.arange(samples, device=device) % experts
        self.weight_B = torch.rand(samples, **options).requires_grad_()
        self.x_BTD = torch.randn(samples, tokens, width, **options).requires_grad_()
        self.grad_BTO = torch.randn(samples, tokens, width, **options)
        self.leaves = [self.x_BTD, self.weight_B]
        self.leaves += [side[p][-1].requires_grad_() for side in (self.A, self.B) for p in (0, 1)]


def plain(given: Problem) -> list[Tensor]:
    """The newest expert for every sample."""
    weight_B11 = given.weight_B[:, None, None]
    return [F.linear(F.linear(given.x_BTD, A[-1]), B[-1]) * weight_B11
            for A, B in zip(given.A, given.B, strict=True)]  # fmt: skip


def gathered(given: Problem) -> list[Tensor]:
    """The package's operation."""
    return per_sample(given.x_BTD, given.A, given.B, given.expert_B, given.weight_B)


def autograd(given: Problem) -> list[Tensor]:
    """The same products without a backward of our own."""
    found = []
    for A, B in zip(given.A, given.B, strict=True):
        A_BRD, B_BOR = (torch.stack(side)[given.expert_B] for side in (A, B))
        h_BTR = torch.bmm(given.x_BTD, A_BRD.mT)
        found.append(torch.bmm(h_BTR, B_BOR.mT) * given.weight_B[:, None, None])
    return found


def masked(given: Problem) -> list[Tensor]:
    """The reference."""
    ones = [[1.0] * len(given.A[0])] * 2
    return reference(given.x_BTD, given.A, given.B, ones, given.expert_B, given.weight_B)


WAYS: dict[str, Deltas] = {
    "plain": plain, "per_sample": gathered, "autograd": autograd, "reference": masked,
}  # fmt: skip


def gradients(given: Problem, way: Deltas) -> tuple[Tensor, ...]:
    """Forward and backward; gradients of the leaves."""
    outputs = way(given)
    return torch.autograd.grad(outputs, given.leaves, [given.grad_BTO] * len(outputs))


def wrong(shape: tuple[int, int, int, int, int], device: str) -> str:
    """Which way differs from the reference in fp64; "" for none."""
    given = Problem(shape, device, torch.float64)
    truth = [*masked(given), *gradients(given, masked)]
    for name in ("per_sample", "autograd"):
        found = [*WAYS[name](given), *gradients(given, WAYS[name])]
        for ours, theirs in zip(found, truth, strict=True):
            scale = theirs.abs().max().clamp(min=1)
            if not (ours - theirs).abs().max() / scale < 1e-10:  # sums of some 1,000 terms in fp64
                return f"{name} differs from the reference"
    return ""


def main(arguments: list[str] | None = None) -> int:
    """Check, time, print; 1 where a result is wrong."""
    found = parser("kernels", __doc__ or "")
    args = found.parse_args(arguments)
    shape = (48, 36, 128, 5, 32) if args.device == "cpu" else (8, 1024, 3072, 5, 128)
    problem = wrong((4, 9, 24, 3, 4), args.device)
    if problem:
        print(f"no times: {problem}", file=sys.stderr)
        return 1
    given = Problem(shape, args.device, torch.float32 if args.device == "cpu" else torch.bfloat16)
    variants: dict[str, Callable[[], object]] = {}
    for name, way in WAYS.items():
        variants[f"{name} forward"] = lambda way=way: way(given)
        variants[f"{name} forward+backward"] = lambda way=way: gradients(given, way)
    rounds = 10 if args.quick else 80
    seconds = interleaved(variants, rounds=rounds, warmup=3, device=args.device)
    result = {
        "benchmark": "kernels",
        **machine(args.device),
        "shape": dict(zip(("samples", "tokens", "width", "experts", "rank"), shape, strict=True)),
        "dtype": str(given.x_BTD.dtype),
        "rounds": rounds,
        "variants": {name: spread(values) for name, values in seconds.items()},
    }
    tell(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return 0


def tell(result: dict[str, object]) -> None:
    """For people: times, and how many plain LoRAs that is."""
    print("  ".join(f"{name} {result[name]}" for name in
                    ("device", "threads", "torch", "commit", "shape", "dtype")))  # fmt: skip
    variants = result["variants"]
    assert isinstance(variants, dict)
    for name, value in variants.items():
        floor = variants[f"plain {name.partition(' ')[2]}"]["median_ms"]
        print(f"{name:>28}  {value['median_ms']:8.2f} ms  [{value['p20_ms']:.2f}, "
              f"{value['p80_ms']:.2f}]  {value['median_ms'] / floor:.2f} x")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
