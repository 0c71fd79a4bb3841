"""What no pipeline call can be given, refused before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from prw_flux.tasks.inpainting import Inpaint


def require_no_source(given: Mapping[str, Any]) -> None:
    """Raise ValueError if an argument is given that acts on a source, in a call without one."""
    found = [name for name, value in given.items() if value is not None]
    if found:
        raise ValueError(
            f"{' and '.join(f'{name}=' for name in found)} act{'s' * (len(found) == 1)} on a "
            "source: pass image=, images= or source_cache=."
        )


def require_numbers(**given: float | None) -> None:
    """Raise ValueError for one that is not a finite number of at least 0."""
    for name, value in given.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Real):
            raise ValueError(f"{name} must be a number, got {value!r}.")
        if not (math.isfinite(value) and value >= 0.0):
            raise ValueError(f"{name} must be finite and at least 0, got {value!r}.")


def require_stream(there: bool, representation: float, image_guidance: float) -> None:
    """Raise ValueError for guidance by features that there are not, or by two things at once."""
    if representation == 1.0:
        return
    if not there:
        raise ValueError(
            f"representation_scale={representation} acts on a feature stream, and this adapter was "
            "trained without one: leave it out."
        )
    if representation != 0.0 and image_guidance != 1.0:
        raise ValueError(
            f"representation_scale={representation} and image_guidance_scale={image_guidance} "
            "cannot guide one picture together: leave one of them at 1."
        )


def require_sizes(step: int, **given: Any) -> None:
    """Raise ValueError for a size that is neither None nor a positive int (or two of them)."""
    for name, value in given.items():
        parts = value if isinstance(value, (tuple, list)) else (value,)
        good = [isinstance(p, Integral) and not isinstance(p, bool) and int(p) > 0 for p in parts]
        if value is None or (
            all(good) and len(good) in ((1, 2) if name == "source_size" else (1,))
        ):
            continue
        form = ", or (height, width)" if name == "source_size" else ""
        raise ValueError(
            f"{name} must be a positive number of pixels{form}, a multiple of {step}, "
            f"got {value!r}."
        )


def require_mask(mask_image: Any, task: str) -> None:
    """Raise ValueError for a mask that the task does not know."""
    if mask_image is not None and task != Inpaint.name:
        raise ValueError(
            f"mask_image= belongs to task={Inpaint.name!r}, not {task!r}: leave it out."
        )


def require_kwargs(joint_attention_kwargs: Any) -> None:
    """Raise ValueError for the one key that is taken, TypeError for what has no keys."""
    if joint_attention_kwargs is None:
        return
    if not isinstance(joint_attention_kwargs, Mapping):
        raise TypeError(
            f"joint_attention_kwargs must be a dict, got {type(joint_attention_kwargs).__name__}."
        )
    if "prw" in joint_attention_kwargs:
        raise ValueError('joint_attention_kwargs["prw"] is set by the pipeline: leave it out.')


def require_no_ip_adapter(given: Mapping[str, Any]) -> None:
    """Raise ValueError for pictures of an IP-Adapter, in a call with a source."""
    found = [name for name, value in given.items() if value is not None]
    if found:
        raise ValueError(
            f"{found[0]}= belongs to an IP-Adapter, which cannot stand beside a source: leave one "
            "of them out."
        )


def require_counts(
    prompts: int,
    beside: Mapping[str, Any],
    *,
    num_images_per_prompt: Any,
    num_inference_steps: Any,
    generator: Any,
) -> None:
    """Raise ValueError for numbers of things that do not go together.

    Args:
        prompts: of the call.
        beside: other texts, or embeddings, by argument; one text serves all prompts.
        num_images_per_prompt, num_inference_steps, generator: of the call.
    """
    whole = {
        "num_images_per_prompt": num_images_per_prompt,
        "num_inference_steps": num_inference_steps,
    }
    for name, value in whole.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
    if prompts == 0:
        raise ValueError("The list of prompts is empty: give a prompt.")
    for name, value in beside.items():
        if isinstance(value, (list, Tensor)) and len(value) != prompts:
            raise ValueError(
                f"{name} has {len(value)} entries for {_counted(prompts)}: give as many, or one "
                "text for all."
            )
    results = prompts * num_images_per_prompt
    if isinstance(generator, list) and len(generator) != results:
        raise ValueError(
            f"{len(generator)} generators cannot make the noise of {results} results: give one, or "
            "one per result."
        )


def _counted(prompts: int) -> str:
    return f"{prompts} prompt{'s' * (prompts != 1)}"


def require_pairs(batches: Iterable[int], prompts: int) -> None:
    """Raise ValueError unless each reference is one image, or one per prompt."""
    for batch in batches:
        if batch not in (1, prompts):
            raise ValueError(
                f"{batch} source images do not pair with {_counted(prompts)}: give one image, or "
                "one per prompt; several references of one result are images=[...]."
            )


def require_latents(
    latents: Any, size: tuple[int, int], step: int, channels: int, samples: int
) -> None:
    """Raise ValueError unless the noise is packed and fills the result."""
    tokens = (size[0] // step) * (size[1] // step)
    wanted = [samples, tokens, channels]
    found = list(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
    if latents is not None and found != wanted:
        raise ValueError(
            f"latents must be packed noise {wanted} for {samples} results of {size[0]} x {size[1]} "
            f"pixels, got {found}: give height= and width= that belong to them."
        )


def require_pooled(pooled: Any, width: int, batches: Iterable[int]) -> None:
    """Raise ValueError unless a pooled text is [1, P], or has a row per source of a batch."""
    if pooled is None:
        return
    shape = list(pooled.shape) if isinstance(pooled, Tensor) else []
    rows = {1, *batches}
    if len(shape) != 2 or shape[1] != width or shape[0] not in rows:
        found = shape or type(pooled).__name__
        raise ValueError(
            f"source_pooled_embeds must be [{' or '.join(map(str, sorted(rows)))}, {width}], a "
            f"pooled text of all sources or of each, got {found}."
        )
