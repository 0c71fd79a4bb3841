"""What a pipeline call returns: images and, where the task was grounding, what they mark."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from PIL import Image
from torch import Tensor

from prw_flux.encode import resize, to_pixels
from prw_flux.tasks.grounding import PALETTE, Overlay, read_overlay

DEFAULT_COLOUR: Final = "magenta"


@dataclass
class CoLoGenPipelineOutput(FluxPipelineOutput):
    """FluxPipelineOutput with one more field.

    Attributes:
        images: as in FluxPipelineOutput.
        grounding: of task "ground", one `Overlay` per image: box (x0, y0, x1, y1) in pixels of the
            result or None, mask bool [H, W], confidence in [0, 1]. Else None.
    """

    grounding: list[Overlay] | None = None


def named_colour(prompt: str) -> str:
    """The colour that a prompt asks the mark to have ("... in cyan"), or else magenta."""
    asked = re.findall(rf"\bin ({'|'.join(PALETTE)})\b", prompt.lower())
    return str(asked[-1]) if asked else DEFAULT_COLOUR


def read_grounding(images: Any, picture: Tensor, prompts: Sequence[str]) -> list[Overlay]:
    """Read the mark of each image of a pipeline's output.

    Args:
        images: n P results (PIL, float [n P, H, W, 3] or tensor [n P, 3, H, W]), n per prompt.
        picture: uint8 [1 or P, 3, h, w], the sources.
        prompts: P texts, which may name the colour of the mark.
    """
    results = [_array(image) for image in images]
    height, width = results[0].shape[:2]
    sources = resize(to_pixels(picture), (height, width))
    bytes_BhwC = ((sources + 1.0) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    each = len(results) // len(prompts)
    found = []
    for index, result in enumerate(results):
        source = bytes_BhwC[index // each if len(bytes_BhwC) > 1 else 0]
        found.append(read_overlay(result, source, named_colour(prompts[index // each])))
    return found


def returned(
    images: Any, grounding: list[Overlay] | None, return_dict: bool
) -> CoLoGenPipelineOutput | tuple[Any, ...]:
    """An output, or a tuple of what is not None."""
    if return_dict:
        return CoLoGenPipelineOutput(images=images, grounding=grounding)
    return (images,) if grounding is None else (images, grounding)


def _array(image: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8 [H, W, 3] of one result of any output_type but "latent"."""
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"), np.uint8)
    if isinstance(image, Tensor):
        image = image.detach().float().cpu().permute(1, 2, 0).numpy()
    levels = np.rint(np.asarray(image, np.float32) * 255.0).clip(0, 255)
    return np.asarray(levels, np.uint8)
