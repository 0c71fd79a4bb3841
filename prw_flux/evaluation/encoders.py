"""Models that turn pictures and texts into vectors, behind one small interface.

A name is part of every score: similarity under SqueezeNet is no CLIP-I. So an encoder has a `kind`
("clip", "dino", or another model type) and a `name`, and benchmarks print both.

The pictures are prepared here and not by transformers' processors, which without torchvision are
other classes with other rounding. Shapes: N pictures or texts; D width; S side.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias, final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage
from torch import Tensor

from prw import ConfigError
from prw.named_object import named_object
from prw_flux.tasks.base import Image

Vectors: TypeAlias = NDArray[np.float32]
BATCH: Final = 32


class EncoderError(ValueError):
    """An encoder that is not there, is another model than was asked for, or answers nonsense."""


@final
@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Short side to `resize` (bicubic, anti-aliased), centre `crop`, (x / 255 - mean) / std.

    As torchvision's Resize and CenterCrop on PIL pictures: the long side is cut to a whole pixel,
    the offset of the crop rounded.
    """

    resize: int
    crop: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, image: Image) -> Tensor:
        """uint8 [H, W, 3] -> float32 [3, crop, crop]."""
        height, width = image.shape[:2]
        short = min(height, width)
        size = (int(self.resize * width / short), int(self.resize * height / short))
        picture = PILImage.fromarray(image).resize(size, PILImage.Resampling.BICUBIC)
        x, y = (round((side - self.crop) / 2) for side in size)
        picture = picture.crop((x, y, x + self.crop, y + self.crop))
        x_HW3 = torch.from_numpy(np.array(picture, np.float32)) / 255.0
        return ((x_HW3 - torch.tensor(self.mean)) / torch.tensor(self.std)).permute(2, 0, 1)


CLIP: Final = Preparation(
    resize=224, crop=224,
    mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711),
)  # fmt: skip
"""OpenAI's own (clip.load); of a model of another side, the side is replaced."""

DINO: Final = Preparation(
    resize=256, crop=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)
"""The authors' evaluation; the Hub's preprocessor of the same weights resizes to 224 at once."""


class Encoder(ABC):
    """Pictures, and where the model can, texts, as vectors.

    Attributes:
        kind: "clip", "dino", or the type of another model; scores are named after it.
        name: Hub id, "local:<folder>", or the ``package.module:object`` of the user's own.
    """

    kind: str
    name: str

    @abstractmethod
    def images(self, images: Sequence[Image]) -> Vectors:
        """N pictures uint8 [H, W, 3] of any sizes -> float32 [N, D]."""

    def texts(self, texts: Sequence[str]) -> Vectors:
        """N texts -> float32 [N, D].

        Raises:
            EncoderError: the model knows no texts.
        """
        raise EncoderError(f"{self.name} encodes no texts: CLIP-T needs a CLIP model.")


@final
class ClipEncoder(Encoder):
    """A CLIP of transformers: projected features; texts longer than its context are cut.

    Args:
        where: a folder or a Hub id.
        device: where it runs.

    Raises:
        EncoderError: it is not there, or no CLIP.
    """

    kind = "clip"

    def __init__(self, where: str, device: str = "cpu") -> None:
        from transformers import AutoTokenizer, CLIPModel

        self.name, self._device = named(where), device
        _require_type(where, "CLIP", ("clip",))
        self._model = load_quietly(where, CLIPModel).to(device)
        self._tokenizer = load_quietly(where, AutoTokenizer)
        side = int(self._model.config.vision_config.image_size)
        self._prepare = Preparation(resize=side, crop=side, mean=CLIP.mean, std=CLIP.std)

    @torch.no_grad()
    def images(self, images: Sequence[Image]) -> Vectors:
        """N pictures -> the projected features, float32 [N, D], not normalised."""
        return _batched(images, self._some_images)

    def _some_images(self, images: Sequence[Image]) -> Tensor:
        x = torch.stack([self._prepare(image) for image in images]).to(self._device)
        pooled = self._model.vision_model(pixel_values=x).pooler_output
        return torch.as_tensor(self._model.visual_projection(pooled))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Vectors:
        """N texts -> the projected features, float32 [N, D], not normalised."""
        return _batched(texts, self._some_texts)

    def _some_texts(self, texts: Sequence[str]) -> Tensor:
        context = int(self._model.config.text_config.max_position_embeddings)
        tokens = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=context, return_tensors="pt"
        ).to(self._device)
        pooled = self._model.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        return torch.as_tensor(self._model.text_projection(pooled))


