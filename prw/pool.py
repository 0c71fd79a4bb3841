"""A pool: one router and the experts of one routed group of projections.

Shape suffixes: D in_features, O out_features, N experts that take part, ``...`` leading dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from prw_kernels import routed_lora
from torch import Tensor, nn

from prw.call import Call, CallSlot, Record
from prw.config import Config
from prw.errors import ConfigError, StageError
from prw.experts import Expert
from prw.ledger import Ledger
from prw.noise import gaussian_noise, group_id
from prw.router import Router, Routing, noisy_top1, router_input
from prw.schedule import Learning, schedule
from prw.usage import RouterPass, observe


@dataclass(frozen=True)
class _View:
    """What of the pool a call sees: the first `count` experts, perhaps with one forced."""

    count: int
    forced: int | None
    newest: int
    pinned: bool
    signal: tuple[Tensor, ...]
    noise: tuple[Tensor, ...]


class Pool(nn.Module):
    """The routed experts of one group of projections that read the same input.

    A pool grows and freezes as its ledger says; `Weave` keeps the ledgers of all pools equal.

    Args:
        name: unique name of the group, part of every file and of the noise.
        in_features: D.
        projections: O of each projection, by name.
        config: rank, routing and gate.
        targets: full module name of each projection in files; ``name.projection`` by default.
        needs_mask: refuse per-sample routing without a mask, as a causal decoder must.

    Raises:
        ConfigError: no projection, a name with a dot, or a rank above a layer's size.
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        projections: Mapping[str, int],
        config: Config,
        *,
        targets: Mapping[str, str] | None = None,
        needs_mask: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.in_features = in_features
        self.projections = dict(projections)
        self.config = config
        self.targets = dict(targets or {p: f"{name}.{p}" if name else p for p in projections})
        self.needs_mask = needs_mask
        self.ledger = Ledger()
        self.slot = CallSlot()
        self.router = Router(in_features, noise=config.noise)
        self.experts = nn.ModuleList()
        self._group = group_id(name)
        self._check()

    def _check(self) -> None:
        if not self.projections or any("." in p or not p for p in self.projections):
            raise ConfigError(
                f"pool {self.name!r} needs projections named without dots, "
                f"got {list(self.projections)}"
            )
        for projection, out_features in self.projections.items():
            size = min(self.in_features, out_features)
            if self.config.rank > size:
                raise ConfigError(
                    f"rank {self.config.rank} is above the size of {self.targets[projection]!r} "
                    f"({self.in_features} -> {out_features}); use a rank of at most {size}"
                )

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{p}: {self.in_features} -> {o}" for p, o in self.projections.items())
        return f"{self.name}, {shapes}, rank={self.config.rank}"

    # Growth -----------------------------------------------------------------------------------

    def follow(self, ledger: Ledger) -> None:
        """Grow, truncate and freeze until this pool is what `ledger` describes.

        The router of a stage that closes is snapshotted. A frozen parameter loses its gradient.
        """
        closing = self.ledger.newest
        if closing is not None and closing.index < len(ledger):
            if not ledger.stages[closing.index].open:
                self.router.take_snapshot(closing.index)
        if len(ledger) < len(self.ledger):
            self.router.truncate(len(ledger))
            self.experts = nn.ModuleList(list(self.experts)[: len(ledger)])
        for _ in range(len(self.experts), len(ledger)):
            self.grow(rank=self.config.rank, alpha=self.config.scaling * self.config.rank)
        self.ledger = ledger
        self.freeze()

    def grow(self, *, rank: int, alpha: float) -> Expert:
        """Append a new expert and its zero router columns."""
        expert = Expert(
            self.in_features, self.projections, rank=rank, alpha=alpha, like=self.router.anchor
        )
        self.experts.append(expert.train(self.training))
        self.router.grow()
        return expert

    @property
    def learning(self) -> Learning:
        """Which experts and columns may learn now."""
        return schedule(self.ledger, self.config)

    def freeze(self) -> None:
        """Make ``requires_grad`` say what the schedule says; drop the gradients of the rest."""
        learning = dict(self.learners())
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in learning)
            if name not in learning:
                parameter.grad = None

    def learners(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that may learn now."""
        learning = self.learning
        for name, parameter in self.named_parameters():
            kind, *path = name.split(".")
            if kind == "experts" and int(path[0]) in learning.experts:
                yield name, parameter
            if kind == "router" and int(path[1]) in learning.columns:
                yield name, parameter

    # Routing ----------------------------------------------------------------------------------

    def route(self, x: Tensor, call: Call | None = None) -> Routing:
        """Choose an expert for every token or sample: a pure function of x, parameters and call.

        Args:
            x: ``[..., D]``; per sample, the first dimension counts samples.
            call: None means the call bound to the weave.

        Returns:
            Routing shaped ``x.shape[:-1]`` per token, ``x.shape[:1]`` per sample.

        Raises:
            StageError: there is no expert yet, or the call names a stage that does not exist.
            ConfigError: x or the mask has the wrong shape, or a mask is needed and missing.
        """
        call = self.slot.call if call is None else call
        return self._route(x, call, self._view(call))[0]

    def add(
        self, outputs: Mapping[str, Tensor], x: Tensor, call: Call | None = None
    ) -> tuple[dict[str, Tensor], Routing | None]:
        """Add the gated residual of the routed expert to the outputs of the projections.

        ``out_p + gate * alpha / rank * B_pe A_pe x``

        Args:
            outputs: ``[..., O_p]`` of some or all projections, by name, each computed from ``x``.
            x: ``[..., D]``.
            call: None means the call bound to the weave. A record counts this forward when the
                first projection is among ``outputs``, so a group counts once.

        Returns:
            New outputs, typed like the given ones, and the routing; without experts the very same
            outputs and None. Raises like `route`.
        """
        call = self.slot.call if call is None else call
        view = self._view(call)
        if view.count == 0:
            return dict(outputs), None
        routing, inputs = self._route(x, call, view)
        if isinstance(call, Record) and call.listening and next(iter(self.projections)) in outputs:
            self._record(call, routing, inputs, view)
        taking_part = range(view.count) if view.forced is None else [view.forced]
        experts = [cast(Expert, self.experts[index]) for index in taking_part]
        learning = self.learning.experts
        results = routed_lora(
            list(outputs.values()),
            x,
            *(
                [
                    [
                        factor[p] if index in learning else factor[p].detach()
                        for index, factor in zip(taking_part, factors, strict=True)
                    ]
                    for p in outputs
                ]
                for factors in ([e.A for e in experts], [e.B for e in experts])
            ),
            [expert.scaling for expert in experts],
            routing.expert if len(experts) > 1 else None,
            None if view.forced is not None else routing.gate,
        )
        return dict(zip(outputs, results, strict=True)), routing

    def _view(self, call: Call) -> _View:
        ledger = self.ledger
        count = len(ledger) if call.stage is None else ledger[call.stage].index + 1
        forced = None if call.force is None else ledger[call.force].index
        newest = ledger.newest.index if ledger.newest is not None else count - 1
        pinned = call.stage is not None or call.force is not None
        kept = None if call.stage is None else self.router.snapshot(ledger[call.stage].index)
        if kept is not None:
            signal, noise = tuple(kept[0]), tuple(kept[1])
        else:
            columns = self.learning.columns
            signal, noise = (
                tuple(c if i in columns else c.detach() for i, c in enumerate(part))[:count]
                for part in (self.router.signal, self.router.noise)
            )
        return _View(count, forced, count - 1 if pinned else newest, pinned, signal, noise)

    def _route(self, x: Tensor, call: Call, view: _View) -> tuple[Routing, RouterPass | None]:
        if view.count == 0:
            raise StageError(f"pool {self.name!r} has no expert yet; unlock a stage first")
        self._check_input(x, call)
        sample = self.config.granularity == "sample"
        shape = x.shape[:1] if sample else x.shape[:-1]
        if view.forced is not None:
            return _forced(shape, view, x), None
        with torch.autocast(x.device.type, enabled=False):
            h_TD = router_input(x, self.config.granularity, call.mask)
            eps_TN = None
            if call.noisy and self.training and self.config.noise:
                eps_TN = gaussian_noise(
                    call.key, self._group, h_TD.shape[0], view.count, h_TD.device
                )
            flat = noisy_top1(h_TD, view.signal, view.noise, eps_TN)
        gate = flat.gate if self.config.gate == "softmax" else flat.gate * 0 + 1
        routing = Routing(
            flat.expert.reshape(shape),
            gate.float().reshape(shape),
            flat.probs.float().reshape(*shape, view.count),
        )
        return routing, RouterPass(h_TD, view.noise, eps_TN)

    def _check_input(self, x: Tensor, call: Call) -> None:
        if x.dim() < 2 or x.shape[-1] != self.in_features:
            raise ConfigError(
                f"pool {self.name!r} expects inputs [..., {self.in_features}] with at least two "
                f"dimensions, got {list(x.shape)}"
            )
        if call.mask is not None and call.mask.shape != x.shape[:-1]:
            raise ConfigError(
                f"the mask of the call is {list(call.mask.shape)}, but pool {self.name!r} was "
                f"given tokens {list(x.shape[:-1])}"
            )
        if self.needs_mask and self.config.granularity == "sample" and call.mask is None:
            raise ConfigError(
                f"pool {self.name!r} routes whole samples of a causal decoder: later tokens would "
                "change the routing of earlier ones; give the prompt's tokens as mask="
            )

    def _record(
        self, call: Record, routing: Routing, inputs: RouterPass | None, view: _View
    ) -> None:
        keep = call.mask
        if keep is not None and self.config.granularity == "sample":
            keep = keep.flatten(1).any(1)
        newest = view.newest if view.forced is None else view.forced
        learning: list[tuple[int, Tensor, Tensor | None]] = []
        if not view.pinned and inputs is not None:
            noise = self.router.noise
            learning = [
                (index, self.router.signal[index], noise[index] if len(noise) else None)
                for index in sorted(self.learning.columns)
            ]
        if inputs is None:
            inputs = RouterPass(routing.probs.new_zeros(routing.expert.numel(), 0), (), None)
        call.tally.add(self.name, observe(routing, inputs, newest, keep, learning))


def _forced(shape: torch.Size, view: _View, x: Tensor) -> Routing:
    assert view.forced is not None
    expert = torch.full(shape, view.forced, dtype=torch.int64, device=x.device)
    probs = x.new_zeros(*shape, len(view.signal), dtype=torch.float32)
    probs[..., view.forced] = 1.0
    return Routing(expert, torch.ones(shape, device=x.device), probs)
