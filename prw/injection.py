"""Putting pools beside the linear layers of a model, and taking them out again."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from prw import checkpoint
from prw.config import Config
from prw.decoding import Decoder, Following, find_decoder
from prw.errors import CheckpointError, ConfigError
from prw.fingerprint import fingerprint
from prw.linear import RoutedLinear, linear_size, where_it_lives
from prw.pool import Pool
from prw.targets import find_linears, ranks_of
from prw.weaving import Weave


def weave(model: nn.Module, config: Config) -> Weave:
    """Freeze `model` and put a pool of experts beside every linear layer the config names.

    In a list, a target matches a layer whose dotted name equals it or ends with it; ``*`` matches
    anything. Layers are `torch.nn.Linear`, transformers' ``Conv1D`` and quantised ones. The model
    computes what it did before until a stage is unlocked and trained.

    Args:
        model: any module; its layers are replaced in place by `RoutedLinear`.
        config: which layers, and how they are adapted.

    Returns:
        The weave, through which stages are unlocked, trained, pinned and saved.

    Raises:
        ConfigError: a pattern matches no linear layer (near misses are listed), a layer cannot be
            adapted, a rank is above a layer's size, the model is woven already, or an argument is
            of another kind.
    """
    if not isinstance(model, nn.Module) or not isinstance(config, Config):
        given = f"{type(model).__name__}, {type(config).__name__}"
        raise ConfigError(f"weave(model, config) takes an nn.Module and a prw.Config, got {given}")
    linears = find_linears(model, config)
    decoder = find_decoder(model, linears) if config.granularity == "sample" else None
    pools = build_pools(model, linears, config, decoder)
    identity = fingerprint(model, linears)
    had_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    layers = {
        target: RoutedLinear(linears[target], pool, p, owner=p == next(iter(pool.projections)))
        for pool in pools
        for p, target in pool.targets.items()
    }
    places = [place for layer in layers.values() for place in _replace(model, layer)]
    nested = leave_fast_path(model, RoutedLinear)
    following = None if decoder is None else Following(decoder, pools[0])
    for parameter, _ in had_grad:
        parameter.requires_grad_(False)
    undo = _Undo(places, nested, had_grad, following)
    named = {pool.name: pool for pool in pools}
    return Weave(named, config, fingerprint=identity, detach=undo, layers=layers)


@dataclass(frozen=True)
class _Undo:
    """What `weave` changed; calling it puts everything back.

    Plain data, so that the copy of a woven model and its weave refers to the copy.

    Attributes:
        places: parent, attribute and the layer that was there.
        nested: encoders and what their ``use_nested_tensor`` was.
        had_grad: parameters and what their ``requires_grad`` was.
        following: the hooks on the model.
    """

    places: list[tuple[nn.Module, str, nn.Module]]
    nested: list[tuple[nn.TransformerEncoder, bool]]
    had_grad: list[tuple[nn.Parameter, bool]]
    following: Following | None

    def __call__(self) -> None:
        for parent, leaf, base in self.places:
            setattr(parent, leaf, base)
        for encoder, flag in self.nested:
            encoder.use_nested_tensor = flag
        for parameter, flag in self.had_grad:
            parameter.requires_grad_(flag)
        if self.following is not None:
            self.following.stop()


def load(model: nn.Module, path: str | Path) -> Weave:
    """Weave `model` as the folder says and load it; the model stays untouched if that fails.

    Raises:
        CheckpointError: the folder is missing, damaged, too new, or made for another base, or it
            names a router whose module is not imported yet.
    """
    stored = checkpoint.read(path)
    check_imported(stored.config.router, str(path))
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


def check_imported(router: str, source: str) -> None:
    """A file may name a router, but what it names is never imported for it.

    Raises:
        CheckpointError: the module of `router` is not imported yet; `source` says who names it.
    """
    module, colon, _ = router.partition(":")
    if colon and module not in sys.modules:
        raise CheckpointError(
            f"{source} was made with the router {router!r}, and no file makes prw import a module; "
            f"if you trust it, write `import {module}` before you load"
        )


def build_pools(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    config: Config,
    decoder: Decoder | None = None,
) -> list[Pool]:
    """One pool per layer, or per parent and input width, in the order of the model."""
    sizes = {name: linear_size(linear) or (0, 0) for name, linear in linears.items()}
    ranks = ranks_of(linears, config)
    prompted = frozenset() if decoder is None else decoder.layers
    groups: dict[tuple[str, int], dict[str, str]] = {}
    for name in linears:
        parent, _, leaf = name.rpartition(".")
        shared = config.share_router == "parent"
        key = (parent if shared else name, sizes[name][0])
        groups.setdefault(key, {})[leaf] = name
    parents = [parent for parent, _ in groups]
    pools = []
    for (parent, width), targets in groups.items():
        device, dtype = where_it_lives(linears[next(iter(targets.values()))])
        pool = Pool(
            parent if parents.count(parent) == 1 else f"{parent}:{width}",
            width,
            {leaf: sizes[target][1] for leaf, target in targets.items()},
            config,
            targets=targets,
            ranks={leaf: ranks[target] for leaf, target in targets.items()},
            needs_mask=not prompted.isdisjoint(targets.values()),
        )
        pools.append(pool.to(device, dtype).train(model.training))
    return pools


def _replace(model: nn.Module, routed: RoutedLinear) -> list[tuple[nn.Module, str, nn.Module]]:
    """Put a routed layer wherever its base sits in the model; returns where that was."""
    base = routed.base
    routed.train(base.training)
    places = [
        (parent, leaf)
        for parent in model.modules()
        for leaf, child in parent._modules.items()  # named_children() gives a child only once
        if child is base
    ]
    for parent, leaf in places:
        setattr(parent, leaf, routed)
    return [(parent, leaf, base) for parent, leaf in places]


def leave_fast_path(
    model: nn.Module, kind: type[nn.Module]
) -> list[tuple[nn.TransformerEncoder, bool]]:
    """Make torch's transformer encoder call its layers of a kind in eval mode too.

    Its fast path reads the weights instead. A layer leaves it where a module inside has a hook; the
    stack of layers must also be kept from giving them nested tensors, which only that path takes.

    Returns:
        Every encoder with such a layer, and the ``use_nested_tensor`` that it had.
    """
    nested: list[tuple[nn.TransformerEncoder, bool]] = []
    for module in list(model.modules()):
        routed = [part for part in module.modules() if isinstance(part, kind)]
        if isinstance(module, nn.TransformerEncoderLayer):
            for part in routed:
                part.register_forward_pre_hook(_be_called)
        elif isinstance(module, nn.TransformerEncoder) and routed:
            nested.append((module, module.use_nested_tensor))
            module.use_nested_tensor = False
    return nested


def _be_called(_module: nn.Module, _inputs: object) -> None:
    """A hook without effect."""
