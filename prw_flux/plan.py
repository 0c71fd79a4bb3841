"""From what a call says about its source to what will be encoded, and where it is placed."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import prw
from prw_flux import arguments
from prw_flux.adapter import PRWAdapter, TaskSpec
from prw_flux.asked import Asked
from prw_flux.references import Reference, references

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """A call's source, checked and fitted; nothing of it has been encoded.

    Attributes:
        adapter, spec, route, scale: who acts, how and how strongly.
        call: the routing call.
        references: of the images; empty where there are only caches.
        size: (height, width) of the result.
    """

    adapter: PRWAdapter
    spec: TaskSpec
    route: str
    scale: float
    call: prw.Call
    references: tuple[Reference, ...]
    size: tuple[int, int]

    @property
    def text(self) -> str | None:
        """What modulates the source, see `PRWAdapter.source_text`."""
        return self.adapter.source_text(self.spec.sentence)


def make_plan(adapter: PRWAdapter, asked: Asked, channels: int) -> Plan:
    """Check and fit everything a call says about its source.

    Args:
        adapter: attached.
        asked: at least one image or cache.
        channels: of latents.

    Raises:
        ValueError, TypeError: for what cannot work.
    """
    arguments.require_numbers(source_scale=asked.scale)
    task = asked.task
    if asked.caches:
        task = asked.caches[0].meta.task if task is None else task
        if not asked.images:
            _require_encoded(asked)
            _require_apart(adapter, asked)
    spec = adapter.task(task)
    adapter.require_trained(spec.name)
    arguments.require_mask(asked.mask_image, spec.name)
    route = asked.route or "free"
    call = adapter.route(route)
    found = references(asked.images, spec, asked.sizes, channels, asked.mask_image)
    if found:
        size = found[0].result
    else:
        meta = asked.caches[0].meta
        size = asked.sizes.result((meta.height, meta.width))
    _warn_of_rounding(asked, size)
    return Plan(
        adapter=adapter,
        spec=spec,
        route=route,
        scale=1.0 if asked.scale is None else float(asked.scale),
        call=call,
        references=found,
        size=size,
    )


def _require_encoded(asked: Asked) -> None:
    """Raise ValueError for what acts when a source is encoded, in a call that has only a cache."""
    late = {"mask_image": asked.mask_image, "source_size": asked.sizes.source_size}
    found = [f"{name}=" for name, value in late.items() if value is not None]
    if found:
        raise ValueError(
            f"{' and '.join(found)} would come too late for a source that is encoded: give it to "
            "encode_source, or pass image= beside the cache."
        )


def _require_apart(adapter: PRWAdapter, asked: Asked) -> None:
    """Raise ValueError where two caches beside the result would claim the same positions."""
    tasks = adapter.tasks
    right = 0
    for cache in sorted(asked.caches, key=lambda cache: cache.meta.place):
        task = tasks.get(cache.meta.task or "")
        if task is None or task.aligned:
            continue
        columns = 1 if cache.picture is None else cache.picture.shape[-1] // asked.sizes.step
        if cache.meta.place - columns < right:
            raise ValueError(
                "Two of these source caches lie at the same place beside the result: encode them "
                "together, encode_source(images=[...])."
            )
        right = cache.meta.place


def _warn_of_rounding(asked: Asked, size: tuple[int, int]) -> None:
    given = {"height": asked.sizes.height, "width": asked.sizes.width}
    for (name, wanted), used in zip(given.items(), size, strict=True):
        if wanted is not None and wanted != used:
            logger.warning("%s=%d is no multiple of %d: the result has %d.",
                           name, wanted, asked.sizes.step, used)  # fmt: skip
