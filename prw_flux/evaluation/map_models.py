"""Models that read a map from a picture: edges, line art, depth, classes, behind one interface.

A score compares two maps, so the name of what made them is part of it: a Sobel edge is no HED.
Shapes: H, W pixels of the picture.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Final, TypeAlias, final

import numpy as np
import torch
from numpy.typing import NDArray

from prw_flux.data.extractors import EXTRACTORS
from prw_flux.evaluation.encoders import EncoderError, found_type, load_quietly, named, own_callable
from prw_flux.tasks.base import Image

Map: TypeAlias = NDArray[Any]
CLASSICAL: Final = {"canny": "canny", "hed": "softedge", "lineart": "lineart"}
"""What is computed without a model for each condition; only canny is what papers use."""
DEPTH: Final = "Intel/dpt-large"
SEGMENTATION: Final = "facebook/mask2former-swin-large-ade-semantic"
"""The public scripts' depth model, and the twin on the Hub of their segmentation model."""


class MapModel(ABC):
    """A picture in, a map out.

    Attributes:
        kind: the sort of model ("dpt", "mask2former", "cv2-rgb-100-200", what the user says).
        name: Hub id, "local:<folder>", or ``package.module:object``.
    """

    kind: str
    name: str

    @abstractmethod
    def __call__(self, image: Image) -> Map:
        """uint8 [H, W, 3] -> [H, W]: lines white on black uint8, depth float, classes integer."""


@final
class Classical(MapModel):
    """An extractor without weights."""

    def __init__(self, condition: str) -> None:
        self._extract = EXTRACTORS[CLASSICAL[condition]]
        self.kind, self.name = self._extract.method, "prw"

    def __call__(self, image: Image) -> Map:
        """uint8 [H, W]."""
        return self._extract(image)


@final
class OwnMap(MapModel):
    """Any callable on a picture.

    Args:
        spec: ``package.module:object``, or ``kind=package.module:object`` where `kind` says what
            the object is, on the user's word ("hed", "informative-drawings").

    Raises:
        EncoderError: there is no such object, or it cannot be called.
    """

    def __init__(self, spec: str) -> None:
        kind, equals, place = spec.rpartition("=")
        self.kind, self.name = (kind if equals else "own"), place
        self._call: Callable[[Image], Any] = own_callable(place)

    def __call__(self, image: Image) -> Map:
        """What the callable returns, checked.

        Raises:
            EncoderError: it is no [H, W] of finite numbers.
        """
        found = np.asarray(self._call(image))
        numeric = np.issubdtype(found.dtype, np.number) or found.dtype == np.bool_
        if found.ndim != 2 or not numeric or not np.isfinite(found).all():
            raise EncoderError(f"{self.name} must return finite [H, W], got {list(found.shape)}.")
        return found


@final
class DepthModel(MapModel):
    """A depth estimator of transformers (DPT, Depth Anything), prepared by its own processor.

    Args:
        where: a folder or a Hub id.
        device: where it runs.

    Raises:
        EncoderError: it is not there.
    """

    def __init__(self, where: str, device: str = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation

        self.kind, self.name, self._device = found_type(where), named(where), device
        self._model = load_quietly(where, AutoModelForDepthEstimation).to(device)
        self._processor = load_quietly(where, AutoImageProcessor)

    @torch.no_grad()
    def __call__(self, image: Image) -> Map:
        """float [h, w] of the model's own size, larger is nearer."""
        inputs = self._processor(images=image, return_tensors="pt").to(self._device)
        return np.asarray(self._model(**inputs).predicted_depth[0].float().cpu())


@final
class SegmentationModel(MapModel):
    """A universal segmentation model of transformers (Mask2Former, OneFormer, MaskFormer).

    Args, Raises: as `DepthModel`.
    """

    def __init__(self, where: str, device: str = "cpu") -> None:
        from transformers import (
            AutoImageProcessor,
            AutoModelForUniversalSegmentation,
            OneFormerProcessor,
        )

        self.kind, self.name, self._device = found_type(where), named(where), device
        self._model = load_quietly(where, AutoModelForUniversalSegmentation).to(device)
        worded = self.kind == "oneformer"  # it is told what to segment
        self._processor = load_quietly(where, OneFormerProcessor if worded else AutoImageProcessor)

    @torch.no_grad()
    def __call__(self, image: Image) -> Map:
        """int [H, W], the model's class numbers."""
        words = {"task_inputs": ["semantic"]} if self.kind == "oneformer" else {}
        inputs = self._processor(images=image, return_tensors="pt", **words).to(self._device)
        outputs = self._model(**inputs)
        (found,) = self._processor.post_process_semantic_segmentation(
            outputs, target_sizes=[image.shape[:2]]
        )
        return np.asarray(found.cpu())


def map_model(condition: str, spec: str | None, device: str = "cpu") -> MapModel:
    """The model for a condition of MultiGen.

    Args:
        condition: canny, hed, lineart, depth or seg.
        spec: None for the default, a folder or Hub id (depth, seg), ``package.module:object`` or
            ``kind=package.module:object``.
        device: where it runs.

    Raises:
        EncoderError: it is not there, or cannot be what was asked for.
    """
    if spec is not None and re.fullmatch(r"([\w-]+=)?[\w.]+:\w+", spec):
        return OwnMap(spec)
    if condition == "depth":
        return DepthModel(spec or DEPTH, device)
    if condition == "seg":
        return SegmentationModel(spec or SEGMENTATION, device)
    if spec is not None:
        raise EncoderError(
            f"--maps {spec}: for {condition} name a callable, as package.module:object; leave it "
            f"out for the classical {CLASSICAL[condition]}."
        )
    return Classical(condition)
