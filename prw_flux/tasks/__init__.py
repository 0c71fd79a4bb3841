"""The five tasks, by name, and how a sixth one of the user's own is found."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from prw.named_object import named_object
from prw_flux.tasks.base import (
    Box,
    DataSource,
    Example,
    Image,
    Mask,
    Pair,
    Task,
    TaskReject,
    Thing,
    Triple,
)
from prw_flux.tasks.control import Control
from prw_flux.tasks.customised import Customise
from prw_flux.tasks.editing import Edit
from prw_flux.tasks.grounding import Ground, read_overlay
from prw_flux.tasks.inpainting import Inpaint

__all__ = [
    "TASKS",
    "Box",
    "Control",
    "Customise",
    "DataSource",
    "Edit",
    "Example",
    "Ground",
    "Image",
    "Inpaint",
    "Mask",
    "Pair",
    "Task",
    "TaskReject",
    "Thing",
    "Triple",
    "load_task",
    "read_overlay",
]

TASKS: Final[Mapping[str, Task]] = MappingProxyType(
    {task.name: task for task in (Inpaint(), Ground(), Control(), Customise(), Edit())}
)
"""The five tasks that come with the package, by name, in the order of the curriculum."""


def load_task(spec: str) -> Task:
    """The task named by `spec`: "inpaint", or "package.module:object" for one of the user's own.

    The object is a Task, or a Task class that can be made without arguments.

    Raises:
        ValueError: in one sentence, what is wrong with the name and what is near it.
    """
    if ":" not in spec:
        if spec in TASKS:
            return TASKS[spec]
        raise ValueError(f"unknown task {spec!r}{_nearest(spec)}")
    return _as_task(spec, named_object(spec, "task"))


def _as_task(spec: str, found: object) -> Task:
    if isinstance(found, type) and issubclass(found, Task):
        try:
            found = found()
        except TypeError as problem:
            raise ValueError(f"task {spec!r} cannot be made without arguments: {problem}") from None
    if not isinstance(found, Task):
        raise ValueError(f"task {spec!r} is a {type(found).__name__}, not a prw_flux.tasks.Task")
    absent = [name for name in ("name", "sentence") if not getattr(found, name, "")]
    if absent:
        raise ValueError(f"task {spec!r} has no {' and no '.join(absent)}")
    return found


def _nearest(word: str) -> str:
    near = difflib.get_close_matches(word, TASKS, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(TASKS)}; a task of your own is named package.module:object"
