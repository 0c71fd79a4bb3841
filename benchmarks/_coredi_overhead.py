"""What a feature stream adds to a training step: CPU time, interleaved."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from benchmarks._common import interleaved, spread
from benchmarks._coredi_course import new_transformer
from prw_flux.arithmetic import arithmetic
from prw_flux.coredi import CoReDi, CoReDiConfig
from prw_flux.coredi.stream import joined
from prw_flux.encode import position_ids
from prw_flux.flow import flow_loss

SHAPES = {
    "width 128, 36 tokens": (128, 3, 32, 36),
    "width 512, 256 tokens": (512, 2, 2, 256),
}
"""Width, single blocks, batch, tokens."""


def overhead(config: CoReDiConfig, quick: bool) -> dict[str, Any]:
    """A training step without features, with merged and with separate tokens; at two widths.

    Of the step with features that is: projection, noise, stream, losses. Features of the encoder
    are encoded once and kept, as in the trainer, and are not part of it.
    """
    found: dict[str, Any] = {}
    for label, sizes in ({"tiny": (32, 1, 4, 36)} if quick else SHAPES).items():
        runs = dict(_steps(config, *sizes))
        seconds = interleaved(runs, rounds=3 if quick else 7, warmup=1, device="cpu",
                              clock=time.process_time)  # fmt: skip
        stock = torch.tensor(seconds["no features"], dtype=torch.float64)
        for name, values in seconds.items():
            ratios = torch.tensor(values, dtype=torch.float64) / stock
            found[f"step, {name}, {label}"] = {
                **spread(values), "of_no_features": round(float(ratios.median()), 4)
            }  # fmt: skip
    return found


def _steps(
    config: CoReDiConfig, width: int, single: int, batch: int, tokens: int
) -> Iterator[tuple[str, Any]]:
    """A training step of each variant: all weights learn."""
    side = int(tokens**0.5)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, tokens, 64, generator=generator)
    features = torch.randn(64, side, side, 512, generator=generator)
    texts = torch.randn(batch, 32, 128, generator=generator)
    pooled, times = torch.randn(batch, 64, generator=generator), torch.full((batch,), 0.5)

    for name in ("no features", "merged", "separate"):
        model = new_transformer(width, single)
        coredi = None
        if name != "no features":
            coredi = CoReDi.for_transformer(model, replace(config, tokens=name), 512)
            coredi.projection.fit(features)
        learners = [*model.parameters(), *(coredi.learners() if coredi else [])]
        optimizer = torch.optim.AdamW(learners, lr=1e-4, fused=True)

        def step(model: Any = model, coredi: Any = coredi, optimizer: Any = optimizer) -> None:
            given = {
                "hidden_states": latents, "encoder_hidden_states": texts, "timestep": times,
                "pooled_projections": pooled, "img_ids": position_ids(side, side),
                "txt_ids": torch.zeros(32, 3), "return_dict": False,
            }  # fmt: skip
            optimizer.zero_grad()
            with arithmetic("cpu", "bf16"):
                if coredi is None:
                    total = flow_loss(model(**given)[0], latents, texts.new_zeros(latents.shape))
                else:
                    noised = coredi.noised(features[:batch], (side, side), times)
                    with joined(model, coredi.stream, noised.noisy_BTF) as joint:
                        velocity = model(**given)[0]
                    total = flow_loss(velocity, latents, texts.new_zeros(latents.shape))
                    total = total + sum(coredi.loss(joint.velocity_BTF, noised))
                total.backward()
            optimizer.step()

        yield name, step
