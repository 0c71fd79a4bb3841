"""Putting pools beside the linear layers of a model, and taking them out again."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from torch import nn

from prw import checkpoint
from prw.config import Config
from prw.errors import CheckpointError, ConfigError
from prw.fingerprint import fingerprint
from prw.linear import RoutedLinear
from prw.pool import Pool
from prw.weaving import Weave


def weave(model: nn.Module, config: Config) -> Weave:
    """Freeze `model` and put a pool of experts beside every linear layer the config names.

    A target matches a layer whose dotted name equals it or ends with it; ``*`` matches anything.
    The model computes what it did before until a stage is unlocked and trained.

    Args:
        model: any module; its layers are replaced in place by `RoutedLinear`.
        config: which layers, and how they are adapted.

    Returns:
        The weave, through which stages are unlocked, trained, pinned and saved.

    Raises:
        ConfigError: a target matches no linear layer (near misses are listed), a rank is above a
            layer's size, or the model is woven already.
    """
    linears = find_linears(model, config.target_modules)
    pools = _pools(model, linears, config)
    identity = fingerprint(model, linears)
    had_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    layers = {
        target: RoutedLinear(linears[target], pool, p, owner=p == next(iter(pool.projections)))
        for pool in pools
        for p, target in _of(pool)
    }
    undo = [_replace(model, layer) for layer in layers.values()]
    for parameter, _ in had_grad:
        parameter.requires_grad_(False)

    def detach() -> None:
        for put_back in undo:
            put_back()
        for parameter, flag in had_grad:
            parameter.requires_grad_(flag)

    named = {pool.name: pool for pool in pools}
    return Weave(named, config, fingerprint=identity, detach=detach, layers=layers)


def load(model: nn.Module, path: str | Path) -> Weave:
    """Weave `model` as the folder says and load it; the model stays untouched if that fails.

    Raises:
        CheckpointError: the folder is missing, damaged, too new, or made for another base.
    """
    stored = checkpoint.read(path)
    try:
        woven = weave(model, stored.config)
    except ConfigError as error:
        raise CheckpointError(f"{path} does not fit this model: {error}") from None
    try:
        woven.adopt(stored)
    except BaseException:
        woven.unload()
        raise
    return woven


def find_linears(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers that the targets name, by dotted name, each layer once.

    Raises:
        ConfigError: no target, a target without a match, or a model that is woven already.
    """
    if not targets:
        raise ConfigError("target_modules is empty; name at least one linear layer")
    modules = dict(model.named_modules())
    woven = next((name for name, m in modules.items() if isinstance(m, RoutedLinear)), None)
    if woven is not None:
        raise ConfigError(f"the model is woven already at {woven!r}; unload() that weave first")
    found: dict[str, nn.Linear] = {}
    for target in targets:
        matches = {name: m for name, m in modules.items() if _matches(name, target)}
        linears = {name: m for name, m in matches.items() if isinstance(m, nn.Linear)}
        if not linears:
            raise ConfigError(_no_match(target, matches, modules))
        found |= linears
    for name, linear in found.items():
        if type(linear).__name__ == "NonDynamicallyQuantizableLinear":
            raise ConfigError(
                f"{name!r} belongs to nn.MultiheadAttention, which reads its weight without "
                "calling it, so an expert there would do nothing; choose other targets"
            )
    return {name: found[name] for name in modules if name in found}


def _matches(name: str, target: str) -> bool:
    return bool(name) and (fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}"))


def _no_match(target: str, matches: dict[str, nn.Module], modules: dict[str, nn.Module]) -> str:
    if matches:
        name, module = next(iter(matches.items()))
        return (
            f"target {target!r} matches {name!r}, a {type(module).__name__}; only nn.Linear layers "
            "can be adapted"
        )
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    if not linears:
        return f"target {target!r} matches nothing: the model has no nn.Linear layer"
    endings = {name.rsplit(".", 1)[-1] for name in linears}
    near = difflib.get_close_matches(target, sorted({*linears, *endings}), n=3, cutoff=0.0)
    return f"target {target!r} matches nothing; the nearest linear layers are {', '.join(near)}"


def _pools(model: nn.Module, linears: dict[str, nn.Linear], config: Config) -> list[Pool]:
    """One pool per layer, or per parent and input width, in the order of the model."""
    groups: dict[tuple[str, int], dict[str, str]] = {}
    for name, linear in linears.items():
        parent, _, leaf = name.rpartition(".")
        shared = config.share_router == "parent"
        key = (parent if shared else name, linear.in_features)
        groups.setdefault(key, {})[leaf] = name
    parents = [parent for parent, _ in groups]
    pools = []
    for (parent, width), targets in groups.items():
        name = parent if parents.count(parent) == 1 else f"{parent}:{width}"
        sizes = {leaf: linears[target].out_features for leaf, target in targets.items()}
        pool = Pool(name, width, sizes, config, targets=targets, needs_mask=_generates(model))
        weight = linears[next(iter(targets.values()))].weight
        dtype = weight.dtype if weight.dtype.itemsize > 4 else None
        pools.append(pool.to(weight.device, dtype).train(model.training))
    return pools


def _generates(model: nn.Module) -> bool:
    """Whether the model is a decoder that generates token by token, as transformers says."""
    generates = getattr(model, "can_generate", None)
    return bool(callable(generates) and generates())


def _of(pool: Pool) -> list[tuple[str, str]]:
    return list(pool.targets.items())


def _replace(model: nn.Module, routed: RoutedLinear) -> Callable[[], None]:
    """Put a routed layer wherever its base sits in the model; returns what undoes it."""
    base = routed.base
    routed.train(base.training)
    places = [
        (parent, leaf)
        for parent in model.modules()
        for leaf, child in parent.named_children()
        if child is base
    ]
    for parent, leaf in places:
        setattr(parent, leaf, routed)

    def put_back() -> None:
        for parent, leaf in places:
            setattr(parent, leaf, base)

    return put_back
