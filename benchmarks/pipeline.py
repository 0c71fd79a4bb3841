"""What a source image costs: one denoising step of a FLUX transformer, five ways.

    python -m benchmarks.pipeline [--device cpu|cuda] [--size tiny|mid] [--quick] [--json FILE]

``text``     text to image, the stock transformer
``joint``    source tokens beside the noisy ones in the stock transformer, as Kontext does
``current``  source pass and main pass in every step (`source_timestep="current"`)
``cached``   main pass on recorded keys and values (`source_timestep="zero"`)
``source``   the source pass that is recorded once

Before anything is timed, both passes must give the velocity of one joint attention in which the
source sees only itself (in fp64, where the two agree to rounding), the cache the bits of a fresh
recording, and every variant a finite velocity that the source changes: a wrong result has no speed.

Shapes: B samples, N noisy, S source and L text tokens, C packed latent channels.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from benchmarks._common import interleaved, machine, parser, spread
from prw_flux import PRWAdapter
from prw_flux.attach import attach
from prw_flux.encode import position_ids
from prw_flux.passes import main_pass, source_pass

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"num_layers": 2, "num_single_layers": 6, "attention_head_dim": 32,
             "num_attention_heads": 4, "axes_dims_rope": (8, 12, 12)},
    "mid": {"num_layers": 2, "num_single_layers": 4, "attention_head_dim": 64,
            "num_attention_heads": 12, "axes_dims_rope": (8, 28, 28)},
}  # fmt: skip
"""Random weights: the shape of tiny-flux, and a wider one."""
EXPERTS = 5


@dataclass(frozen=True)
class Inputs:
    """One denoising step: latents, positions, text, times."""

    noisy_BNC: Tensor
    source_BSC: Tensor
    ids_N3: Tensor
    text_BLE: Tensor
    pooled_BP: Tensor
    time_B: Tensor


def main(arguments: list[str] | None = None) -> int:
    """Check, time, print; 1 where a result is wrong."""
    found = parser("pipeline", __doc__ or "")
    found.add_argument("--size", choices=tuple(SIZES), default="mid")
    found.add_argument("--steps", type=int, default=28, help="of the generation that is summed up")
    args = found.parse_args(arguments)
    grid, rounds, warmup = (16, 5, 1) if args.quick else (32, 15, 3)
    with torch.inference_mode():
        model, adapter = build(args.size, args.device)
        given = draw(model, grid, args.device)
        variants = five_ways(model, adapter, given)
        problem = wrong(model, adapter, given, variants)
        if problem:
            print(f"no times: {problem}", file=sys.stderr)
            return 1
        seconds = interleaved(variants, rounds=rounds, warmup=warmup, device=args.device)
    result = {
        "benchmark": "pipeline",
        **machine(args.device),
        "size": args.size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "pixels": 16 * grid,
        "experts": EXPERTS,
        "dtype": str(model.dtype),
        "rounds": rounds,
        "variants": {name: spread(values) for name, values in seconds.items()},
        "steps": args.steps,
        "generation_over_text": generation(seconds, args.steps),
    }
    tell(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return 0


def build(size: str, device: str) -> tuple[FluxTransformer2DModel, PRWAdapter]:
    """A random transformer and an adapter of five experts that all do something."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=64, joint_attention_dim=256, pooled_projection_dim=128,
        guidance_embeds=True, **SIZES[size],
    )  # fmt: skip
    adapter = PRWAdapter.for_transformer(model, rank=16)
    for stage in range(EXPERTS):
        adapter.weave.unlock(f"stage-{stage}")
        for parameter in adapter.weave.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    adapter.weave.close()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.nn.Module.to(model, device, dtype)  # diffusers' own would warn of the cast
    torch.nn.Module.to(adapter, device, dtype)  # routers stay wide
    attach(model.eval(), adapter.eval())
    return model, adapter


