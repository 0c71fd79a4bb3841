"""Which layers of a model a configuration names: matching, exclusions, ranks, refusals."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from prw.config import ALL_LINEAR, Config
from prw.errors import ConfigError
from prw.linear import RoutedLinear, is_linear

logger = logging.getLogger(__name__)


def find_linears(model: nn.Module, config: Config) -> dict[str, nn.Module]:
    """The linear layers that a configuration names, by dotted name, each layer once, in order.

    Raises:
        ConfigError: no target, a pattern without a match, a layer that cannot be adapted, an
            exclusion that leaves nothing, or a model that is woven already.
    """
    if not config.target_modules:
        raise ConfigError("target_modules is empty; name at least one linear layer")
    modules = dict(model.named_modules())
    woven = next((name for name, m in modules.items() if isinstance(m, RoutedLinear)), None)
    if woven is not None:
        raise ConfigError(f"the model is woven already at {woven!r}; unload() that weave first")
    linears = {name: m for name, m in modules.items() if name and is_linear(m)}
    closed = _closed(modules)
    if config.target_modules == ALL_LINEAR:
        found = _all_linear(model, linears, closed)
    else:
        found = _chosen("target", config.target_modules, modules, linears)
    if config.exclude_modules:
        left_out = _chosen("exclusion", config.exclude_modules, modules, linears)
        if not set(found) - set(left_out):
            raise ConfigError(
                f"exclude_modules {_shown(config.exclude_modules)} leaves nothing of the targets "
                f"{_some(found)}; exclude fewer or name more targets"
            )
        found = {name: m for name, m in found.items() if name not in left_out}
    for name in found:
        if name in closed:
            raise ConfigError(_attention(closed[name], linears, closed))
    return {name: found[name] for name in linears if name in found}


def ranks_of(linears: Mapping[str, nn.Module], config: Config) -> dict[str, int]:
    """The rank of each target: that of the first key of ``rank_pattern`` that matches, or ``rank``.

    As in PEFT, a key is an expression for the end of a name, ``(.*\\.)?(key)$``.

    Raises:
        ConfigError: a key that matches no target.
    """
    expressions = {key: re.compile(rf"(.*\.)?({key})$") for key in config.rank_pattern}
    for key, expression in expressions.items():
        if not any(map(expression.match, linears)):
            near = ", ".join(_nearest(key, linears))
            raise ConfigError(
                f"rank_pattern has {key!r}, which matches no target; the nearest are {near}"
            )
    return {
        name: next(
            (config.rank_pattern[key] for key, e in expressions.items() if e.match(name)),
            config.rank,
        )
        for name in linears
    }


def _closed(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Linear layers whose weight is read without a call, and the attention that does it."""
    return {
        f"{name}.{leaf}" if name else leaf: name
        for name, module in modules.items()
        if isinstance(module, nn.MultiheadAttention)
        for leaf, _ in module.named_children()
    }


def _all_linear(
    model: nn.Module, linears: Mapping[str, nn.Module], closed: Mapping[str, str]
) -> dict[str, nn.Module]:
    """Every layer except the output head of a language model, as PEFT does, and what is closed."""
    give_head = getattr(model, "get_output_embeddings", None)
    head = give_head() if callable(give_head) else None
    left_out = [name for name, module in linears.items() if module is head or name in closed]
    inside = {name for name in linears if any(name.startswith(f"{outer}.") for outer in linears)}
    found = {n: m for n, m in linears.items() if n not in {*left_out, *inside}}
    if not found:
        raise ConfigError(
            'target_modules="all-linear" finds no linear layer that can be adapted'
            + (f"; it leaves out {_some(left_out)}" if left_out else "")
        )
    if left_out:
        logger.info("all-linear adapts %d layers and leaves out %s", len(found), _some(left_out))
    return found


def _chosen(
    what: str,
    patterns: Sequence[str] | str,
    modules: Mapping[str, nn.Module],
    linears: Mapping[str, nn.Module],
) -> dict[str, nn.Module]:
    """The linear layers that an expression or the names of a list match."""
    found: dict[str, nn.Module] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        expression = isinstance(patterns, str)
        matches = [name for name in modules if name and _matches(name, pattern, expression)]
        chosen = {name: linears[name] for name in matches if name in linears}
        if not chosen:
            raise ConfigError(_no_match(what, pattern, expression, matches, modules, linears))
        found |= chosen
    return found


def _matches(name: str, pattern: str, expression: bool) -> bool:
    if expression:
        return re.fullmatch(pattern, name) is not None
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _no_match(
    what: str,
    pattern: str,
    expression: bool,
    matches: Sequence[str],
    modules: Mapping[str, nn.Module],
    linears: Mapping[str, nn.Module],
) -> str:
    attentions = [name for name, m in modules.items() if isinstance(m, nn.MultiheadAttention)]
    packed = pattern.rsplit(".", 1)[-1].startswith("in_proj")
    closed = [name for name in attentions if name in matches or packed]
    if closed:
        return _attention(closed[0], linears, _closed(modules))
    if matches:
        kind = type(modules[matches[0]]).__name__
        inside = any(name.startswith(f"{matches[0]}.") for name in linears)
        hint = f"; {matches[0] + '.*'!r} means the layers inside" if inside else ""
        return (
            f"{what} {pattern!r} matches {matches[0]!r}, a {kind}; only linear layers "
            f"(nn.Linear, Conv1D, quantised ones) can be adapted{hint}"
        )
    if not linears:
        return f"{what} {pattern!r} matches nothing: the model has no linear layer inside"
    rule = f"; an expression must match whole names, [{pattern!r}] matches endings"
    near = ", ".join(_nearest(pattern, linears))
    return (
        f"{what} {pattern!r} matches nothing; the nearest linear layers are {near}"
        f"{rule if expression else ''}"
    )


def _attention(name: str, linears: Mapping[str, nn.Module], closed: Mapping[str, str]) -> str:
    others = [linear for linear in linears if linear not in closed]
    instead = f", such as {_some(others)}" if others else ""
    return (
        f"{name!r} is an nn.MultiheadAttention, which reads the weights of its projections without "
        f"calling them, so experts there would do nothing; choose linears outside of it{instead}, "
        "or an attention with q, k and v projections of its own"
    )


def _nearest(pattern: str, linears: Iterable[str]) -> list[str]:
    names = {name for name in linears}
    names |= {name.rsplit(".", 1)[-1] for name in names}
    return difflib.get_close_matches(pattern, sorted(names), n=3, cutoff=0.0)


def _shown(patterns: Sequence[str] | str) -> str:
    return repr(patterns) if isinstance(patterns, str) else repr(list(patterns))


def _some(names: Iterable[str]) -> str:
    """Up to three names, and how many more there are."""
    known = list(names)
    more = f" and {len(known) - 3} more" if len(known) > 3 else ""
    return ", ".join(repr(name) for name in known[:3]) + more
