"""Objects that a configuration names, as ``package.module:object``."""

from __future__ import annotations

import difflib
import importlib

from prw.errors import ConfigError


def named_object(spec: str, what: str) -> object:
    """The object that ``package.module:object`` names; its module is imported.

    Args:
        spec: as the user wrote it.
        what: it is to be, for the message: "router", "recipe".

    Raises:
        ConfigError: `spec` is no such name, no such module can be imported, or it has no such
            object (the nearest public name is told).
    """
    module_name, colon, name = spec.partition(":")
    if not colon:
        raise ConfigError(f"{what} {spec!r}: write package.module:object")
    try:
        module = importlib.import_module(module_name)
    except ImportError as problem:
        raise ConfigError(
            f"{what} {spec!r}: cannot import {module_name!r} ({problem})"
        ) from problem
    except (TypeError, ValueError):
        raise ConfigError(
            f"{what} {spec!r}: {module_name!r} is not a module's name; write package.module:object"
        ) from None
    try:
        found: object = getattr(module, name)
    except AttributeError:
        public = [word for word in vars(module) if not word.startswith("_")]
        near = difflib.get_close_matches(name, public, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{what} {spec!r}: {module_name} has no {name!r}{hint}") from None
    return found
