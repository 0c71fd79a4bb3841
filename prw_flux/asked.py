"""What a pipeline call says, read into one form; nothing is computed of it yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from prw_flux.arguments import require_sizes
from prw_flux.encode import ImageInput
from prw_flux.references import Sizes
from prw_flux.source_cache import SourceCache

Images: TypeAlias = tuple[ImageInput | Sequence[ImageInput], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """What a call says about its source.

    Attributes:
        images: one entry per reference, each an image or a batch.
        caches: of `encode_source`, one per reference.
        task, route, scale: None where the call does not say.
        sizes: of result and source.
        mask_image: the hole of an inpainting source.
        pooled: [B, P] instead of the pooled text that the adapter asks for.
    """

    images: Images = ()
    caches: tuple[SourceCache, ...] = ()
    task: str | None = None
    route: str | None = None
    scale: float | None = None
    sizes: Sizes = Sizes()
    mask_image: Any = None
    pooled: Tensor | None = None


def text_first(image: Any, prompt: Any) -> tuple[Any, Any]:
    """(image, prompt), where a text may stand first, as in FluxPipeline.

    Raises:
        TypeError: for two texts, or a path.
    """
    is_text = isinstance(image, str) or (
        isinstance(image, list) and bool(image) and all(isinstance(one, str) for one in image)
    )
    if is_text and isinstance(prompt, (str, list)):
        raise TypeError(
            f"image must be PIL, numpy, a tensor or latents, got the text {image!r}: open a file "
            "first, diffusers.utils.load_image(...)."
        )
    if is_text and prompt is None:
        return None, image
    if prompt is not None and not isinstance(prompt, (str, list)):
        raise TypeError(
            f"prompt must be a str or a list of str, got {type(prompt).__name__}; the source comes "
            "first, as in FluxKontextPipeline: pass image= and prompt= by name."
        )
    return image, prompt


def all_images(image: Any, images: Any) -> Images:
    """One entry per reference, from either keyword.

    Raises:
        ValueError, TypeError: both are given, or `images` is not a list.
    """
    if images is None:
        return () if image is None else (image,)
    if image is not None:
        raise ValueError("Pass image= (one source, or a batch) or images= (references), not both.")
    if not isinstance(images, (list, tuple)) or not images:
        raise TypeError("images= is a list with one entry per reference, and at least one.")
    return tuple(images)


def all_caches(source_cache: Any) -> tuple[SourceCache, ...]:
    """One cache per reference.

    Raises:
        TypeError: something else was given.
    """
    if source_cache is None:
        return ()
    caches = tuple(source_cache) if isinstance(source_cache, (list, tuple)) else (source_cache,)
    odd = next((c for c in caches if not isinstance(c, SourceCache)), None)
    if odd is not None or not caches:
        what = type(odd).__name__ if caches else "an empty list"
        raise TypeError(
            f"source_cache must be what encode_source returned, got {what}: a file is read with "
            "SourceCache.load(path)."
        )
    return caches


def prompt_count(prompt: Any, prompt_embeds: Tensor | None) -> int:
    """Prompts of a call."""
    if prompt_embeds is not None:
        return int(prompt_embeds.shape[0])
    return len(prompt) if isinstance(prompt, list) else 1


def sizes_of(
    height: int | None,
    width: int | None,
    source_size: int | tuple[int, int] | None,
    max_area: int | None,
    auto_resize: bool,
    *,
    step: int,
    trained: int | None,
) -> Sizes:
    """The sizes of a call, as plain ints, whatever library counted them.

    Args:
        height, width, source_size, max_area, auto_resize: of the call.
        step: side of a token in pixels.
        trained: `resolution` of the adapter, if there is one and knows it.

    Raises:
        ValueError: for one that cannot be.
    """
    require_sizes(step, height=height, width=width, source_size=source_size, max_area=max_area)
    return Sizes(
        height=_plain(height),
        width=_plain(width),
        source_size=_plain(source_size),
        resolution=trained if max_area is None else int(max_area) ** 0.5,
        auto_resize=auto_resize,
        step=step,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(int(part) for part in value)
    return None if value is None else int(value)
