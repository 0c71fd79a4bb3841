"""Condition maps by name: "canny", "softedge_classical", "depth:WEIGHTS" and so on.

A learned extractor needs weights, which are never chosen or downloaded by themselves: a folder, a
file or a Hub id after the colon. The classical fallbacks have names of their own, because a soft
edge from a Sobel filter is not one from a network.

Learned extractors see the picture at a short side of at most 512 pixels, what they were trained at;
the map is brought back to the picture's size.
"""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Final

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage
from torch import Tensor

from prw import ConfigError
from prw_flux.data import edge_networks
from prw_flux.data.extractors import EXTRACTORS, Extractor, Image
from prw_flux.data.remote import fingerprint
from prw_flux.tasks.base import digest_of

SHORT: Final = 512
Map = NDArray[np.uint8]
Compute = Callable[[Image], Map]

PLAIN: Final[Mapping[str, str]] = {
    "canny": "canny",
    "softedge_classical": "softedge",
    "lineart_classical": "lineart",
}
"""Extractors without weights: name, and key in `EXTRACTORS`."""

EXAMPLES: Final[Mapping[str, str]] = {
    "softedge": "ControlNetHED as safetensors",
    "lineart": "sk_model of informative-drawings as safetensors",
    "depth": "depth-anything/Depth-Anything-V2-Small-hf",
    "segmentation": "facebook/mask2former-swin-large-ade-semantic",
}
"""Extractors with weights, and what weights there are."""

HEADS: Final[Mapping[str, str]] = {
    "depth": "ForDepthEstimation",
    "segmentation": "Segmentation",
}
"""What the classes of models are called."""

METRIC: Final = frozenset({"zoedepth", "depth_pro", "glpn", "prompt_depth_anything"})
"""Model types that predict distances; others predict what is large where it is near."""


def open_extractors(specs: Sequence[str], device: str = "cpu") -> tuple[Extractor, ...]:
    """The extractors of some specifications, each "NAME" or "NAME:WEIGHTS".

    Args:
        specs: names in `PLAIN`, or in `EXAMPLES` with a folder, a safetensors file or a Hub id.
        device: where networks run.

    Raises:
        ConfigError: an unknown name, weights that are missing, not there or of another model, or
            two extractors of the same condition.
    """
    found: dict[str, Extractor] = {}
    for spec in specs:
        extractor = _open(spec.strip(), device)
        if extractor.condition in found:
            raise ConfigError(f"--conditions: {spec!r} is a second {extractor.condition}; name one")
        found[extractor.condition] = extractor
    return tuple(found.values())