@final
class DinoEncoder(Encoder):
    """A DINO of transformers (`facebook/dino-vits16`): the class token after the last norm.

    DINOv2 and v3 load as well and are of another `kind`: their numbers are others.

    Args, Raises: as `ClipEncoder`.
    """

    def __init__(self, where: str, device: str = "cpu") -> None:
        from transformers import AutoModel

        self.name, self._device = named(where), device
        found = _require_type(
            where, "DINO", ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")
        )
        self.kind = "dino" if found == "vit" else found
        self._model = load_quietly(where, AutoModel).to(device)

    @torch.no_grad()
    def images(self, images: Sequence[Image]) -> Vectors:
        """N pictures -> float32 [N, D]."""
        return _batched(images, self._some_images)

    def _some_images(self, images: Sequence[Image]) -> Tensor:
        x = torch.stack([DINO(image) for image in images]).to(self._device)
        return torch.as_tensor(self._model(pixel_values=x).last_hidden_state[:, 0])


@final
class OwnEncoder(Encoder):
    """Any callable on a list of pictures.

    Args:
        spec: ``package.module:object``; the object takes a list of uint8 [H, W, 3] and returns
            [N, D] (array or tensor).

    Raises:
        EncoderError: there is no such object, or it cannot be called.
    """

    kind = "own"

    def __init__(self, spec: str) -> None:
        self.name = spec
        self._call: Callable[[list[Image]], Any] = own_callable(spec)

    def images(self, images: Sequence[Image]) -> Vectors:
        """What the callable returns, checked: float32 [N, D].

        Raises:
            EncoderError: it is no [N, D] of finite numbers.
        """
        found = np.asarray(self._call(list(images)), np.float32)
        if found.ndim != 2 or len(found) != len(images) or not np.isfinite(found).all():
            raise EncoderError(
                f"{self.name} must return finite [{len(images)}, D], got {list(found.shape)}."
            )
        return found


def own_callable(spec: str) -> Callable[..., Any]:
    """The object that ``package.module:object`` names.

    Raises:
        EncoderError: there is no such object, or it cannot be called.
    """
    try:
        found = named_object(spec, "encoder")
    except ConfigError as problem:
        raise EncoderError(str(problem)) from None
    if not callable(found):
        raise EncoderError(f"encoder {spec!r} must name a callable, as package.module:object.")
    call: Callable[..., Any] = found
    return call


def _batched(items: Sequence[Any], encode: Callable[[Sequence[Any]], Tensor]) -> Vectors:
    parts = [encode(items[i : i + BATCH]).float().cpu() for i in range(0, len(items), BATCH)]
    return np.asarray(torch.cat(parts).numpy(), np.float32)


def named(where: str) -> str:
    """How a model is called in protocols: its Hub id, or "local:" and the folder's last name."""
    folder = Path(where)
    return f"local:{folder.resolve().name}" if folder.is_dir() else where


def load_quietly(where: str, kind: Any) -> Any:
    """`kind.from_pretrained`, in eval mode and fp32 where it is a model; one sentence if it fails.

    The hub's libraries raise OSError, ValueError and their own for what is absent or offline.
    """
    try:
        found = kind.from_pretrained(where)
    except Exception as problem:
        detail = " ".join(str(problem).split())[:200]
        raise EncoderError(
            f"The encoder {where} cannot be loaded ({detail}): name a folder that holds it, or a "
            "Hub id that is reachable."
        ) from problem
    return found.float().eval() if isinstance(found, torch.nn.Module) else found


def found_type(where: str) -> str:
    """The model type that config.json states.

    Raises:
        EncoderError: there is no such folder or id.
    """
    folder = Path(where)
    if folder.is_dir():
        try:
            return str(json.loads((folder / "config.json").read_text("utf-8"))["model_type"])
        except (OSError, ValueError, KeyError, TypeError):
            raise EncoderError(f"{where} holds no config.json with a model_type.") from None
    if where.count("/") != 1 or where.startswith((".", "/", "~")):
        raise EncoderError(f"There is no encoder at {where}: name a folder, or a Hub id.")
    from transformers import AutoConfig

    return str(load_quietly(where, AutoConfig).model_type)


def _require_type(where: str, wanted: str, types: tuple[str, ...]) -> str:
    """The model type, one of `types`.

    Raises:
        EncoderError: there is no such folder or id, or it is another model.
    """
    found = found_type(where)
    if found not in types:
        raise EncoderError(f"{where} is a {found!r} model, not a {wanted}: expected {types[0]!r}.")
    return found
