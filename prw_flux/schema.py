"""Typed settings from JSON and from the command line, for frozen dataclasses.

A settings class calls `settle(self)` when it is made; after that every field has its declared
type, whether it came from Python, from JSON or from ``--set a.b=c``.
"""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from prw import ConfigError

T = TypeVar("T")

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
TRUE, FALSE, NONE = ("true", "yes", "on"), ("false", "no", "off"), ("none", "null")


def settle(settings: Any) -> None:
    """Bring every field of a frozen dataclass to its declared type.

    Raises:
        ConfigError: naming the field and the value that has no such reading.
    """
    hints = get_type_hints(type(settings))
    for field in fields(settings):
        value = typed(getattr(settings, field.name), hints[field.name], field.name)
        object.__setattr__(settings, field.name, value)


def typed(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`: the readings that JSON forces on us, and no others.

    Raises:
        ConfigError: naming `where` and the value.
    """
    inner = _optional(hint)
    if inner is not None:
        return None if value is None else typed(value, inner, where)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            choices = ", ".join(str(choice) for choice in get_args(hint))
            raise ConfigError(f"{where} must be one of {choices}; got {value!r}")
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} must be a list, got {value!r}")
        element = get_args(hint)[0]
        return tuple(typed(v, element, f"{where}.{i}") for i, v in enumerate(value))
    if is_dataclass(hint):
        assert isinstance(hint, type)
        return value if isinstance(value, hint) else build(hint, value, where)
    return _plain(value, hint, where)


def _plain(value: Any, hint: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where} must be {KINDS[hint]}, got {value!r}")
    return value


def _optional(hint: Any) -> Any:
    """X for ``X | None``, else None."""
    if get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint):
        return next(part for part in get_args(hint) if part is not type(None))
    return None


def build(cls: type[T], data: Any, where: str = "") -> T:
    """A settings object from plain data.

    Raises:
        ConfigError: not a mapping, an unknown field (the nearest is named) or a missing one.
    """
    prefix = f"{where}." if where else ""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where or cls.__name__} must hold fields, got {data!r}")
    known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    for name in data:
        if name not in known:
            raise unknown(f"{prefix}{name}", [f"{prefix}{k}" for k in known])
    try:
        return cls(**data)
    except TypeError as problem:
        raise ConfigError(f"{where or cls.__name__}: {problem}") from None
    except ConfigError as problem:
        raise ConfigError(f"{prefix}{problem}") from None


def plain(settings: Any) -> Any:
    """JSON data of a settings object; `build` is the inverse."""
    if is_dataclass(settings) and not isinstance(settings, type):
        return {f.name: plain(getattr(settings, f.name)) for f in fields(settings)}
    return [plain(value) for value in settings] if isinstance(settings, tuple) else settings


def unknown(key: str, known: list[str]) -> ConfigError:
    """The error for a key that does not exist, with the nearest one that does."""
    last = [name for name in known if name.split(".")[-1] == key.split(".")[-1]][:1]
    alike = difflib.get_close_matches(key, known, n=1, cutoff=0.3)
    near = alike or last if "." in key else last or alike  # a last part alone is meant as one
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"
    return ConfigError(f"there is no setting {key!r}; {hint}")


def keys(settings: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted key that `with_setting` accepts; elements of a list go by their name."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value):
            yield from keys(value, f"{prefix}{field.name}.")
        elif isinstance(value, tuple) and value and is_dataclass(value[0]):
            for index, element in enumerate(value):
                name = getattr(element, "name", str(index))
                yield from keys(element, f"{prefix}{field.name}.{name}.")
        else:
            yield f"{prefix}{field.name}"


def leaves(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key as in `keys`, with its value."""
    for key in keys(settings, prefix):
        value = settings
        for part in key.removeprefix(prefix).split("."):
            if isinstance(value, tuple):
                value = next(x for i, x in enumerate(value) if _names(part, i, x))
            else:
                value = getattr(value, part)
        yield key, value


def with_settings(settings: T, assignments: list[str]) -> T:
    """A copy with each ``a.b=c`` applied in turn.

    ``stages.edit.lr=1e-3`` addresses an element of a list by its name or number,
    ``stages.*.lr=1e-3`` all of them.

    Raises:
        ConfigError: no such key (the nearest is named), or a value that cannot be read or used.
    """
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"a setting is written key=value, got {assignment!r}")
        key = key.strip()
        try:
            settings = _with(settings, key.split("."), text.strip(), key)
        except KeyError:
            raise unknown(key, list(keys(settings))) from None
        except ConfigError as problem:
            if str(problem).startswith(key):
                raise
            raise ConfigError(f"{key}={text.strip()}: {problem}") from None
    return settings


def _with(value: Any, path: list[str], text: str, key: str) -> Any:
    """`value` with what lies at `path` replaced; KeyError where nothing lies there."""
    head, *rest = path
    if isinstance(value, tuple):
        chosen = [i for i, element in enumerate(value) if _names(head, i, element)]
        if not chosen or not rest:
            raise KeyError(head)
        changed = {i: _with(value[i], rest, text, key) for i in chosen}
        return tuple(changed.get(i, element) for i, element in enumerate(value))
    hints = get_type_hints(type(value)) if is_dataclass(value) else {}
    if head not in hints:
        raise KeyError(head)
    current = getattr(value, head)
    if rest:
        new = _with(current, rest, text, key)
    elif is_dataclass(current):
        raise KeyError(head)
    else:
        new = typed(parse(text, hints[head], key), hints[head], key)
    return replace(value, **{head: new})


def _names(word: str, index: int, element: Any) -> bool:
    return word in ("*", str(index), getattr(element, "name", None))


def parse(text: str, hint: Any, where: str) -> Any:
    """What a word on the command line means for a field of type `hint`.

    Raises:
        ConfigError: naming the word and what was expected.
    """
    inner = _optional(hint)
    if inner is not None:
        return None if text.lower() in NONE else parse(text, inner, where)
    if hint is str or get_origin(hint) is Literal:
        return text
    if hint is bool and text.lower() in TRUE + FALSE:
        return text.lower() in TRUE
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        kind = KINDS.get(hint, "a list in JSON")
        raise ConfigError(f"{where} must be {kind}, got {text!r}") from None