def _open(spec: str, device: str) -> Extractor:
    name, colon, weights = spec.partition(":")
    if name in PLAIN:
        if colon:
            raise ConfigError(f"condition {spec!r}: {name} takes no weights")
        return EXTRACTORS[PLAIN[name]]
    if name not in EXAMPLES:
        known = [*PLAIN, *(f"{one}:WEIGHTS" for one in EXAMPLES)]
        near = difflib.get_close_matches(name, [*PLAIN, *EXAMPLES], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        raise ConfigError(f"there is no condition {name!r}; {hint}")
    if not weights:
        instead = f", or take {name}_classical" if f"{name}_classical" in PLAIN else ""
        raise ConfigError(
            f"the condition {name!r} needs weights: {name}:WEIGHTS, a folder, a file or a Hub id "
            f"({EXAMPLES[name]}){instead}"
        )
    if name in ("softedge", "lineart"):
        return _network(name, weights, device)
    compute, method = (_depth if name == "depth" else _segmentation)(weights, device)
    return Extractor(name, method, _small(compute, labels=name == "segmentation"))


def _network(name: str, where: str, device: str) -> Extractor:
    path = _weights_file(name, where)
    shapes = edge_networks.hed_shapes() if name == "softedge" else edge_networks.drawing_shapes()
    weights = _read(path, shapes, device)

    @torch.inference_mode()
    def compute(image: Image) -> Map:
        x = torch.from_numpy(image).to(device).permute(2, 0, 1)[None].float()
        if name == "softedge":
            lines = edge_networks.hed(weights, x)
        else:
            lines = 1 - edge_networks.drawing(weights, x / 255)
        return np.asarray((lines[0] * 255).round().to("cpu", torch.uint8).numpy())

    kind = "hed" if name == "softedge" else "informative-drawings"
    return Extractor(name, f"{kind} {fingerprint([path])[:12]}", _small(compute))


def _weights_file(name: str, where: str) -> Path:
    path = Path(where).expanduser()
    if path.is_dir():
        path = path / "model.safetensors"
    if path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        raise ConfigError(
            f"{name} weights {where} are a pickle, which is not opened here; convert them once: "
            f"safetensors.torch.save_file(torch.load({path.name!r}, weights_only=True), "
            f"{path.with_suffix('.safetensors').name!r})"
        )
    if path.is_file():
        return path
    if where.count("/") == 1 and not where.startswith((".", "/", "~")) and not path.suffix:
        return Path(_or_sentence(name, where, lambda: _downloaded(where)))
    raise ConfigError(f"{name} weights: there is no file {path}")


def _downloaded(repository: str) -> str:
    from huggingface_hub import hf_hub_download

    return str(hf_hub_download(repository, "model.safetensors"))


def _read(path: Path, shapes: Mapping[str, tuple[int, ...]], device: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as problem:
        raise ConfigError(f"{path} is not a safetensors file, or is damaged ({problem})") from None
    for name, shape in shapes.items():
        if name not in weights or tuple(weights[name].shape) != shape:
            have = list(weights[name].shape) if name in weights else "nothing"
            raise ConfigError(f"{path} holds other weights: {name} is {have}, not {list(shape)}")
    return {name: weights[name].float().to(device) for name in shapes}


def _depth(where: str, device: str) -> tuple[Compute, str]:
    pipe = _pipeline("depth-estimation", "depth", where, device)
    config = pipe.model.config
    distances = config.model_type in METRIC
    distances |= getattr(config, "depth_estimation_type", "relative") == "metric"

    def compute(image: Image) -> Map:
        found = pipe(PILImage.fromarray(image))["predicted_depth"]
        depth = found.detach().float().cpu().numpy().squeeze()
        return near_white(1 / np.maximum(depth, 1e-3) if distances else depth)

    return _alone(compute), _method(pipe)


def near_white(nearness: NDArray[np.floating[Any]]) -> Map:
    """Inverse depth, large where near, to uint8 [H, W]: its least is 0, its largest 255."""
    low, high = float(nearness.min()), float(nearness.max())
    if not high > low:
        return np.zeros(nearness.shape, np.uint8)
    return np.asarray(np.rint((nearness - low) * (255 / (high - low))), np.uint8)


def _segmentation(where: str, device: str) -> tuple[Compute, str]:
    """Class indices from 1 on; 0 is a pixel of no class."""
    pipe = _pipeline("image-segmentation", "segmentation", where, device)
    labels: Mapping[str, int] = {str(k): int(v) for k, v in pipe.model.config.label2id.items()}
    if max(labels.values()) > 254:
        raise ConfigError(f"segmentation model {where} has more than 255 classes")

    def compute(image: Image) -> Map:
        indices = np.zeros(image.shape[:2], np.uint8)
        for part in pipe(PILImage.fromarray(image), subtask="semantic"):
            indices[np.asarray(part["mask"]) > 127] = labels[part["label"]] + 1
        return indices

    return _alone(compute), _method(pipe)


def _pipeline(task: str, name: str, where: str, device: str) -> Any:
    from transformers import AutoConfig, pipeline

    path = Path(where).expanduser()
    if path.is_dir():
        where = str(path)
    elif where.count("/") != 1 or where.startswith((".", "/", "~")):
        raise ConfigError(f"{name} weights: there is no folder {path}")
    config = _or_sentence(name, where, lambda: AutoConfig.from_pretrained(where))
    found = ", ".join(config.architectures or [])
    if found and HEADS[name] not in found:  # transformers only logs that it is of another task
        raise ConfigError(f"{name} weights {where!r} are a {found}, no model for {task}")
    return _or_sentence(name, where, lambda: pipeline(task, model=where, device=device))


def _or_sentence(name: str, where: str, load: Callable[[], Any]) -> Any:
    """What `load` gives; the hub's libraries raise OSError, ValueError and their own."""
    try:
        return load()
    except Exception as problem:
        told = textwrap.shorten(re.split(r"\.\s", str(problem))[0], 160, placeholder=" ...")
        place = "" if Path(where).is_dir() else "there is no such folder, and as a Hub id: "
        raise ConfigError(
            f"{name} weights {where!r} cannot be loaded ({place}{told}); name a folder that holds "
            "the model, or a Hub id that is reachable"
        ) from problem


def _method(pipe: Any) -> str:
    """Model type and a digest of the weights' bits: two trainings of one model differ."""
    model = pipe.model
    sample = np.concatenate([
        p.detach().flatten()[:64].float().cpu().numpy() for p in model.parameters()
    ])  # fmt: skip
    return f"{model.config.model_type} {digest_of(sample.tobytes())[:12]}"


def _alone(compute: Compute) -> Compute:
    """One call at a time: builds decode in several threads, a pipeline keeps state."""
    lock = Lock()

    def locked(image: Image) -> Map:
        with lock:
            return compute(image)

    return locked


def _small(compute: Compute, *, labels: bool = False) -> Compute:
    """`compute` on a picture of a short side of at most `SHORT`, its map at the whole size."""

    def scaled(image: Image) -> Map:
        height, width = image.shape[:2]
        scale = SHORT / min(height, width)
        small = image
        if scale < 1:
            size = round(width * scale), round(height * scale)
            small = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
        found = compute(small)
        if found.shape != (height, width):
            how = cv2.INTER_NEAREST if labels else cv2.INTER_LINEAR
            found = np.asarray(cv2.resize(found, (width, height), interpolation=how), np.uint8)
        return found

    return scaled
