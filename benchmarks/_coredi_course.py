"""One arm of `benchmarks.coredi`: a transformer, with or without features, learns a world.

Shapes: B samples, T tokens, C channels of a token, M pictures asked for.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from benchmarks._coredi_worlds import GRID, World
from prw_flux.arithmetic import arithmetic
from prw_flux.batch_order import stable_hash
from prw_flux.coredi import CoReDi, CoReDiConfig, carrying
from prw_flux.coredi.collapse import facts
from prw_flux.coredi.stream import joined
from prw_flux.encode import position_ids
from prw_flux.flow import flow_loss, interpolate, resolution_shift, sample_times
from prw_flux.tiny.autoencoder import warmup_cosine

SHOWN = (1, 4, 8)
"""Training pictures whose projected features become colours."""


@dataclass(frozen=True)
class Size:
    """How long an arm learns, how often it is looked at, and how large its transformer is."""

    steps: int = 200
    batch: int = 32
    looks: int = 8
    sampling: int = 10
    width: int = 128
    single: int = 3


@dataclass(frozen=True, eq=False)
class Course:
    """One arm and seed.

    Every random draw is a function of (seed, step), so that all arms see the same pictures, times
    and noise.
    """

    world: World
    size: Size
    config: CoReDiConfig | None
    seed: int

    def run(self) -> dict[str, Any]:
        """Train; what was seen on the way: "log", "quality" and "maps" by step, CPU time."""
        size = self.size
        model = new_transformer(size.width, size.single, self.world.tokens_NTC.shape[-1], self.seed)
        coredi = self.stream(model)
        optimizers = new_optimizers(model, coredi)
        told: dict[str, Any] = {"log": [], "quality": [], "maps": []}
        if coredi is not None:
            told["maps"].append({"step": 0, "values": colours(self.world, coredi)})
        spent = 0.0
        for step in range(1, size.steps + 1):
            began = time.process_time()
            seen = self._descend(model, coredi, optimizers, step - 1)
            spent += time.process_time() - began
            if step % max(1, size.steps // 40) == 0 or step == 1:
                told["log"].append({"step": step, **seen()})
            if step % max(1, size.steps // size.looks) == 0:
                pictures = self.sample(model, coredi)
                told["quality"].append({"step": step, **self.world.quality(pictures)})
                if coredi is not None:
                    told["maps"].append({"step": step, "values": colours(self.world, coredi)})
        told["cpu_ms_per_step"] = round(1e3 * spent / size.steps, 2)
        return told

    def stream(self, model: FluxTransformer2DModel) -> CoReDi | None:
        """The arm's feature stream, fitted to the features of some pictures."""
        if self.config is None:
            return None
        torch.manual_seed(self.seed)
        features = self.world.features_NRCD
        config = replace(self.config, layout=self.world.layout)
        made = CoReDi.for_transformer(model, config, features.shape[-1])
        made.projection.fit(features[: config.fit_images].float(), config.constant)
        return made

    def _descend(
        self,
        model: FluxTransformer2DModel,
        coredi: CoReDi | None,
        optimizers: Sequence[torch.optim.Optimizer],
        step: int,
    ) -> Callable[[], dict[str, float]]:
        """One step; what it returns tells of it when it is asked."""
        world, batch = self.world, self.size.batch
        draw = torch.Generator().manual_seed(stable_hash(self.seed, "coredi", step))
        rows = torch.randint(len(world.tokens_NTC), (batch,), generator=draw).tolist()
        clean = world.tokens_NTC[rows].float()
        times = sample_times(batch, draw, shift=resolution_shift(clean.shape[1]))
        noise = torch.randn(clean.shape, generator=draw)
        noisy, text = interpolate(clean, noise, times), world.captions(rows)
        for optimizer in optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group.setdefault("highest", group["lr"])
                group["lr"] = group["highest"] * warmup_cosine(step, self.size.steps)
        with arithmetic("cpu", "bf16"):
            if coredi is None:
                image = flow_loss(velocity(model, world, text, noisy, times), clean, noise)
                total, features, noised = image, None, None
            else:
                noised = coredi.noised(world.features_NRCD[rows].float(), GRID, times, draw)
                with joined(model, coredi.stream, noised.noisy_BTF) as joint:
                    image = flow_loss(velocity(model, world, text, noisy, times), clean, noise)
                features, penalty = coredi.loss(joint.velocity_BTF, noised)
                total = image + features + penalty
            total.backward()
        learning = [p for o in optimizers for g in o.param_groups for p in g["params"]]
        nn.utils.clip_grad_norm_(learning, 1.0)
        for optimizer in optimizers:
            optimizer.step()

        def seen() -> dict[str, float]:
            told = {"loss": float(image.detach())}
            if coredi is not None and features is not None and noised is not None:
                told |= {"feature_loss": float(features.detach()), **facts(coredi, noised)}
            return {name: round(value, 5) for name, value in told.items()}

        return seen

    @torch.no_grad()
    def sample(self, model: FluxTransformer2DModel, coredi: CoReDi | None) -> Tensor:
        """Tokens [M, T, C] by Euler's steps from the same noise; features are carried along."""
        world, steps = self.world, self.size.sampling
        count, tokens = len(world.held_pooled_MP), world.tokens_NTC.shape[1:]
        text = (world.held_text_MLE.float(), world.held_pooled_MP)
        x = torch.randn(count, *tokens, generator=torch.Generator().manual_seed(0))
        shift = resolution_shift(tokens[0])
        grid = torch.linspace(1, 0, steps + 1)
        times = (shift * grid / (1 + (shift - 1) * grid)).tolist()
        carried: AbstractContextManager[Any] = nullcontext()
        if coredi is not None:
            coredi.eval()
            carried = carrying(model, coredi, generator=torch.Generator().manual_seed(1))
        model.eval()
        with arithmetic("cpu", "bf16"), carried:
            for now, then in itertools.pairwise(times):
                v = velocity(model, world, text, x, torch.full((count,), now))
                x = x + (then - now) * v.float()
        model.train()
        if coredi is not None:
            coredi.train()
        return x