def draw(model: FluxTransformer2DModel, grid: int, device: str) -> Inputs:
    """Random inputs of one sample with as many source as noisy tokens, and 64 text tokens."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape).to(device, model.dtype)

    return Inputs(
        normal(1, grid * grid, 64), normal(1, grid * grid, 64),
        position_ids(grid, grid, device=device), normal(1, 64, 256), normal(1, 128),
        torch.full((1,), 0.5, device=device),
    )  # fmt: skip


def five_ways(
    model: FluxTransformer2DModel, adapter: PRWAdapter, given: Inputs
) -> dict[str, Callable[[], Any]]:
    """One step each, returning the velocity; ``source`` returns the cache."""
    zero = torch.zeros_like(given.time_B)

    def record(time_B: Tensor) -> Any:
        return source_pass(model, given.source_BSC, given.ids_N3, given.pooled_BP, time_B)

    def velocity(cache: Any) -> Tensor:
        return main_pass(model, given.noisy_BNC, given.ids_N3, given.text_BLE, None,
                         given.pooled_BP, given.time_B, cache=cache)  # fmt: skip

    def joint() -> Tensor:
        both_B2NC = torch.cat([given.noisy_BNC, given.source_BSC], 1)
        marked_N3 = given.ids_N3 + torch.tensor([1.0, 0.0, 0.0], device=given.ids_N3.device)
        out: Tensor = model(
            hidden_states=both_B2NC, encoder_hidden_states=given.text_BLE,
            pooled_projections=given.pooled_BP, timestep=given.time_B,
            img_ids=torch.cat([given.ids_N3, marked_N3]),
            txt_ids=given.ids_N3.new_zeros(given.text_BLE.shape[1], 3),
            guidance=torch.ones_like(given.time_B), return_dict=False,
        )[0]  # fmt: skip
        return out[:, : given.noisy_BNC.shape[1]]

    cache = record(zero)
    return {
        "text": lambda: velocity(None),
        "joint": joint,
        "current": lambda: velocity(record(given.time_B)),
        "cached": lambda: velocity(cache),
        "source": lambda: record(zero),
    }


def wrong(
    model: FluxTransformer2DModel,
    adapter: PRWAdapter,
    given: Inputs,
    variants: dict[str, Callable[[], Any]],
) -> str:
    """What is wrong with the results; "" for nothing."""
    for name in ("text", "joint", "current", "cached"):
        if not torch.isfinite(variants[name]()).all():
            return f"the velocity of {name} is not finite"
    fresh = main_pass(model, given.noisy_BNC, given.ids_N3, given.text_BLE, None, given.pooled_BP,
                      given.time_B, cache=variants["source"]())  # fmt: skip
    if not torch.equal(variants["cached"](), fresh):
        return "the cache does not give the bits of a fresh recording"
    if torch.equal(fresh, variants["text"]()):
        return "the source changes nothing"
    apart = distance_to_one_pass()
    return "" if apart < 1e-9 else f"two passes are {apart:.1e} from one masked joint attention"


def distance_to_one_pass() -> float:
    """Two passes against one joint attention under CoLoGen's mask, in fp64 on a small model.

    The stock transformer has no experts, so the adapter here has one whose contribution is zero.
    """
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=256, pooled_projection_dim=128,
        guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    torch.nn.Module.to(model, torch.float64)
    given = draw(model, 4, "cpu")
    text, noisy = given.text_BLE.shape[1], given.noisy_BNC.shape[1]
    count = text + 2 * noisy
    allowed = torch.ones(count, count, dtype=torch.bool)
    allowed[text + noisy :, : text + noisy] = False
    one: Tensor = model(
        hidden_states=torch.cat([given.noisy_BNC, given.source_BSC], 1),
        encoder_hidden_states=given.text_BLE, pooled_projections=given.pooled_BP,
        timestep=given.time_B, img_ids=torch.cat([given.ids_N3, given.ids_N3]),
        txt_ids=given.ids_N3.new_zeros(text, 3), guidance=torch.ones(1),
        joint_attention_kwargs={"attention_mask": allowed[None, None]}, return_dict=False,
    )[0]  # fmt: skip
    adapter = PRWAdapter.for_transformer(model, rank=4).double()
    adapter.weave.unlock("one")
    attach(model, adapter)
    cache = source_pass(model, given.source_BSC, given.ids_N3, given.pooled_BP, given.time_B)
    two = main_pass(model, given.noisy_BNC, given.ids_N3, given.text_BLE, None, given.pooled_BP,
                    given.time_B, cache=cache)  # fmt: skip
    return float((one[:, :noisy] - two).abs().max())


def generation(seconds: dict[str, list[float]], steps: int) -> dict[str, float]:
    """Time of a whole generation over that of text to image: the source is recorded once or never.

    From medians, so that a slow moment of the machine does not count.
    """
    median = {name: spread(values)["median_ms"] for name, values in seconds.items()}
    text = steps * median["text"]
    whole = {
        "joint": steps * median["joint"],
        "current": steps * median["current"],
        "zero, cached": median["source"] + steps * median["cached"],
    }
    return {name: round(value / text, 3) for name, value in whole.items()}


def tell(result: dict[str, Any]) -> None:
    """For people."""
    about = ("device", "threads", "torch", "commit", "size", "parameters", "pixels", "dtype")
    print("  ".join(f"{name} {result[name]}" for name in about))
    for name, value in result["variants"].items():
        print(f"{name:>8}  {value['median_ms']:9.2f} ms a step  "
              f"[{value['p20_ms']:.2f}, {value['p80_ms']:.2f}]")  # fmt: skip
    print(f"a generation of {result['steps']} steps, over text to image:")
    for name, ratio in result["generation_over_text"].items():
        print(f"{name:>14}  {ratio:.2f} x")


if __name__ == "__main__":
    sys.exit(main())
