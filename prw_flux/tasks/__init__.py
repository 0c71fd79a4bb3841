"""The five tasks, by name, and how a sixth one of the user's own is found."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

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
        raise ValueError(f"unknown task {spec!r}{_nearest(spec, list(TASKS))}")
    module_name, _, attribute = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as problem:
        raise ValueError(f"task {spec!r}: cannot import {module_name!r} ({problem})") from problem
    except (TypeError, ValueError) as problem:
        raise ValueError(f"task {spec!r}: {module_name!r} is not a module's name") from problem
    if not attribute or attribute not in vars(module):
        public = [name for name in vars(module) if not name.startswith("_")]
        near = _nearest(attribute, public, known=False)
        raise ValueError(f"task {spec!r}: {module_name} has no {attribute!r}{near}")
    return _as_task(spec, vars(module)[attribute])


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


def _nearest(word: str, names: list[str], *, known: bool = True) -> str:
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    hint = "; a task of your own is named package.module:object"
    return f"; known: {', '.join(names)}{hint}" if known else ""
