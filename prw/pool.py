"""A pool: one router and the experts of one routed group of projections.

Shape suffixes: D input width, O output width, E experts that take part, T routed rows (tokens, or
samples), ``...`` the leading axes of the input.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prw.call import Call, CallSlot, Recall, Record
from prw.columns import Columns
from prw.config import Config
from prw.errors import ConfigError, StageError
from prw.experts import Expert, factors
from prw.growth import first_column
from prw.ledger import Ledger
from prw.noise import gaussian_noise, group_id, word
from prw.router import RouterPass, Routing, find_router, router_input
from prw.schedule import Learning, schedule
from prw.usage import observe
from prw_kernels import routed_linear, routed_lora


@dataclass(frozen=True)
class View:
    """What of a pool one call sees.

    Attributes:
        count: how many experts take part, always the oldest ones.
        forced: the index of the only expert to use, if the call forces one.
        newest: the index whose usage counts.
        pinned: whether the call names a stage or an expert, so that nothing is learnt from it.
        signal, noise: the router columns of the experts that take part.
    """

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
        name: unique name of the group; part of every file and of the noise.
        in_features: D.
        projections: O of each projection, by name.
        config: rank, routing and gate.
        targets: full module name of each projection in files; ``name.projection`` by default.
        ranks: of new experts, by projection; the configuration's where it is not given.
        needs_mask: refuse per-sample routing without a mask, as a causal decoder must: the mask
            says which tokens are the prompt, and tokens after it keep the prompt's routing.

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
        ranks: Mapping[str, int] | None = None,
        needs_mask: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.in_features = in_features
        self.projections = dict(projections)
        self.config = config
        self.targets = dict(targets or {p: f"{name}.{p}" if name else p for p in projections})
        self.ranks = {p: config.rank for p in projections} | dict(ranks or {})
        self.prompted = needs_mask and config.granularity == "sample"
        self.ledger = Ledger()
        self.slot = CallSlot()
        self._check()
        self.router = find_router(config.router, noise=config.noise)
        self.columns = Columns(in_features + config.context_features, noise=config.noise)
        self.experts = nn.ModuleList()
        self._group = word(group_id(name))

    def _check(self) -> None:
        if not self.projections or any("." in p or not p for p in self.projections):
            raise ConfigError(
                f"pool {self.name!r} needs projections named without dots, "
                f"got {list(self.projections)}"
            )
        for projection, out_features in self.projections.items():
            rank = self.ranks[projection]
            size = min(self.in_features, out_features)
            if rank > size:
                raise ConfigError(
                    f"rank {rank} is above the size of {self.targets[projection]!r} "
                    f"({self.in_features} -> {out_features}); use a rank of at most {size}"
                )

    def extra_repr(self) -> str:
        """The name and the shapes, for printing a model."""
        shapes = ", ".join(f"{p}: {self.in_features} -> {o}" for p, o in self.projections.items())
        return f"{self.name!r}, {shapes}"

    def follow(self, ledger: Ledger, *, fresh: bool = True) -> None:
        """Grow, truncate and freeze until this pool is what `ledger` describes.

        The router of a stage that closes is snapshotted. A frozen parameter loses its gradient.

        Args:
            ledger: the stages to have.
            fresh: draw the factors of new experts and begin their router columns as configured;
                False leaves both zero, to be filled, the experts by `Expert.put`.
        """
        closing = self.ledger.newest
        if closing is not None and ledger.stages[closing.index : closing.index + 1]:
            if not ledger.stages[closing.index].open:
                self.columns.take_snapshot(closing.index)
        self.columns.truncate(len(ledger))
        del self.experts[len(ledger) :]
        while len(self.experts) < len(ledger):
            expert = Expert(
                self.in_features,
                self.projections,
                self.ranks,
                self.config.scaling,
                self.columns.anchor,
                memory=fresh,
            )
            if fresh:
                expert.draw()
            self.experts.append(expert.train(self.training))
            kind = self.config.new_column if fresh else "zero"
            self.columns.grow(first_column(kind, self.columns.state()[0]))
        self.ledger = ledger
        self.freeze()

    def expert(self, index: int) -> Expert:
        """The expert of the stage with this index."""
        return cast(Expert, self.experts[index])

    @property
    def learning(self) -> Learning:
        """Which experts and columns may learn now."""
        return schedule(self.ledger, self.config)

    def learners(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that may learn now."""
        learning = self.learning
        for name, parameter in self.named_parameters():
            kind, *path = name.split(".")
            allowed = learning.experts if kind == "experts" else learning.columns
            if next(int(part) for part in path if part.isdigit()) in allowed:
                yield name, parameter

    def freeze(self) -> None:
        """Make ``requires_grad`` say what the schedule says; the rest loses its gradient."""
        learning = dict(self.learners())
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in learning)
            if name not in learning:
                parameter.grad = None

    def route(self, x: Tensor, call: Call | None = None) -> Routing:
        """Choose an expert for every token or sample: a pure function of x, parameters and call.

        Args:
            x: ``[..., D]``; per sample, the first axis counts samples.
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

        ``y_p = output_p + B_pe A_pe x * (alpha / rank * gate)``

        Args:
            outputs: ``[..., O_p]`` of some or all projections, by name, each computed from ``x``.
            x: ``[..., D]``.
            call: None means the call bound to the weave. A record counts this forward when the
                first projection is among ``outputs``, so that a group counts once.

        Returns:
            New outputs, typed like the given ones, and the routing; without experts the very same
            outputs and None. Raises like `route`.
        """
        call = self.slot.call if call is None else call
        view = self._view(call)
        if view.count == 0:
            return dict(outputs), None
        routing, given = self._chosen(list(outputs), x, call, view)
        results = routed_lora(list(outputs.values()), x, **given)
        return dict(zip(outputs, results, strict=True)), routing

    def project(
        self, bases: Mapping[str, nn.Module], x: Tensor, call: Call | None = None
    ) -> tuple[dict[str, Tensor], Routing | None]:
        """Apply frozen base layers to ``x`` and `add` to their outputs.

        Plain linear layers that nothing hooks into are computed together with their residuals where
        kernels run (`prw_kernels.routed_linear`).

        Args:
            bases: some or all projections, by name.
            x: ``[..., D]``.
            call: as in `add`.

        Returns:
            As `add`.
        """
        call = self.slot.call if call is None else call
        view = self._view(call)
        plain = [base for base in bases.values() if _is_plain(base)]
        if view.count == 0 or len(plain) < len(bases):
            return self.add({name: base(x) for name, base in bases.items()}, x, call)
        routing, given = self._chosen(list(bases), x, call, view)
        weights, biases = [base.weight for base in plain], [base.bias for base in plain]
        results = routed_linear(x, weights, biases, **given)
        return dict(zip(bases, results, strict=True)), routing

    def _chosen(
        self, projections: Sequence[str], x: Tensor, call: Call, view: View
    ) -> tuple[Routing, dict[str, Any]]:
        """The routing, told to who listens, and the arguments that the operation takes from it."""
        routing, inputs = self._route(x, call, view, projections[0])
        if not call.prompt.continues:
            if isinstance(call, Recall) and inputs is not None:
                call.keep(self.name, projections[0], inputs.h_TD, self._counted(call))
            if next(iter(self.projections)) in projections:
                self._observe(call, routing, inputs, view)
        forced = view.forced is not None
        indices = [view.forced] if view.forced is not None else list(range(view.count))
        learning = self.learning.experts
        found = factors(
            [self.expert(index) for index in indices],
            [index in learning for index in indices],
            projections,
            self.columns.anchor.dtype,
        )
        return routing, {
            "A": found.A,
            "B": found.B,
            "scaling": found.scaling,
            "expert": None if forced else routing.expert,
            "gate": None if forced else routing.gate,
            "backend": self.config.backend,
        }

    def _view(self, call: Call) -> View:
        ledger = self.ledger
        count = len(ledger) if call.stage is None else ledger[call.stage].index + 1
        forced = None if call.force is None else ledger[call.force].index
        pinned = call.stage is not None or call.force is not None
        open_stage = None if pinned else ledger.newest
        newest = count - 1 if open_stage is None else open_stage.index
        signal, noise = self.columns.seen(count, call.stage is not None, self.learning.columns)
        return View(count, forced, newest if forced is None else forced, pinned, signal, noise)

    def _route(
        self, x: Tensor, call: Call, view: View, asking: str = ""
    ) -> tuple[Routing, RouterPass | None]:
        if view.count == 0:
            raise StageError(f"pool {self.name!r} has no expert yet; unlock a stage first")
        self._check_input(x, call)
        if self.prompted and view.forced is None and call.prompt.continues:
            return self._recall(x, call, view, asking), None
        mask = None if self.prompted and view.forced is not None else self._mask(x, call)
        shape = x.shape[:1] if self.config.granularity == "sample" else x.shape[:-1]
        if view.forced is not None:
            return _forced(shape, view.forced, view.count, x), None
        with torch.autocast(x.device.type, enabled=False):
            context = None if call.context is None else call.context.detach()
            h_TD = router_input(x, self.config.granularity, mask, context)
            eps_TE = None
            if call.noisy and self.training and self.config.noise:
                rows = h_TD.shape[0]
                first = call.start * (rows // max(x.shape[0], 1))
                eps_TE = gaussian_noise(
                    call.seed, self._group, rows, view.count, h_TD.device, first
                )
            flat = self.router.route(h_TD, view.signal, view.noise, eps_TE)
        # With gate "one" the router still takes part, so that its gradient is zero and not absent.
        gate_T = flat.gate if self.config.gate == "softmax" else flat.gate * 0 + 1
        probs = flat.probs.reshape(*shape, view.count)
        routing = Routing(flat.expert.reshape(shape), gate_T.reshape(shape), probs)
        if self.prompted:
            call.prompt.keep((self.name, asking), routing)
        return routing, RouterPass(self.router, h_TD, view.signal, view.noise, eps_TE, flat.probs)

    def _check_input(self, x: Tensor, call: Call) -> None:
        if x.dim() < 2 or x.shape[-1] != self.in_features:
            raise ConfigError(
                f"pool {self.name!r} expects inputs [..., {self.in_features}] with at least two "
                f"axes, got {list(x.shape)}"
            )
        self._check_context(x, call)

    def _mask(self, x: Tensor, call: Call) -> Tensor | None:
        """The mask of the call for the tokens of x: tokens after a prompt's mask do not count."""
        mask = call.mask
        if mask is None and self.prompted:
            raise ConfigError(
                f"pool {self.name!r} routes whole samples of a causal decoder, where later tokens "
                "would change the routing of earlier ones; give the prompt's tokens as mask="
            )
        if mask is None or mask.shape == x.shape[:-1]:
            return mask
        if mask.shape[:1] == x.shape[:1]:
            if self.config.granularity == "sample" and x.dim() == 2:
                return None  # a pooler, say: every row is a sample already
            if self.prompted and mask.dim() == 2 and x.dim() == 3 and mask.shape[1] < x.shape[1]:
                return F.pad(mask, (0, x.shape[1] - mask.shape[1]))
        raise ConfigError(
            f"the mask of the call is {list(mask.shape)}, but pool {self.name!r} was given tokens "
            f"{list(x.shape[:-1])}; bind a call for these inputs, weave.call(mask=...)"
        )

    def _recall(self, x: Tensor, call: Call, view: View, asking: str) -> Routing:
        """The routing of the prompt, for tokens that continue it."""
        if torch.is_grad_enabled() and self.learning.columns and not view.pinned:
            raise ConfigError(
                f"pool {self.name!r} continues a prompt from a cache, where its router gets no "
                "gradient; train on whole sequences, and generate under torch.no_grad()"
            )
        return call.prompt.recall((self.name, asking), x.shape[0], view.count)

    def _check_context(self, x: Tensor, call: Call) -> None:
        if call.force is not None:  # a forced route reads nothing
            return
        width, given = self.config.context_features, call.context
        wanted = [x.shape[0], width]
        if width and (given is None or list(given.shape) != wanted):
            what = "none" if given is None else str(list(given.shape))
            raise ConfigError(
                f"routers were configured with context_features={width}: give the call "
                f"context={wanted}, got {what}"
            )
        if given is not None and not width:
            raise ConfigError(
                f"the call has a context {list(given.shape)}, but context_features is 0; configure "
                f"context_features={given.shape[-1]}"
            )

    def _observe(self, call: Call, routing: Routing, inputs: RouterPass | None, view: View) -> None:
        """Tell a record of this forward; another call hears nothing."""
        if isinstance(call, Record) and call.listening:
            pairs = () if view.pinned else self.columns.pairs(self.learning.columns)
            counted = self._counted(call)
            seen = observe(
                routing, inputs, view.newest, counted, pairs, keep_inputs=call.keep_inputs
            )
            call.tally.add(self.name, seen)

    def _counted(self, call: Call) -> Tensor | None:
        """Which routed rows the mask lets count; None means all."""
        counted = call.mask
        if counted is not None and self.config.granularity == "sample" and counted.dim() > 1:
            return counted.flatten(1).any(1)
        return counted


def _is_plain(base: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling the layer is ``F.linear`` and nothing else."""
    hooks = [base._forward_hooks, base._forward_pre_hooks, base._backward_hooks]
    hooks.append(base._backward_pre_hooks)
    return type(base) is nn.Linear and "forward" not in vars(base) and not any(hooks)


def _forced(shape: torch.Size, expert: int, count: int, x: Tensor) -> Routing:
    chosen = torch.full(shape, expert, dtype=torch.int64, device=x.device)
    probs = torch.zeros(*shape, count, device=x.device)
    probs[..., expert] = 1.0
    return Routing(chosen, torch.ones(shape, device=x.device), probs)
