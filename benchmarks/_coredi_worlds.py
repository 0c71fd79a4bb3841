"""What the arms of `benchmarks.coredi` learn: drawn scenes, photos, and scenes as pixels.

Shapes: N training pictures, M pictures asked for, T tokens, C channels of a token, R x C grid of
feature places, D encoder width, L text tokens, E their width, P width of the pooled text.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, FluxPipeline
from einops import rearrange
from torch import Tensor, nn

from benchmarks._squeezenet import encoder as squeezenet
from benchmarks._squeezenet import weights as squeezenet_weights
from prw_flux import tiny
from prw_flux.coredi import FeatureEncoder, FunctionEncoder
from prw_flux.coredi.grid import Layout
from prw_flux.coredi.pixels import patchify, unpatchify, velocity_of_clean
from prw_flux.encode import decode_latents, encode_image, encode_prompts, pack, to_pixels, unpack
from prw_flux.evaluation.metrics import frechet_distance
from prw_flux.shapeweave import ShapeWeave
from prw_flux.shapeweave.score import score_scene

SIZE: Final = 96
GRID: Final = (6, 6)
PATCH: Final = 16
COMPONENTS: Final = 32
"""Of the vectors whose Fréchet distance is taken: few pictures fill their covariance."""

Pixels: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Amount:
    """How much a world holds: pictures to learn from, pictures asked for, held-out ones beside."""

    images: int
    asked: int
    real: int = 512


@dataclass(frozen=True, eq=False)
class World:
    """Encoded pictures and captions, what is asked for, and how a picture is judged.

    Attributes:
        layout: of the feature tokens.
        tokens_NTC, features_NRCD, text_NLE, pooled_NP: to learn from; text and pooled have one row
            where there are no captions.
        held_text_MLE, held_pooled_MP: of what is asked for.
        scenes: truth of what is asked for, for ShapeWeave's exact score; empty for photos.
        velocity: of (what the transformer returns, x_t, t).
        picture: tokens to pictures in [-1, 1].
        judge: pictures to the vectors of the Fréchet distance.
        real: those vectors of held-out pictures.
        encoder: its name.
    """

    layout: Layout
    tokens_NTC: Tensor
    features_NRCD: Tensor
    text_NLE: Tensor
    pooled_NP: Tensor
    held_text_MLE: Tensor
    held_pooled_MP: Tensor
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor]
    picture: Callable[[Tensor], Tensor]
    judge: Callable[[Tensor], Tensor]
    real: Tensor
    encoder: str
    scenes: Sequence[Any] = field(default=())

    def captions(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Text [B, L, E] and pooled text [B, P] of some training pictures."""
        if len(self.pooled_NP) == 1:
            count = len(rows)
            return self.text_NLE.float().expand(count, -1, -1), self.pooled_NP.expand(count, -1)
        index = list(rows)
        return self.text_NLE[index].float(), self.pooled_NP[index]

    def quality(self, tokens_MTC: Tensor) -> dict[str, float]:
        """Fréchet distance to held-out pictures ("FD", lower is better), and the exact score."""
        pictures = self.picture(tokens_MTC).clamp(-1, 1).nan_to_num()
        found = {"FD": frechet_distance(self.judge(pictures).numpy(), self.real.numpy())}
        if self.scenes:
            levels = _levels(pictures)
            scores = [score_scene(p, s) for p, s in zip(levels, self.scenes, strict=True)]
            found |= {name: float(np.mean([s[name] for s in scores])) for name in scores[0]}
        return {name: round(value, 4) for name, value in found.items()}


def shapes(amount: Amount, encoder: str) -> World:
    """ShapeWeave in tiny-flux's latents, with its captions."""
    pipe = _pipe()
    learnt, asked, real = _scenes(amount)
    return _world(
        learnt, asked, real, encoder, pipe, layout="latent",
        encode=lambda pixels: pack(encode_image(pipe.vae, pixels)),
        picture=lambda tokens: decode_latents(pipe.vae, unpack(tokens, 12, 12)),
        velocity=lambda predicted, noisy, times: predicted,
    )  # fmt: skip


def pixels(amount: Amount, encoder: str) -> World:
    """ShapeWeave as patches of 16 x 16 pixels; the transformer predicts the clean picture."""
    learnt, asked, real = _scenes(amount)
    return _world(
        learnt, asked, real, encoder, _pipe(), layout="token",
        encode=lambda pixels: patchify(pixels, PATCH),
        picture=lambda tokens: unpatchify(tokens, SIZE, SIZE, PATCH),
        velocity=velocity_of_clean,
    )  # fmt: skip


def photos(amount: Amount, encoder: str) -> World:
    """Crops of real photos in the latents of FLUX.1's tiny autoencoder, without captions.

    Raises:
        FileNotFoundError: PRW_TEST_ASSETS names no folder with them.
    """
    folder = Path(os.environ.get("PRW_TEST_ASSETS", "/nowhere"))
    if not (folder / "taef1").is_dir():
        raise FileNotFoundError("the world of photos needs PRW_TEST_ASSETS to name the test assets")
    vae = AutoencoderTiny.from_pretrained(folder / "taef1", torch_dtype=torch.float32).eval()
    names = ("kodak", "photos", "dreambench/images")
    files = sorted(p for name in names for p in (folder / name).rglob("*.[jp][pn]g"))
    held = files[::5]
    learnt = [(crop, "") for crop in crops([f for f in files if f not in held], amount.images, 0)]
    real = crops(held, amount.real, 1)
    return _world(
        learnt, [("", None)] * amount.asked, real, encoder, _pipe(), layout="latent",
        encode=lambda pixels: pack(encode_image(vae, pixels)),
        picture=lambda tokens: decode_latents(vae, unpack(tokens, 12, 12)),
        velocity=lambda predicted, noisy, times: predicted,
    )  # fmt: skip


