"""What weaving a transformer costs beside one plain LoRA of PEFT, forward and backward.

    python -m benchmarks.weaving [--device cpu|cuda] [--quick] [--json FILE]

``base``        the frozen transformer, gradients to its input embeddings only
``peft``        one LoRA of stock PEFT on the query and value projections
``reference``   eight woven experts, one choice per token, noise; every expert on every token
``auto``        the same with the fastest implementation that fits
``record``      the same under `Weave.record`, with the veteran gate loss

Random weights in the shape of a small Llama. Before anything is timed, a forced expert must have
the loss and gradients of PEFT's LoRA with the same factors, to the bit on the reference backend,
and ``auto`` those of ``reference``: a wrong result has no speed. On a CPU seconds are those of the
process, so that a machine with other work does not count against anybody.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import prw
from benchmarks._common import head, interleaved, keep, machine, parser, spread

EXPERTS, RANK = 8, 16
TARGETS = ["q_proj", "v_proj"]


def base(width: int, layers: int) -> LlamaForCausalLM:
    """A frozen Llama with random weights."""
    torch.manual_seed(0)
    shape = {"hidden_size": width, "intermediate_size": width * 8 // 3 // 16 * 16}
    config = LlamaConfig(
        **shape, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=8,
        vocab_size=256, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).requires_grad_(False)


def woven(model: nn.Module, backend: str, experts: int = EXPERTS) -> prw.Weave:
    """Weave with experts and routers that are not zero."""
    config = prw.Config(target_modules=TARGETS, rank=RANK, backend=backend)  # type: ignore[arg-type]
    weave = prw.weave(model, config)
    torch.manual_seed(1)
    for index in range(experts):
        weave.unlock(f"s{index}")
        for parameter in weave.parameters():
            nn.init.normal_(parameter, std=0.02)
    return weave


def step(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward of a mean of squares; loss and the gradient of the input."""
    inputs = inputs.detach().requires_grad_()
    loss = model(inputs_embeds=inputs).logits.square().mean()
    loss.backward()
    assert inputs.grad is not None
    return loss.detach(), inputs.grad


def recorded(model: nn.Module, weave: prw.Weave, inputs: Tensor) -> None:
    """A training step with the veteran gate loss."""
    with weave.record(key=1) as record:
        loss = model(inputs_embeds=inputs.detach().requires_grad_()).logits.square().mean()
    (loss + prw.veteran_gate_loss(record, 0.8, 0.5)).backward()


def forget(model: nn.Module) -> None:
    """Drop gradients, so that every step allocates its own."""
    for parameter in model.parameters():
        parameter.grad = None


def plain(model: nn.Module) -> nn.Module:
    """Stock PEFT's LoRA."""
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)
    found: nn.Module = get_peft_model(model, config)
    return found


def wrong(device: str) -> str:
    """What differs from the truth; "" for nothing."""
    model = base(64, 2).to(device)
    inputs = torch.randn(2, 9, 64, device=device)
    theirs, ours = plain(copy.deepcopy(model)), copy.deepcopy(model)
    weave = woven(ours, "reference")
    layers = dict(theirs.named_modules())
    pairs = {name: next(iter(pool.experts[-1].pair(p) for p in pool.projections))
             for name, pool in weave.pools.items()}  # fmt: skip
    for name, (A, B) in pairs.items():
        layer = layers[f"base_model.model.{name}"]
        layer.lora_A["default"].weight.data.copy_(A.data)
        layer.lora_B["default"].weight.data.copy_(B.data)
    truth = step(theirs, inputs)
    with weave.force_route(f"s{EXPERTS - 1}"):
        if not all(map(torch.equal, step(ours, inputs), truth)):
            return "a forced expert differs from PEFT's LoRA"
    for name, (A, _) in pairs.items():
        wanted = layers[f"base_model.model.{name}"].lora_A["default"].weight.grad
        if A.grad is None or not torch.equal(A.grad, wanted):
            return f"the gradient of {name} differs from PEFT's"
    return disagreement(model, inputs)


def disagreement(model: nn.Module, inputs: Tensor) -> str:
    """Where the backends differ by more than rounding: sums of some hundred products in fp32."""
    found = []
    for backend in ("reference", "auto"):
        mine = copy.deepcopy(model)
        weave = woven(mine, backend)
        weave.call(key=1)
        loss, grad = step(mine, inputs)
        found.append([loss, grad, *(p.grad for p in weave.parameters() if p.grad is not None)])
    for ours, theirs in zip(*found, strict=True):
        if not (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max().clamp(min=1e-6):
            return "auto differs from the reference"
    return ""


def main(arguments: list[str] | None = None) -> int:
    """Check, time, print; 1 where a result is wrong."""
    args = parser("weaving", __doc__ or "").parse_args(arguments)
    problem = wrong(args.device)
    if problem:
        print(f"no times: {problem}", file=sys.stderr)
        return 1
    width, layers, tokens = (256, 2, 128) if args.quick else (512, 2, 512)
    model = base(width, layers).to(args.device)
    inputs = torch.randn(1, tokens, width, device=args.device)
    rounds = 3 if args.quick else 20
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    seconds = interleaved(
        variants(model, inputs), rounds=rounds, warmup=2, device=args.device, clock=clock
    )
    result = {
        "benchmark": "weaving",
        **machine(args.device),
        "shape": {"width": width, "layers": layers, "tokens": tokens, "experts": EXPERTS,
                  "rank": RANK, "targets": TARGETS},
        "dtype": "torch.float32",
        "clock": clock.__name__,
        "rounds": rounds,
        "variants": {name: spread(values) for name, values in seconds.items()},
    }  # fmt: skip
    tell(result)
    keep(result, args.json)
    return 0


def variants(model: nn.Module, inputs: Tensor) -> dict[str, Callable[[], object]]:
    """One training step of each kind, on models of their own."""
    peft = plain(copy.deepcopy(model))
    found: dict[str, Callable[[], object]] = {
        "base": lambda: step(model, inputs),
        "peft": lambda: (forget(peft), step(peft, inputs)),
    }
    for backend in ("reference", "auto"):
        mine = copy.deepcopy(model)
        weave = woven(mine, backend)
        weave.call(key=1)
        found[backend] = lambda mine=mine: (forget(mine), step(mine, inputs))
    mine = copy.deepcopy(model)
    weave = woven(mine, "auto")
    found["record"] = lambda: (forget(mine), recorded(mine, weave, inputs))
    return found


def tell(result: dict[str, object]) -> None:
    """For people: times, and how many times one plain LoRA that is."""
    head(result, "shape", "dtype")
    times = result["variants"]
    assert isinstance(times, dict)
    floor = times["peft"]["median_ms"]
    for name, value in times.items():
        print(f"{name:>12}  {value['median_ms']:8.2f} ms  [{value['p20_ms']:.2f}, "
              f"{value['p80_ms']:.2f}]  {value['median_ms'] / floor:.2f} x")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
