"""What a learned feature stream is worth, and what each of its safeguards holds up.

    python -m benchmarks.coredi [--seeds 2] [--steps 200] [--arms a,b] [--results FILE]
                                [--encoder auto|squeezenet|autoencoder] [--figure FILE] [--quick]

A small FLUX-shaped transformer learns ShapeWeave from nothing, with tiny-flux's autoencoder and
text encoders frozen, once per arm and seed; every arm sees the same pictures, times and noise:

``none``              no features
``fixed PCA``         principal components, batch normalised: the learned arm without learning
``ReDi``              principal components as in ReDi's code: not normalised
``learned``           CoReDi: learned projection, batch norm, stop-gradient, orthogonality
``covariance``        the same with decorrelated channels instead of orthogonality: the default
``no stop-gradient``  learned, but the projection sees its own target
``no batch norm``     learned, not normalised
``no regulariser``    learned, weight 0
``no safeguard``      learned, none of the three

Of each: losses, effective rank and scale of the projected features over the steps, and ShapeWeave's
exact score of pictures generated from held-out captions. A line per finished arm and seed goes to
--results, and what is there already is not trained again. Beside them: the time of a training step
with merged and with separate tokens, in CPU time, at this size and at a wider one.

Nothing is printed unless a new stream leaves the transformer's velocity what it was, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from benchmarks._common import interleaved, machine, parser, spread
from benchmarks._squeezenet import encoder as squeezenet
from benchmarks._squeezenet import weights as squeezenet_weights
from prw_flux import tiny
from prw_flux.arithmetic import arithmetic
from prw_flux.coredi import REDI, CoReDi, CoReDiConfig, FeatureEncoder, FunctionEncoder, carrying
from prw_flux.coredi.collapse import facts
from prw_flux.coredi.stream import joined
from prw_flux.encode import encode_image, encode_prompts, pack, position_ids, to_pixels
from prw_flux.flow import flow_loss, interpolate, resolution_shift, sample_times
from prw_flux.samples import stable_hash
from prw_flux.shapeweave import ShapeWeave
from prw_flux.shapeweave.score import score_scene
from prw_flux.tiny.autoencoder import warmup_cosine

SIZE, GRID = 96, (6, 6)
SHOWN = (1, 4, 8)
CHANNELS = 8
LEARNED = CoReDiConfig(
    enabled=True, channels=CHANNELS, constant="drop", orthogonality=0.1, covariance=0.0
)
ARMS: dict[str, CoReDiConfig | None] = {
    "none": None,
    "fixed PCA": replace(LEARNED, learn_projection=False),
    "ReDi": replace(REDI, enabled=True, channels=CHANNELS, constant="drop"),
    "learned": LEARNED,
    "covariance": replace(LEARNED, orthogonality=0.0, covariance=0.1),
    "no stop-gradient": replace(LEARNED, stop_gradient=False),
    "no batch norm": replace(LEARNED, normalise="none"),
    "no regulariser": replace(LEARNED, orthogonality=0.0),
    "no safeguard": replace(LEARNED, orthogonality=0.0, normalise="none", stop_gradient=False),
}


@dataclass(frozen=True)
class Size:
    """How much everything is."""

    images: int = 1500
    steps: int = 200
    batch: int = 32
    asked: int = 48
    sampling: int = 10
    looks: int = 4
    width: int = 128
    single: int = 3


@dataclass(frozen=True, eq=False)
class World:
    """Encoded pictures and captions, and what is asked."""

    latents_NTC: Tensor
    features_NRCD: Tensor
    text_NLE: Tensor
    pooled_NP: Tensor
    held_text_MLE: Tensor
    held_pooled_MP: Tensor
    scenes: list[Any]
    pipe: Any
    encoder: str


def main(arguments: list[str] | None = None) -> int:
    """Train the arms that are missing, measure the overhead, print; 1 where the check fails."""
    args = _parse(arguments)
    size = Size() if not args.quick else Size(32, 4, 4, 2, 2, 2, 32, 1)
    size = size if args.steps is None else replace(size, steps=args.steps)
    names = list(ARMS) if args.arms is None else args.arms.split(",")
    if unknown := [name for name in names if name not in ARMS]:
        print(f"no arm {unknown[0]!r}; there are {', '.join(ARMS)}", file=sys.stderr)
        return 1
    world = build_world(size, args.encoder)
    if not unchanged(size, world):
        print("no figures: a new feature stream changes the image path", file=sys.stderr)
        return 1
    lines = [line for line in read(args.results) if line["size"] == vars(size)]
    lines = [line for line in lines if line["encoder"] == world.encoder]
    done = {(line["arm"], line["seed"]) for line in lines}
    for seed in range(1 if args.quick else args.seeds):
        for name in names:
            if (name, seed) in done:
                continue
            line = {"arm": name, "seed": seed, "size": vars(size), "encoder": world.encoder,
                    **machine("cpu"), **course(world, size, ARMS[name], seed)}  # fmt: skip
            lines.append(line)
            append(args.results, line)
            print(f"{name}, seed {seed}: {line['quality'][-1]}", flush=True)
    result = {
        "benchmark": "coredi",
        **machine("cpu"),
        "encoder": world.encoder,
        "size": vars(size),
        "variants": {**summary(lines), **overhead(args.quick)},
    }
    tell(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    if args.figure:
        draw(lines, args.figure)
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    found = parser("coredi", __doc__ or "")
    found.add_argument("--seeds", type=int, default=2)
    found.add_argument("--steps", type=int)
    found.add_argument("--arms", help="only these, separated by commas")
    found.add_argument("--encoder", choices=("auto", "squeezenet", "autoencoder"), default="auto")
    found.add_argument("--results", type=Path, help="finished arms as JSON lines; continued")
    found.add_argument("--figure", type=Path, help="where to draw the finished arms")
    return found.parse_args(arguments)


# What is learnt ------------------------------------------------------------------------------


def build_world(size: Size, name: str) -> World:
    """Everything that is encoded once."""
    pipe = FluxPipeline.from_pretrained(tiny.path(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if name == "auto":
        name = "squeezenet" if squeezenet_weights() else "autoencoder"
    encoder = squeezenet() if name == "squeezenet" else autoencoder(pipe.vae)
    source = ShapeWeave(size=SIZE, split="train")
    latents, features, texts, pooled = [], [], [], []
    for start in range(0, size.images, 100):
        chunk = range(start, min(start + 100, size.images))
        examples = [source.example("inpaint", index) for index in chunk]
        pixels = to_pixels(np.stack([example.image for example in examples]))
        latents.append(pack(encode_image(pipe.vae, pixels)).bfloat16())
        features.append(encoder(pixels, GRID).bfloat16())
        text = encode_prompts([example.caption for example in examples], **parts(pipe))
        texts.append(text[0].bfloat16())
        pooled.append(text[1])
    held = ShapeWeave(size=SIZE, split="heldout", seed=1)
    asked = [held.example("inpaint", index) for index in range(size.asked)]
    held_text, held_pooled = encode_prompts([e.caption for e in asked], **parts(pipe))
    return World(
        torch.cat(latents), torch.cat(features), torch.cat(texts), torch.cat(pooled),
        held_text, held_pooled, [e.metadata["scene"] for e in asked], pipe, name,
    )  # fmt: skip


def parts(pipe: Any) -> dict[str, Any]:
    """The text encoders of a pipeline."""
    names = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    return {name: getattr(pipe, name) for name in names}


def autoencoder(vae: Any) -> FeatureEncoder:
    """Activations inside tiny-flux's autoencoder: on every machine, but hardly semantic."""
    layers = list(vae.encoder.layers)[:-1]
    width = next(m.out_channels for m in reversed(list(layers[-1].modules()))
                 if isinstance(m, nn.Conv2d))  # fmt: skip

    def maps(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        for layer in layers:
            pixels = layer(pixels)
        return nn.functional.adaptive_avg_pool2d(pixels, grid)

    return FunctionEncoder(maps, width)


def new_transformer(
    width: int, single: int, seed: int = 0, double: int = 1
) -> FluxTransformer2DModel:
    """FLUX-shaped, for tiny-flux's latents and texts."""
    torch.manual_seed(seed)
    head = 32
    return FluxTransformer2DModel(
        in_channels=64, num_layers=double, num_single_layers=single, attention_head_dim=head,
        num_attention_heads=width // head, joint_attention_dim=128, pooled_projection_dim=64,
        axes_dims_rope=(8, 12, 12),
    )  # fmt: skip


def new_coredi(world: World, model: Any, config: CoReDiConfig, seed: int) -> CoReDi:
    """Fitted to the features of some pictures."""
    torch.manual_seed(seed)
    made = CoReDi.for_transformer(model, config, world.features_NRCD.shape[-1])
    made.projection.fit(world.features_NRCD[: config.fit_images].float(), config.constant)
    return made


def unchanged(size: Size, world: World) -> bool:
    """Whether a new stream leaves the image path alone, bit for bit."""
    model = new_transformer(size.width, size.single).eval()
    coredi = new_coredi(world, model, LEARNED, 0)
    times = torch.full((2,), 0.5)
    noised = coredi.noised(world.features_NRCD[:2].float(), GRID, times)
    with torch.no_grad():
        before = forward(model, world, [0, 1], world.latents_NTC[:2].float(), times)
        with joined(model, coredi.stream, noised.noisy_BTF):
            after = forward(model, world, [0, 1], world.latents_NTC[:2].float(), times)
    return torch.equal(before, after)


def forward(model: Any, world: World, rows: list[int], noisy: Tensor, times: Tensor) -> Tensor:
    """Velocity of packed noisy latents."""
    velocity: Tensor = model(
        hidden_states=noisy, encoder_hidden_states=world.text_NLE[rows].float(),
        pooled_projections=world.pooled_NP[rows], timestep=times, img_ids=position_ids(*GRID),
        txt_ids=torch.zeros(world.text_NLE.shape[1], 3), return_dict=False,
    )[0]  # fmt: skip
    return velocity


# One arm -------------------------------------------------------------------------------------


def course(world: World, size: Size, config: CoReDiConfig | None, seed: int) -> dict[str, Any]:
    """Train one arm; what was seen on the way."""
    model = new_transformer(size.width, size.single, seed)
    coredi = None if config is None else new_coredi(world, model, config, seed)
    optimizers = new_optimizers(model, coredi)
    told: dict[str, Any] = {"log": [], "quality": [], "maps": []}
    spent = 0.0
    every = max(1, size.steps // size.looks)
    if coredi is not None:
        told["maps"].append({"step": 0, "values": shown(world, coredi)})
    for step in range(size.steps):
        began = time.process_time()
        seen = descend(model, coredi, optimizers, world, size, seed, step)
        spent += time.process_time() - began
        if (step + 1) % max(1, size.steps // 40) == 0 or step == 0:
            told["log"].append({"step": step + 1, **seen()})
        if (step + 1) % every == 0:
            told["quality"].append({"step": step + 1, **quality(world, size, model, coredi)})
            if coredi is not None:
                told["maps"].append({"step": step + 1, "values": shown(world, coredi)})
    told["cpu_ms_per_step"] = round(1e3 * spent / size.steps, 2)
    return told


def new_optimizers(model: Any, coredi: CoReDi | None) -> list[torch.optim.Optimizer]:
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


def descend(
    model: Any,
    coredi: CoReDi | None,
    optimizers: list[torch.optim.Optimizer],
    world: World,
    size: Size,
    seed: int,
    step: int,
) -> Any:
    """One step; returns what tells about it when it is asked."""
    draw = torch.Generator().manual_seed(stable_hash(seed, "coredi", step))
    rows = torch.randint(len(world.latents_NTC), (size.batch,), generator=draw).tolist()
    clean = world.latents_NTC[rows].float()
    times = sample_times(size.batch, draw, shift=resolution_shift(clean.shape[1]))
    noise = torch.randn(clean.shape, generator=draw)
    noisy = interpolate(clean, noise, times)
    for optimizer in optimizers:
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group.setdefault("highest", group["lr"])
            group["lr"] = group["highest"] * warmup_cosine(step, size.steps)
    with arithmetic("cpu", "bf16"):
        if coredi is None:
            image = flow_loss(forward(model, world, rows, noisy, times), clean, noise)
            total, features, batch = image, None, None
        else:
            batch = coredi.noised(world.features_NRCD[rows].float(), GRID, times, draw)
            with joined(model, coredi.stream, batch.noisy_BTF) as joint:
                image = flow_loss(forward(model, world, rows, noisy, times), clean, noise)
            features, penalty = coredi.loss(joint.velocity_BTF, batch)
            total = image + features + penalty
        total.backward()
    learning = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    nn.utils.clip_grad_norm_(learning, 1.0)
    for optimizer in optimizers:
        optimizer.step()

    def seen() -> dict[str, float]:
        told = {"loss": float(image.detach())}
        if coredi is not None and features is not None and batch is not None:
            told |= {"feature_loss": float(features.detach()), **facts(coredi, batch)}
        return {name: round(value, 5) for name, value in told.items()}

    return seen


@torch.no_grad()
def quality(world: World, size: Size, model: Any, coredi: CoReDi | None) -> dict[str, float]:
    """ShapeWeave's exact score of pictures from held-out captions; features are carried along."""
    pipe = world.pipe
    stock, pipe.transformer = pipe.transformer, model.eval()
    given = {
        "prompt_embeds": world.held_text_MLE, "pooled_prompt_embeds": world.held_pooled_MP,
        "height": SIZE, "width": SIZE, "num_inference_steps": size.sampling, "output_type": "np",
        "generator": torch.Generator().manual_seed(0),
    }  # fmt: skip
    try:
        with arithmetic("cpu", "bf16"):
            if coredi is None:
                pictures = pipe(**given).images
            else:
                coredi.eval()
                with carrying(model, coredi, generator=torch.Generator().manual_seed(1)):
                    pictures = pipe(**given).images
                coredi.train()
    finally:
        pipe.transformer = stock
        model.train()
    levels = np.rint(np.nan_to_num(pictures) * 255).astype(np.uint8)
    scores = [score_scene(p, s) for p, s in zip(levels, world.scenes, strict=True)]
    return {name: round(float(np.mean([s[name] for s in scores])), 4) for name in scores[0]}


@torch.no_grad()
def shown(world: World, coredi: CoReDi) -> list[Any]:
    """The first three channels of some pictures' projected features, as colours 0..255."""
    coredi.eval()
    rows = [row % len(world.features_NRCD) for row in SHOWN]
    z = coredi.projection(world.features_NRCD[rows].float())[..., :3]
    coredi.train()
    low, high = z.amin(dim=(0, 1, 2)), z.amax(dim=(0, 1, 2))
    levels = 255 * (z - low) / (high - low).clamp_min(1e-9)
    return list(levels.round().to(torch.uint8).tolist())


# Overhead ------------------------------------------------------------------------------------


def overhead(quick: bool) -> dict[str, Any]:
    """CPU time of a training step, interleaved: no features, merged, separate; at two widths.

    Of the step with features that is: projection, noise, stream, losses. Features of the encoder
    are encoded once and kept, as in the trainer, and are not part of it.
    """
    shapes = {"tiny": (32, 1, 0, 4, 36)} if quick else {
        "width 128, 36 tokens": (128, 3, 1, 32, 36),
        "width 512, 256 tokens": (512, 2, 1, 2, 256),
    }  # fmt: skip
    found: dict[str, Any] = {}
    for label, (width, single, double, batch, tokens) in shapes.items():
        runs = dict(steps_of(width, single, max(double, 1), batch, tokens))
        seconds = interleaved(runs, rounds=3 if quick else 7, warmup=1, device="cpu",
                              clock=time.process_time)  # fmt: skip
        stock = torch.tensor(seconds["no features"], dtype=torch.float64)
        for name, values in seconds.items():
            ratios = torch.tensor(values, dtype=torch.float64) / stock
            found[f"step, {name}, {label}"] = {
                **spread(values), "of_no_features": round(float(ratios.median()), 4)
            }  # fmt: skip
    return found


def steps_of(
    width: int, single: int, double: int, batch: int, tokens: int
) -> Iterator[tuple[str, Any]]:
    """A training step of each variant: all weights learn."""
    side = int(tokens**0.5)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, tokens, 64, generator=generator)
    features = torch.randn(64, side, side, 512, generator=generator)
    texts = torch.randn(batch, 32, 128, generator=generator)
    pooled, times = torch.randn(batch, 64, generator=generator), torch.full((batch,), 0.5)

    for name in ("no features", "merged", "separate"):
        model = new_transformer(width, single, double=double)
        coredi = None
        if name != "no features":
            coredi = CoReDi.for_transformer(model, replace(LEARNED, tokens=name), 512)
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


# Telling -------------------------------------------------------------------------------------


def read(path: Path | None) -> list[dict[str, Any]]:
    """Finished arms; a line that was cut off by a crash is left out."""
    if path is None or not path.is_file():
        return []
    lines = []
    for text in path.read_text("utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def append(path: Path | None, line: dict[str, Any]) -> None:
    """Add a finished arm."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Per arm, over seeds: quality at every look, mean of the last losses, rank and scale."""
    found: dict[str, Any] = {}
    for arm in ARMS:
        own = [line for line in lines if line["arm"] == arm]
        if not own:
            continue
        told: dict[str, Any] = {"seeds": len(own), "quality": []}
        for index, look in enumerate(own[0]["quality"]):
            marks = [line["quality"][index] for line in own]
            told["quality"].append(
                {"step": look["step"]}
                | {k: among([m[k] for m in marks]) for k in ("C", "L", "background")}
            )
        tail = [line["log"][-max(1, len(line["log"]) // 5) :] for line in own]
        for key in own[0]["log"][-1]:
            if key != "step":
                told[key] = among([float(np.mean([e[key] for e in part])) for part in tail])
        told["cpu_ms_per_step"] = among([line["cpu_ms_per_step"] for line in own])
        found[arm] = told
    return found


def among(values: list[float]) -> dict[str, float]:
    """Mean, lowest and highest."""
    found = {"mean": sum(values) / len(values), "low": min(values), "high": max(values)}
    return {name: round(value, 4) for name, value in found.items()}


def tell(result: dict[str, Any]) -> None:
    """For people."""
    print("  ".join(f"{name} {result[name]}" for name in ("device", "torch", "commit", "encoder")))
    print(f"{'':18}{'seeds':>6}{'loss':>9}{'f. loss':>9}{'rank':>7}{'scale':>8}"
          f"{'C':>7}{'L':>7}{'backgr.':>9}")  # fmt: skip
    for arm, told in result["variants"].items():
        if "seeds" not in told:
            print(f"{arm}: {told['median_ms']} ms, {told['of_no_features']} of no features")
            continue
        cells = [told.get(k, {}).get("mean") for k in
                 ("loss", "feature_loss", "feature_rank", "feature_scale")]  # fmt: skip
        last = told["quality"][-1]
        cells += [last[k]["mean"] for k in ("C", "L", "background")]
        widths = (9, 9, 7, 8, 7, 7, 9)
        words = [
            "-".rjust(w) if c is None else f"{c:{w}.3f}" for c, w in zip(cells, widths, strict=True)
        ]
        print(f"{arm:18}{told['seeds']:>6}" + "".join(words))


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Curves of every arm, and projected features as colours over the steps."""
    from benchmarks._coredi_figure import figure

    path.parent.mkdir(parents=True, exist_ok=True)
    figure(lines, list(ARMS)).savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
