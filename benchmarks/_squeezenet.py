"""SqueezeNet 1.0 as a feature encoder: real pretrained weights, small enough for a CPU.

`encoder` is what a configuration names: ``coredi.encoder=benchmarks._squeezenet:encoder``. The
weights lie in the folder of test assets that PRW_TEST_ASSETS names; they are not part of PRW.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from prw_flux.coredi import FeatureEncoder, FunctionEncoder
from prw_flux.encode import resize

MEAN = (123.0, 117.0, 104.0)
POOLED = (2, 6, 11)
"""Layers after which torchvision's numbering has a pooling."""


def weights() -> Path | None:
    """The file, where there is one."""
    folder = os.environ.get("PRW_TEST_ASSETS")
    file = Path(folder or "/nowhere") / "squeezenet" / "squeezenet1_0_dc_fp16.safetensors"
    return file if file.is_file() else None


def encoder(last: int = 12) -> FeatureEncoder:
    """The outputs of a fire module: by default of the last one, 512 channels, 16 pixels a place."""
    file = weights()
    if file is None:
        raise FileNotFoundError("SqueezeNet needs PRW_TEST_ASSETS to name the test assets")
    state = {name: value.float() for name, value in load_file(file).items()}
    width = 2 * state[f"features.{last}.expand1x1.weight"].shape[0]
    return FunctionEncoder(lambda pixels, grid: features(state, pixels, grid, last), width)


def features(
    state: dict[str, Tensor], pixels: Tensor, grid: tuple[int, int], last: int = 12
) -> Tensor:
    """Maps [B, D, R, C] of pixels in [-1, 1], resized so that those of layer 12 are the grid."""
    x = resize(pixels.cpu(), (16 * grid[0] + 17, 16 * grid[1] + 17))
    x = (x + 1.0) * 127.5 - x.new_tensor(MEAN).view(3, 1, 1)
    x = F.relu(F.conv2d(x, state["features.0.weight"], state["features.0.bias"], stride=2))
    for layer in range(2, last + 1):
        if layer in POOLED:
            x = F.max_pool2d(x, 3, 2, ceil_mode=True)
            continue
        x = _fire(state, f"features.{layer}", x)
    return x if last == 12 else F.adaptive_avg_pool2d(x, grid)


def _fire(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    def convolve(part: str, x: Tensor, padding: int = 0) -> Tensor:
        weight, bias = state[f"{name}.{part}.weight"], state[f"{name}.{part}.bias"]
        return F.relu(F.conv2d(x, weight, bias, padding=padding))

    x = convolve("squeeze", x)
    return torch.cat([convolve("expand1x1", x), convolve("expand3x3", x, 1)], dim=1)
