"""Encoders of semantic features: DINOv2 through transformers, or any callable.

Shapes: B images, h x w pixels in [-1, 1], R x C feature grid, D width of the encoder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from prw import ConfigError
from prw.named_object import named_object
from prw_flux.encode import resize

FAMILIES = ("dinov2", "dinov2_with_registers")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FeatureEncoder(ABC):
    """A frozen image encoder with one feature vector per place.

    Attributes:
        width: D.
    """

    width: int

    @abstractmethod
    def encode(self, pixels_B3hw: Tensor, grid: tuple[int, int]) -> Tensor:
        """Features [B, R, C, D] of pictures; `grid` is the R x C that is wanted."""

    @torch.no_grad()
    def __call__(self, pixels_B3hw: Tensor, grid: tuple[int, int]) -> Tensor:
        """`encode`, checked.

        Raises:
            ConfigError: an encoder that gives another shape than it promised.
        """
        features = self.encode(pixels_B3hw, grid)
        wanted = (pixels_B3hw.shape[0], *grid, self.width)
        if tuple(features.shape) != wanted:
            raise ConfigError(
                f"the encoder gives features of shape {tuple(features.shape)}, wanted {wanted} "
                "(images, rows, columns, width): see FeatureEncoder"
            )
        return features


@final
class FunctionEncoder(FeatureEncoder):
    """Any callable, as convolutional networks have it.

    Args:
        function: (pixels [B, 3, h, w] in [-1, 1], (R, C)) -> maps [B, D, R, C].
        width: D.
    """

    def __init__(self, function: Callable[[Tensor, tuple[int, int]], Tensor], width: int) -> None:
        self.function, self.width = function, width

    def encode(self, pixels_B3hw: Tensor, grid: tuple[int, int]) -> Tensor:
        """Features [B, R, C, D]."""
        return self.function(pixels_B3hw, grid).permute(0, 2, 3, 1)


@final
class DinoV2(FeatureEncoder):
    """The normalised patch tokens of a DINOv2, with or without registers (ReDi: base, registers).

    A picture is resized so that its patches are the grid that is wanted.

    Args:
        model: transformers' ``Dinov2Model`` or ``Dinov2WithRegistersModel``.

    Raises:
        ConfigError: a model of another family.
    """

    def __init__(self, model: Any) -> None:
        family = model.config.model_type
        if family not in FAMILIES:
            raise ConfigError(
                f"an encoder must be one of {', '.join(FAMILIES)}, got {family!r}; "
                "any other model goes in as package.module:function"
            )
        self.model = model.eval().requires_grad_(False)
        self.width = int(model.config.hidden_size)
        registers = family == "dinov2_with_registers"
        self.leading = 1 + (int(model.config.num_register_tokens) if registers else 0)

    @classmethod
    def from_pretrained(cls, source: str, device: torch.device | str = "cpu") -> DinoV2:
        """From a folder or Hub id.

        Raises:
            ConfigError: there is no such model.
        """
        from transformers import AutoModel

        if source.startswith((".", "/", "~")) and not Path(source).expanduser().is_dir():
            raise ConfigError(f"there is no encoder at {source}: name a folder or a Hub id")
        try:
            model = AutoModel.from_pretrained(str(Path(source).expanduser()))
        except (OSError, ValueError) as problem:
            first = str(problem).strip().split("\n")[0]
            raise ConfigError(f"the encoder {source!r} cannot be loaded: {first}") from None
        return cls(model.to(device))

    def encode(self, pixels_B3hw: Tensor, grid: tuple[int, int]) -> Tensor:
        """Features [B, R, C, D], the patch tokens after the last norm."""
        patch = int(self.model.config.patch_size)
        pixels = resize(pixels_B3hw, (grid[0] * patch, grid[1] * patch)).to(self.model.device)
        mean = pixels.new_tensor(IMAGENET_MEAN).view(3, 1, 1)
        std = pixels.new_tensor(IMAGENET_STD).view(3, 1, 1)
        unit = ((pixels + 1.0) / 2.0 - mean) / std
        out: Tensor = self.model(unit.to(self.model.dtype)).last_hidden_state
        features: Tensor = out[:, self.leading :].unflatten(1, grid)
        return features


def load_encoder(spec: str, device: torch.device | str = "cpu") -> FeatureEncoder:
    """The encoder of a configuration: a DINOv2 by folder or Hub id, or ``package.module:function``.

    Raises:
        ConfigError: it does not exist, or the function returns something else.
    """
    if ":" not in spec:
        return DinoV2.from_pretrained(spec, device)
    make = named_object(spec, "encoder")
    if not callable(make):
        raise ConfigError(f"encoder {spec!r} is a {type(make).__name__}, not a function")
    encoder = make()
    if not isinstance(encoder, FeatureEncoder):
        raise ConfigError(
            f"encoder {spec!r} returned a {type(encoder).__name__}, not a FeatureEncoder"
        )
    return encoder
