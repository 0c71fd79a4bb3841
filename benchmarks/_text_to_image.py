"""Text to image through an attached pipeline beside stock FluxPipeline, in pairs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import Tensor, nn

from benchmarks._common import interleaved, spread
from benchmarks._flux import Inputs
from prw_flux import CoLoGenPipeline, PRWAdapter

STEPS = 2


def pipelines(
    model: FluxTransformer2DModel, adapter: PRWAdapter
) -> tuple[FluxPipeline, CoLoGenPipeline, float]:
    """Both on the same weights, the stock one with stock processors; seconds that attaching took.

    Embeddings go in and latents come out, so neither has text encoders and no image is decoded.
    """
    with torch.device("meta"):
        stock = FluxTransformer2DModel.from_config(model.config)
    stock.load_state_dict(model.state_dict(), assign=True)
    vae = AutoencoderTiny(
        latent_channels=16,
        encoder_block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4, 4),
    )
    nn.Module.to(vae, model.device, model.dtype)  # a pipeline runs where its first part is
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": vae,
        **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    }
    plain = FluxPipeline(transformer=stock.eval(), **parts)
    bare = FluxPipeline(transformer=model, **parts)
    started = time.perf_counter()
    ours = CoLoGenPipeline.from_pipe(bare, prw=adapter)
    took = time.perf_counter() - started
    for pipe in (plain, ours):
        pipe.set_progress_bar_config(disable=True)
    return plain, ours, took


def latents(pipe: Any, given: Inputs, pixels: int) -> Tensor:
    """A short generation."""
    found: Tensor = pipe(
        prompt_embeds=given.text_BLE, pooled_prompt_embeds=given.pooled_BP,
        latents=given.noisy_BNC, height=pixels, width=pixels, num_inference_steps=STEPS,
        output_type="latent", max_sequence_length=given.text_BLE.shape[1],
    ).images  # fmt: skip
    return found


def text_to_image(
    model: FluxTransformer2DModel,
    adapter: PRWAdapter,
    given: Inputs,
    *,
    rounds: int,
    device: str,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """Times of both, and the median of ours over stock.

    Raises:
        ArithmeticError: the two do not agree in every bit.
    """
    pixels = 16 * int(given.noisy_BNC.shape[1] ** 0.5)
    plain, ours, took = pipelines(model, adapter)
    runs = {
        name: partial(latents, pipe, given, pixels)
        for name, pipe in (("stock", plain), ("attached", ours))
    }
    if not torch.equal(runs["stock"](), runs["attached"]()):
        raise ArithmeticError("text to image through the attached pipeline is not stock")
    seconds = interleaved(
        runs, rounds=rounds, warmup=1, device=device, clock=clock, fresh=lambda: None
    )
    ratios = [a / b for a, b in zip(seconds["attached"], seconds["stock"], strict=True)]
    return {
        "pairs": rounds,
        "steps": STEPS,
        "pixels": pixels,
        "attach_s": round(took, 4),
        "variants": {name: spread(values) for name, values in seconds.items()},
        "ratio_of_medians": round(
            statistics.median(seconds["attached"]) / statistics.median(seconds["stock"]), 4
        ),
        "median_of_ratios": round(statistics.median(ratios), 4),
    }
