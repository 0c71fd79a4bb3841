"""Building tiny-flux from nothing: the autoencoder, the corpus, the base, the folder."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny, FluxPipeline
from numpy.typing import NDArray

from prw_flux.data.default_photos import folder
from prw_flux.data.images import open_image
from prw_flux.tiny.autoencoder import PHASES, AutoencoderRecipe, train_autoencoder
from prw_flux.tiny.base import BaseModel, BaseRecipe, build_corpus, scheduler
from prw_flux.tiny.corpus import vocabulary
from prw_flux.tiny.pretraining import pretrain
from prw_flux.tiny.text_tokenizers import clip_tokenizer, t5_tokenizer

logger = logging.getLogger(__name__)

CARD = "recipe.json"
STATE = "pretraining.safetensors"
PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png",
    "color.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png",
    "motorcycle_left.png", "motorcycle_right.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
"""The photographs of scikit-image that the autoencoder learns from."""


def build(
    out: Path,
    *,
    phases: tuple[AutoencoderRecipe, ...] = PHASES,
    recipe: BaseRecipe | None = None,
    compile_base: bool = True,
) -> Path:
    """Train every part and write the pipeline folder ``out`` with its recipe beside it.

    A second call goes on where an interrupted one was: an autoencoder in ``out`` is not trained
    again, and the base's pretraining saves its state there every 500 steps.

    Args:
        out: the folder; created.
        phases: of the autoencoder's training.
        recipe: of the base's pretraining; default BaseRecipe().
        compile_base: compile the transformer for training (needs a C++ compiler).
    """
    recipe = recipe or BaseRecipe()
    vae = autoencoder(out, phases)
    logger.info("encoding %d pictures", recipe.pictures)
    corpus = build_corpus(recipe, vae)
    torch.manual_seed(recipe.seed)
    model, clip, t5 = new_base(recipe)
    if compile_base:
        model.transformer.compile()
    pretrain(recipe, corpus, model, (clip, t5), out / STATE)
    write_folder(out, vae, model, clip, t5)
    card = {"autoencoder": [asdict(phase) for phase in phases], "base": asdict(recipe)}
    (out / CARD).write_text(json.dumps(card, indent=2) + "\n", "utf-8")
    (out / STATE).unlink(missing_ok=True)
    return out


def autoencoder(out: Path, phases: tuple[AutoencoderRecipe, ...]) -> AutoencoderTiny:
    """The trained autoencoder of ``out``, trained now where it is absent."""
    if (out / "vae" / "config.json").is_file():
        logger.info("using the autoencoder in %s", out / "vae")
        return AutoencoderTiny.from_pretrained(out / "vae", dtype=torch.float32).eval()
    photos = photographs()
    vae: AutoencoderTiny | None = None
    for phase in phases:
        vae = train_autoencoder(phase, photos, vae)
    assert vae is not None
    vae.save_pretrained(out / "vae")
    return vae


def photographs() -> list[NDArray[np.uint8]]:
    """The training photographs that this installation of scikit-image ships."""
    place = folder()
    paths = [] if place is None else [place / name for name in PHOTOGRAPHS]
    return [open_image(path) for path in paths if path.is_file()]


def new_base(recipe: BaseRecipe) -> tuple[BaseModel, Any, Any]:
    """A fresh base and its two tokenizers."""
    words = vocabulary()
    clip, t5 = clip_tokenizer(words), t5_tokenizer(words)
    return BaseModel(recipe, len(clip), len(t5), clip.eos_token_id), clip, t5


def write_folder(out: Path, vae: AutoencoderTiny, model: BaseModel, clip: Any, t5: Any) -> None:
    """Save the parts as a FluxPipeline folder in bf16."""
    pipeline = FluxPipeline(
        scheduler=scheduler(), vae=vae, text_encoder=model.text_encoder, tokenizer=clip,
        text_encoder_2=model.text_encoder_2, tokenizer_2=t5, transformer=model.transformer,
    )  # fmt: skip
    pipeline.to(torch.bfloat16).save_pretrained(out)
    # AutoencoderTiny adds this entry itself and then warns that it does not know it
    config = out / "vae" / "config.json"
    settings = json.loads(config.read_text("utf-8"))
    settings.pop("block_out_channels", None)
    config.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
