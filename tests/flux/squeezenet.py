"""SqueezeNet 1.0 (ImageNet) as an image encoder under its own name, from the test assets."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

MEAN = (123.0, 117.0, 104.0)


@functools.cache
def weights() -> dict[str, Tensor]:
    path = Path(os.environ["PRW_TEST_ASSETS"]) / "squeezenet/squeezenet1_0_dc_fp16.safetensors"
    return {name: value.float() for name, value in load_file(path).items()}


@torch.no_grad()
def features(x_B3HW: Tensor) -> Tensor:
    """Mean of the last fire module's maps: [B, 512]."""
    w = weights()

    def convolved(x: Tensor, name: str, **how: int) -> Tensor:
        return F.relu(F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **how))

    def pooled(x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 2, ceil_mode=True)

    x = pooled(convolved(x_B3HW, "features.0", stride=2))
    for index in (3, 4, 5, 7, 8, 9, 10, 12):
        if index in (7, 12):
            x = pooled(x)
        squeezed = convolved(x, f"features.{index}.squeeze")
        x = torch.cat(
            [convolved(squeezed, f"features.{index}.expand1x1"),
             convolved(squeezed, f"features.{index}.expand3x3", padding=1)], 1
        )  # fmt: skip
    return x.mean((2, 3))


def encode(images: list[np.ndarray]) -> Tensor:
    """N pictures of any sizes -> [N, 512]."""
    sized = [np.asarray(Image.fromarray(image).resize((227, 227))) for image in images]
    x = torch.from_numpy(np.stack(sized).astype(np.float32)) - torch.tensor(MEAN)
    return features(x.permute(0, 3, 1, 2))