WORLDS: Final[Mapping[str, Callable[[Amount, str], World]]] = MappingProxyType(
    {"shapes": shapes, "photos": photos, "pixels": pixels}
)


def crops(files: Sequence[Path], count: int, seed: int) -> list[Pixels]:
    """Square crops, the photos in turn: side between half and all of the short side, mirrored."""
    draw = np.random.default_rng(seed)
    opened = [PIL.Image.open(file).convert("RGB") for file in files]
    found = []
    for number in range(count):
        photo = opened[number % len(opened)]
        side = int(draw.uniform(0.5, 1.0) * min(photo.size))
        left, top = (int(draw.integers(0, length - side + 1)) for length in photo.size)
        crop = photo.resize(
            (SIZE, SIZE), PIL.Image.Resampling.LANCZOS, box=(left, top, left + side, top + side)
        )
        picture = np.asarray(crop, np.uint8)
        found.append(picture[:, ::-1].copy() if draw.random() < 0.5 else picture)
    return found


def _scenes(
    amount: Amount,
) -> tuple[list[tuple[Pixels, str]], list[tuple[str, Any]], list[Pixels]]:
    source = ShapeWeave(size=SIZE, split="train")
    held = ShapeWeave(size=SIZE, split="heldout", seed=1)
    examples = [source.example("inpaint", index) for index in range(amount.images)]
    beside = [held.example("inpaint", index) for index in range(max(amount.real, amount.asked))]
    return (
        [(e.image, e.caption) for e in examples],
        [(e.caption, e.metadata["scene"]) for e in beside[: amount.asked]],
        [e.image for e in beside[: amount.real]],
    )


def _world(
    learnt: Sequence[tuple[Pixels, str]],
    asked: Sequence[tuple[str, Any]],
    real: Sequence[Pixels],
    name: str,
    pipe: Any,
    *,
    layout: Layout,
    encode: Callable[[Tensor], Tensor],
    picture: Callable[[Tensor], Tensor],
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> World:
    """Encode everything once."""
    if name == "auto":
        name = "squeezenet" if squeezenet_weights() else "autoencoder"
    encoder = squeezenet() if name == "squeezenet" else _autoencoder(pipe.vae)
    tokens, features = [], []
    for start in range(0, len(learnt), 100):
        chunk = to_pixels(np.stack([image for image, _ in learnt[start : start + 100]]))
        tokens.append(encode(chunk).bfloat16())
        features.append(encoder(chunk, GRID).bfloat16())
    captions = [caption for _, caption in learnt]
    texts = [_texts(captions[i : i + 100], pipe) for i in range(0, len(captions), 100)]
    if not any(captions):
        texts = [_texts([""], pipe)]
    held_text, held_pooled = _texts([caption for caption, _ in asked], pipe)
    judge = _judge(real, name, pipe)
    return World(
        layout=layout, tokens_NTC=torch.cat(tokens), features_NRCD=torch.cat(features),
        text_NLE=torch.cat([t.bfloat16() for t, _ in texts]),
        pooled_NP=torch.cat([p for _, p in texts]),
        held_text_MLE=held_text, held_pooled_MP=held_pooled, velocity=velocity, picture=picture,
        judge=judge, real=judge(to_pixels(np.stack(real))), encoder=name,
        scenes=[scene for _, scene in asked if scene is not None],
    )  # fmt: skip


def _judge(real: Sequence[Pixels], name: str, pipe: Any) -> Callable[[Tensor], Tensor]:
    """Means and deviations of feature maps, on the principal components of held-out pictures.

    Where there are SqueezeNet weights it is their third fire module, not the last one, whose output
    the features are that an arm learns beside the image.
    """
    maps = squeezenet(last=5) if name == "squeezenet" else _autoencoder(pipe.vae)

    def vectors(pictures: Tensor) -> Tensor:
        parts = []
        for chunk in pictures.split(100):
            flat = rearrange(maps(chunk, GRID).double(), "b r c d -> b (r c) d")
            parts.append(torch.cat([flat.mean(1), flat.std(1)], dim=-1))
        return torch.cat(parts)

    truth = vectors(to_pixels(np.stack(real)))
    scale = truth.std(0)
    scale = scale.clamp_min(0.1 * float(scale.median()))  # a channel that hardly ever fires
    directions = torch.linalg.svd((truth - truth.mean(0)) / scale, full_matrices=False).Vh
    basis = directions[: min(COMPONENTS, len(directions))].T
    return lambda pictures: (vectors(pictures) / scale) @ basis


def _levels(pictures: Tensor) -> list[Pixels]:
    levels = (pictures.float() * 127.5 + 127.5).round().byte()
    return [np.ascontiguousarray(p.permute(1, 2, 0).numpy()) for p in levels]


def _pipe() -> Any:
    return FluxPipeline.from_pretrained(tiny.path(), dtype=torch.float32)


def _texts(captions: Sequence[str], pipe: Any) -> tuple[Tensor, Tensor]:
    names = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    return encode_prompts(list(captions), **{name: getattr(pipe, name) for name in names})


def _autoencoder(vae: Any) -> FeatureEncoder:
    """Activations inside tiny-flux's autoencoder: on every machine, but hardly semantic."""
    layers = list(vae.encoder.layers)[:-1]
    width = next(m.out_channels for m in reversed(list(layers[-1].modules()))
                 if isinstance(m, nn.Conv2d))  # fmt: skip

    def maps(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        with torch.no_grad():
            for layer in layers:
                pixels = layer(pixels)
            return F.adaptive_avg_pool2d(pixels, grid)

    return FunctionEncoder(maps, width)
