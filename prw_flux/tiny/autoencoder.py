"""The autoencoder of tiny-flux: 16 latent channels, factor 8, standardised latents.

An ``AutoencoderTiny`` trained on ShapeWeave scenes and photograph crops. While it trains, the
latent passes through a batch normalisation without affine parameters and receives Gaussian noise;
at the end the normalisation is folded into the encoder's last convolution, so that the saved
model is the stock class and its latents have mean 0 and variance 1 per channel.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderTiny
from numpy.typing import NDArray
from torch import Tensor, nn

from prw_flux.shapeweave.render import depth_map, lineart_map, segmentation_map, softedge_map
from prw_flux.tiny.corpus import draw_content, paint

logger = logging.getLogger(__name__)

LATENT_CHANNELS = 16


@dataclass(frozen=True, kw_only=True)
class AutoencoderRecipe:
    """How the autoencoder is trained; ``latent_noise`` is the sd added to standardised latents."""

    channels: int = 48
    steps: int = 3000
    batch_size: int = 24
    photo_share: float = 0.25
    lr: float = 1.5e-3
    latent_noise: float = 0.1
    object_weight: float = 1.0
    scenes: int = 6000
    seed: int = 0


PHASES = (
    AutoencoderRecipe(),
    AutoencoderRecipe(steps=2200, lr=1e-3, object_weight=8.0, scenes=8000, seed=1),
)
"""First everything alike; then pixels that differ from a scene's background weigh eight times."""


def new_autoencoder(channels: int) -> AutoencoderTiny:
    """An untrained autoencoder of factor 8 with ``channels`` at every resolution."""
    return AutoencoderTiny(
        encoder_block_out_channels=(channels,) * 4,
        decoder_block_out_channels=(channels,) * 4,
        num_encoder_blocks=(0, 1, 2, 3),
        num_decoder_blocks=(3, 2, 1, 0),
        latent_channels=LATENT_CHANNELS,
    )


def train_autoencoder(
    recipe: AutoencoderRecipe,
    photos: list[NDArray[np.uint8]],
    vae: AutoencoderTiny | None = None,
) -> AutoencoderTiny:
    """Train on scenes and crops of ``photos`` (uint8 [H, W, 3]); L1 + 4 x MSE in [-1, 1].

    ``vae`` is the result of an earlier phase, to go on from; None starts afresh.
    """
    torch.manual_seed(recipe.seed)
    vae = vae if vae is not None else new_autoencoder(recipe.channels)
    vae.to(memory_format=torch.channels_last).train()
    norm = nn.BatchNorm2d(LATENT_CHANNELS, affine=False, momentum=0.02)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.lr, betas=(0.9, 0.98), eps=1e-8)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, recipe.steps)
    )
    for step, image in enumerate(image_batches(recipe, photos)):
        with torch.autocast("cpu", torch.bfloat16):
            latent = norm(vae.encoder(image).float())
            noisy = latent + recipe.latent_noise * torch.randn_like(latent)
            decoded = vae.decoder(noisy).float()
        error = decoded - image
        weight = pixel_weight(image, recipe)
        loss = (weight * (error.abs() + 4 * error.square())).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            psnr = -10 * math.log10(float(error.detach().square().mean()) / 4)
            logger.info("autoencoder step %d/%d: %.2f dB", step, recipe.steps, psnr)
    fold_normalisation(vae, norm)
    return vae.eval()


def pixel_weight(image: Tensor, recipe: AutoencoderRecipe) -> Tensor:
    """[B, 1, H, W]: ``object_weight`` where a scene differs from its background, else 1.

    The scenes come first in the batch; photographs weigh 1 everywhere.
    """
    weight = torch.ones_like(image[:, :1])
    if recipe.object_weight == 1.0:
        return weight
    n_scenes = len(image) - round(recipe.photo_share * recipe.batch_size)
    scenes = image[:n_scenes]
    background = scenes.flatten(2).median(dim=2).values[:, :, None, None]
    differs = (scenes - background).abs().amax(dim=1, keepdim=True) > 0.12
    weight[:n_scenes][differs] = recipe.object_weight
    return weight


def fold_normalisation(vae: AutoencoderTiny, norm: nn.BatchNorm2d) -> None:
    """Scale and shift the encoder's last convolution so that its output is ``norm``'s."""
    last = vae.encoder.layers[-1]
    assert isinstance(last, nn.Conv2d) and last.bias is not None
    assert norm.running_mean is not None and norm.running_var is not None
    with torch.no_grad():
        inverse = (norm.running_var + norm.eps).rsqrt()
        last.weight.mul_(inverse[:, None, None, None])
        last.bias.sub_(norm.running_mean).mul_(inverse)


def warmup_cosine(step: int, total: int, warmup: int = 100, floor: float = 0.02) -> float:
    """Learning-rate factor: linear warm-up, then cosine to ``floor``."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def image_batches(
    recipe: AutoencoderRecipe, photos: list[NDArray[np.uint8]], size: int = 96
) -> Iterator[Tensor]:
    """``recipe.steps`` batches [B, 3, size, size] in [-1, 1], scenes first, then photo crops."""
    rng = np.random.default_rng(recipe.seed)
    scenes = np.stack([draw_picture(rng, size) for _ in range(recipe.scenes)])
    n_photos = round(recipe.photo_share * recipe.batch_size) if photos else 0
    for _ in range(recipe.steps):
        chosen = scenes[rng.integers(len(scenes), size=recipe.batch_size - n_photos)]
        chosen = augment(chosen, rng)
        crops = [photo_crop(photos[rng.integers(len(photos))], rng, size) for _ in range(n_photos)]
        batch = np.concatenate([chosen, np.stack(crops)]) if crops else chosen
        yield to_tensor(batch)


def draw_picture(rng: np.random.Generator, size: int) -> NDArray[np.uint8]:
    """Anything the autoencoder meets: scenes, glyphs, marked objects, grey holes, control maps."""
    content = draw_content(rng)
    draw = rng.random()
    if draw < 0.16:
        maps = (lineart_map, softedge_map, depth_map, segmentation_map)
        level = maps[int(draw / 0.04)](content.scene, size)
        return np.repeat(level[:, :, None], 3, axis=2)
    image = paint(content, size)
    if draw < 0.26:
        top, left = rng.integers(0, size // 2, size=2)
        height, width = rng.integers(size // 6, size // 2, size=2)
        image[top : top + height, left : left + width] = 127
    return image


def augment(images: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Shift the whole batch by up to a latent cell, so that no phase of the grid is special."""
    shift = rng.integers(-4, 5, size=2)
    return np.roll(images, tuple(int(s) for s in shift), axis=(1, 2))


def photo_crop(photo: NDArray[np.uint8], rng: np.random.Generator, size: int) -> NDArray[np.uint8]:
    """A random square of the photo at a random scale, resampled to ``size``, mirrored at random."""
    import cv2

    side = int(rng.integers(size, max(size + 1, min(photo.shape[:2]))))
    top = int(rng.integers(photo.shape[0] - side + 1))
    left = int(rng.integers(photo.shape[1] - side + 1))
    crop = photo[top : top + side, left : left + side]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    return np.asarray(
        cv2.resize(np.ascontiguousarray(crop), (size, size), interpolation=cv2.INTER_AREA), np.uint8
    )


def to_tensor(images: NDArray[np.uint8]) -> Tensor:
    """uint8 [B, H, W, 3] to float [B, 3, H, W] in [-1, 1], channels last in memory."""
    tensor = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    return tensor.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


__all__ = ["AutoencoderRecipe", "train_autoencoder"]