def velocity(
    model: FluxTransformer2DModel,
    world: World,
    text: tuple[Tensor, Tensor],
    noisy_BTC: Tensor,
    times_B: Tensor,
) -> Tensor:
    """Velocity [B, T, C] of noisy tokens."""
    returned: Tensor = model(
        hidden_states=noisy_BTC, encoder_hidden_states=text[0], pooled_projections=text[1],
        timestep=times_B, img_ids=position_ids(*GRID), txt_ids=torch.zeros(text[0].shape[1], 3),
        return_dict=False,
    )[0]  # fmt: skip
    return world.velocity(returned, noisy_BTC, times_B)


def new_transformer(
    width: int, single: int, channels: int = 64, seed: int = 0, double: int = 1
) -> FluxTransformer2DModel:
    """FLUX-shaped, for tiny-flux's texts."""
    torch.manual_seed(seed)
    head = 32
    return FluxTransformer2DModel(
        in_channels=channels, num_layers=double, num_single_layers=single, attention_head_dim=head,
        num_attention_heads=width // head, joint_attention_dim=128, pooled_projection_dim=64,
        axes_dims_rope=(8, 12, 12),
    )  # fmt: skip


def new_optimizers(model: nn.Module, coredi: CoReDi | None) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for all else."""
    matrices: list[Tensor] = []
    others: list[Tensor] = [] if coredi is None else list(coredi.learners())
    for name, parameter in model.named_parameters():
        inside = "blocks." in name and "norm" not in name and parameter.ndim == 2
        (matrices if inside else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=4e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def unchanged(course: Course) -> bool:
    """Whether a new stream leaves the image path alone, bit for bit."""
    world, size = course.world, course.size
    model = new_transformer(size.width, size.single, world.tokens_NTC.shape[-1]).eval()
    coredi = course.stream(model)
    assert coredi is not None
    times, noisy, text = torch.full((2,), 0.5), world.tokens_NTC[:2].float(), world.captions([0, 1])
    noised = coredi.noised(world.features_NRCD[:2].float(), GRID, times)
    with torch.no_grad():
        before = velocity(model, world, text, noisy, times)
        with joined(model, coredi.stream, noised.noisy_BTF):
            after = velocity(model, world, text, noisy, times)
    return torch.equal(before, after)


@torch.no_grad()
def colours(world: World, coredi: CoReDi) -> list[Any]:
    """The first three channels of some pictures' projected features, as colours 0..255."""
    coredi.eval()
    rows = [row % len(world.features_NRCD) for row in SHOWN]
    z = coredi.projection(world.features_NRCD[rows].float())[..., :3]
    coredi.train()
    low, high = z.amin(dim=(0, 1, 2)), z.amax(dim=(0, 1, 2))
    levels = 255 * (z - low) / (high - low).clamp_min(1e-9)
    return list(levels.round().to(torch.uint8).tolist())
