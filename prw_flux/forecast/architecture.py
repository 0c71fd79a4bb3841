"""The shapes of a base, from its configuration files; nothing of it is loaded or downloaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, FluxTransformer2DModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from prw import ConfigError
from prw_flux.config import BaseConfig
from prw_flux.encode import encode_image
from prw_flux.locate import resolve_base
from prw_flux.memory import flux1, flux1_encoders

FLUX1: Final = {
    "black-forest-labs/FLUX.1-dev": True,
    "black-forest-labs/FLUX.1-Kontext-dev": True,
    "black-forest-labs/FLUX.1-Krea-dev": True,
    "black-forest-labs/FLUX.1-schnell": False,
}
"""Bases on the Hub whose shapes are FLUX.1's, and whether guidance is embedded."""
LENGTHS: Final = {"black-forest-labs/FLUX.1-schnell": 256}


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Architecture:
    """Models on the meta device.

    Attributes:
        transformer, vae, t5, clip: the base.
        text_tokens: L, of a prompt.
    """

    transformer: FluxTransformer2DModel
    vae: nn.Module
    t5: nn.Module
    clip: nn.Module
    text_tokens: int

    @property
    def width(self) -> int:
        """D of the transformer."""
        return int(self.transformer.inner_dim)

    @property
    def blocks(self) -> int:
        """Of both kinds."""
        config = self.transformer.config
        return int(config.num_layers + config.num_single_layers)

    def encoder_parameters(self) -> int:
        """Of autoencoder and text encoders."""
        return sum(parameters(model) for model in (self.vae, self.t5, self.clip))

    def encoding_flops(self, size: int) -> int:
        """To encode source, target and text of one sample; attention of T5 and CLIP left out."""
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            encode_image(self.vae, torch.empty(1, 3, size, size))
        text = 2 * self.text_tokens * _layers(self.t5) + 2 * 77 * _layers(self.clip)
        return 2 * int(counter.get_total_flops()) + text


def parameters(model: nn.Module) -> int:
    """How many numbers a model has."""
    return sum(parameter.numel() for parameter in model.parameters())


def _layers(model: nn.Module) -> int:
    """Weights that every token is multiplied with."""
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))


def architecture(base: BaseConfig) -> Architecture:
    """The shapes of a base: a folder's own, or FLUX.1's.

    Raises:
        ConfigError: a base on the Hub that is not known to have FLUX.1's shapes.
        FileNotFoundError: a folder that does not exist.
    """
    location = resolve_base(base.path)
    if Path(location).is_dir():
        return _of_folder(Path(location))
    if location not in FLUX1:
        raise ConfigError(
            f"the shapes of {location} are not known here: fetch it, and give its folder as "
            f"base.path (known: {', '.join(FLUX1)})"
        )
    t5, clip, vae = flux1_encoders()
    return Architecture(
        transformer=flux1(guidance_embeds=FLUX1[location]),
        vae=vae,
        t5=t5,
        clip=clip,
        text_tokens=LENGTHS.get(location, 512),
    )


def _of_folder(folder: Path) -> Architecture:
    index = _json(folder / "model_index.json")
    kind: Any = AutoencoderTiny if index["vae"][1] == "AutoencoderTiny" else AutoencoderKL
    length = int(
        _json(folder / "tokenizer_2" / "tokenizer_config.json").get("model_max_length", 512)
    )
    with torch.device("meta"):
        return Architecture(
            transformer=FluxTransformer2DModel.from_config(
                FluxTransformer2DModel.load_config(folder / "transformer")
            ),
            vae=kind.from_config(kind.load_config(folder / "vae")),
            t5=T5EncoderModel(T5Config.from_pretrained(folder / "text_encoder_2")),
            clip=CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder")),
            text_tokens=min(512, length),
        )


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found
