"""Two small networks that draw lines, run straight from their weights.

* soft edges: the HED-like network of ControlNet (`ControlNetHED.pth`, Apache-2.0; after Xie and Tu,
  arXiv 1504.06375): five stages of 3 x 3 convolutions, a side output after each.
* line drawings: the generator of "Learning to generate line drawings that convey geometry and
  semantics" (Chan, Durand and Isola, arXiv 2203.12691; `sk_model.pth`): convolutions down to a
  quarter, three residual blocks, and up again.

Weights are read from safetensors only. Shapes: H, W pixels; x_BCHW.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Weights: TypeAlias = Mapping[str, Tensor]

HED_STAGES: Final = ((3, 64, 2), (64, 128, 2), (128, 256, 3), (256, 512, 3), (512, 512, 3))
"""Channels in, channels out, convolutions."""
BLOCKS: Final = 3


def hed_shapes() -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that `hed` reads."""
    shapes: dict[str, tuple[int, ...]] = {"norm": (1, 3, 1, 1)}
    for stage, (into, out, count) in enumerate(HED_STAGES, start=1):
        for i in range(count):
            shapes[f"block{stage}.convs.{i}.weight"] = (out, out if i else into, 3, 3)
            shapes[f"block{stage}.convs.{i}.bias"] = (out,)
        shapes[f"block{stage}.projection.weight"] = (1, out, 1, 1)
        shapes[f"block{stage}.projection.bias"] = (1,)
    return shapes


def hed(weights: Weights, image_BCHW: Tensor) -> Tensor:
    """sigmoid of the mean of the five side outputs, each brought to H x W; [B, H, W] in [0, 1].

    Args:
        weights: of `hed_shapes`.
        image_BCHW: RGB, 0 to 255, at least 16 x 16.
    """
    size = image_BCHW.shape[-2:]
    x = image_BCHW - weights["norm"]
    sides = []
    for stage, (_, _, count) in enumerate(HED_STAGES, start=1):
        x = F.max_pool2d(x, 2) if stage > 1 else x
        for i in range(count):
            x = F.relu(_conv(weights, f"block{stage}.convs.{i}", x, padding=1))
        side = _conv(weights, f"block{stage}.projection", x)
        sides.append(F.interpolate(side, size, mode="bilinear", align_corners=False))
    return torch.cat(sides, dim=1).mean(dim=1).sigmoid()


def drawing_shapes() -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that `drawing` reads."""
    shapes = {"model0.1": (64, 3, 7, 7), "model1.0": (128, 64, 3, 3), "model1.3": (256, 128, 3, 3)}
    for block in range(BLOCKS):
        for place in (1, 5):
            shapes[f"model2.{block}.conv_block.{place}"] = (256, 256, 3, 3)
    last = {"model4.1": (1, 64, 7, 7)}
    up = {"model3.0": (256, 128, 3, 3), "model3.3": (128, 64, 3, 3)}  # transposed: in, out
    found = {f"{name}.weight": shape for name, shape in {**shapes, **up, **last}.items()}
    biases = {f"{name}.bias": (shape[0],) for name, shape in {**shapes, **last}.items()}
    return {**found, **biases, **{f"{name}.bias": (shape[1],) for name, shape in up.items()}}


def drawing(weights: Weights, image_BCHW: Tensor) -> Tensor:
    """The drawing, dark lines on white: [B, H, W] in [0, 1].

    Args:
        weights: of `drawing_shapes`.
        image_BCHW: RGB, 0 to 1, at least 16 x 16.
    """
    height, width = image_BCHW.shape[-2:]
    x = _normed(_conv(weights, "model0.1", F.pad(image_BCHW, (3,) * 4, mode="reflect")))
    for name in ("model1.0", "model1.3"):
        x = _normed(_conv(weights, name, x, stride=2, padding=1))
    for block in range(BLOCKS):
        inner = x
        for place in (1, 5):
            name = f"model2.{block}.conv_block.{place}"
            inner = F.instance_norm(_conv(weights, name, F.pad(inner, (1,) * 4, mode="reflect")))
            inner = F.relu(inner) if place == 1 else inner
        x = x + inner
    for name in ("model3.0", "model3.3"):
        up = F.conv_transpose2d(
            x, weights[f"{name}.weight"], weights[f"{name}.bias"],
            stride=2, padding=1, output_padding=1,
        )  # fmt: skip
        x = _normed(up)
    x = _conv(weights, "model4.1", F.pad(x, (3,) * 4, mode="reflect"))
    return x.sigmoid()[:, 0, :height, :width]


def _normed(x: Tensor) -> Tensor:
    return F.relu(F.instance_norm(x))


def _conv(weights: Weights, name: str, x: Tensor, *, stride: int = 1, padding: int = 0) -> Tensor:
    return F.conv2d(
        x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=stride, padding=padding
    )
