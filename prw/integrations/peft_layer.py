"""What the PEFT bridge puts into a model: a layer with seats for pools, and the weave over them.

Needs the extra ``peft``. Users import `prw.integrations.peft`.

Shape suffixes: D input width, O output width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from prw.config import Config
from prw.decoding import Following
from prw.errors import ConfigError, StageError
from prw.ledger import Ledger
from prw.linear import is_transposed, linear_size, plain_weight, where_it_lives
from prw.optim import Kinds
from prw.pool import Pool
from prw.precision import at_least_fp32
from prw.weaving import Weave


class PeftWeave(Weave):
    """The weave of one PEFT adapter: it keeps the adapter's configuration equal to the ledger.

    Args:
        pools, config, fingerprint: as in `Weave`.
        adapter: the `prw.integrations.peft.PRWPeftConfig` that PEFT saves for this adapter.

    Attributes:
        following: the hooks on a decoder whose samples are routed by their prompt.
        nested: torch's encoders among the adapted modules, and their ``use_nested_tensor`` before.
    """

    def __init__(
        self,
        pools: Mapping[str, Pool],
        config: Config,
        *,
        fingerprint: Mapping[str, Any],
        adapter: Any,
    ) -> None:
        self.adapter = adapter
        self.following: Following | None = None
        self.nested: list[tuple[nn.TransformerEncoder, bool]] = []
        super().__init__(pools, config, fingerprint=fingerprint, detach=_refuse_unload)

    def _follow(self, ledger: Ledger, *, fresh: bool = True) -> None:
        self._learn()
        super()._follow(ledger, fresh=fresh)
        self.describe()

    def begin(self, ledger: Ledger, sizes: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
        """Go through the stages of a ledger, with fresh experts of the sizes they should have.

        Args:
            ledger: of a configuration.
            sizes: rank and alpha by stage and layer, where they are not the usual ones.

        Raises:
            ConfigError: a stage or layer with a size that is not there.
        """
        for stage in ledger.stages:
            self.unlock(stage.name)
        places = {t: (pool, p) for pool in self.pools.values() for p, t in pool.targets.items()}
        for name, layers in sizes.items():
            for target, (rank, alpha) in layers.items():
                if name not in ledger.names or target not in places:
                    raise ConfigError(
                        f"sizes gives {target!r} in stage {name!r} a rank, but the adapter has the "
                        f"stages {list(ledger.names)} and the layers {list(places)}"
                    )
                pool, projection = places[target]
                A_RD, B_OR = pool.expert(ledger[name].index).pair(projection)
                resized = (
                    A_RD.new_zeros(int(rank), A_RD.shape[1]),
                    B_OR.new_zeros(len(B_OR), int(rank)),
                )
                pool.expert(ledger[name].index).put(projection, *resized, alpha)
        self._follow(ledger)

    def describe(self) -> None:
        """Write the state of the stages into the adapter's configuration."""
        self.adapter.stages = list(self.ledger.names)
        self.adapter.open = self.newest is not None
        self.adapter.exempt = [stage.name for stage in self.stages if stage.exempt]
        self.adapter.sizes = {
            stage.name: unusual for stage in self.stages if (unusual := self._unusual(stage.index))
        }

    def _unusual(self, index: int) -> dict[str, list[float]]:
        """Rank and alpha of an expert's layers, where they are not the configuration's."""
        found = {}
        for pool in self.pools.values():
            expert = pool.expert(index)
            for projection, target in pool.targets.items():
                rank, usual = expert.rank(projection), pool.ranks[projection]
                size = [rank, expert.alpha(projection)]
                if size != [usual, self.config.scaling * usual]:
                    found[target] = size
        return found

    def sync(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Iterable[nn.Parameter] | None = None,
    ) -> None:
        """As `Weave.sync`, whatever parameters PEFT has replaced by new objects since."""
        self._learn()
        super().sync(optimizer, parameters)

    def leave(self) -> None:
        """Take the hooks of this adapter off the model; its pools are taken out by PEFT."""
        if self.following is not None:
            self.following.stop()

    def _learn(self) -> None:
        for pool in self.pools.values():
            self._kinds.learn(dict(pool.named_parameters()))

    def __getstate__(self) -> dict[str, Any]:
        # Kinds refers weakly to parameters, which neither pickles nor follows a deep copy.
        return {name: value for name, value in vars(self).items() if name != "_kinds"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._kinds = Kinds()
        self._learn()


def _refuse_unload() -> None:
    raise StageError(
        "this weave belongs to a PEFT adapter; call delete_adapter() or unload() of the model"
    )


@dataclass
class Seat:
    """One adapter's place in a layer.

    Attributes:
        weave: all pools of the adapter.
        pool: the one this layer belongs to.
        projection: the layer's name in that pool.
        weight: factor of the residual, from diffusers' ``set_adapters`` and ``scale``.
    """

    weave: PeftWeave
    pool: Pool
    projection: str
    weight: float = 1.0

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """``y + weight * residual(x)``; exactly ``y`` for weight 0, without routing."""
        if self.weight == 0:
            return y
        if self.weight == 1:
            return self.pool.add({self.projection: y}, x)[0][self.projection]
        residual = self.pool.add({self.projection: torch.zeros_like(y)}, x)[0][self.projection]
        return y + self.weight * residual

    def delta(self) -> Tensor | None:
        """``weight * alpha / rank * B A`` of the only expert, ``[O, D]``; None without expert.

        Raises:
            ConfigError: there are several experts, which no single weight can replace.
        """
        if len(self.pool.experts) > 1:
            raise ConfigError(
                f"{self.pool.targets[self.projection]!r} has {len(self.pool.experts)} routed "
                "experts, which no single weight equals; merge() is for adapters with one stage"
            )
        if not len(self.pool.experts):
            return None
        A_RD, B_OR = self.pool.expert(0).frozen_pair(self.projection)
        return B_OR @ A_RD * (self.weight * self.pool.expert(0).scaling(self.projection))


class PRWLinear(nn.Module, BaseTunerLayer):
    """A linear layer of a PEFT model with one pool of experts per adapter.

    Of the layers that share a pool, only the first registers it, under ``prw_pool.<adapter>``, so
    that every parameter has one name.

    Args:
        base_layer: a linear layer as `prw.linear.linear_size` knows them, or a layer of another
            tuner around one.
    """

    adapter_layer_names = ("prw_pool",)
    other_param_names = ("r", "seats")

    # Of BaseTunerLayer, for the type checker, which sees nn.Module first.
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    get_base_layer: Callable[[], Any]
    set_base_weight: Callable[[Tensor], None]

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.prw_pool = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.seats: dict[str, Seat] = {}
        self.merged_adapters: list[str] = []
        self.in_features, self.out_features = linear_size(self.get_base_layer()) or (0, 0)

    def place(self, adapter: str, seat: Seat, *, owner: bool) -> None:
        """Give an adapter its seat; the owner of a pool registers it."""
        self.seats[adapter] = seat
        self.r[adapter] = seat.pool.ranks[seat.projection]
        if owner:
            self.prw_pool[adapter] = seat.pool

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the residuals of the active adapters."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        for name in self.active_adapters:
            if name in self.seats:
                y = self.seats[name].add(y, x)
        return y

    def delete_adapter(self, adapter_name: str) -> None:
        """As in PEFT; hooks on the model go, too."""
        if adapter_name in self.seats:
            self.seats[adapter_name].weave.leave()
        super().delete_adapter(adapter_name)

    def _freeze_non_trainable_peft_weights(
        self, adapter_names: str | Sequence[str] | None = None
    ) -> None:
        """Freeze what the stage schedule freezes; PEFT calls this after every change of its own."""
        names = self.seats if adapter_names is None else adapter_names
        for name in [names] if isinstance(names, str) else names:
            if name in self.prw_pool:
                pool = self.seats[name].pool
                learning = dict(pool.learners())
                for key, parameter in pool.named_parameters():
                    if key not in learning:
                        parameter.requires_grad_(False)
                        parameter.grad = None

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Follow the base layer's device; experts and routers keep their own precision."""
        if adapter_name in self.prw_pool:
            base_device = where_it_lives(self.get_base_layer())[0]
            self.prw_pool[adapter_name].to(base_device if device is None else device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts; a cast below fp32 leaves experts and routers as they are."""
        for name, module in self.named_children() if recurse else ():
            module._apply(at_least_fp32(fn) if name == "prw_pool" else fn)
        super()._apply(fn, recurse=False)  # type: ignore[no-untyped-call]
        return self

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the weight of an adapter (diffusers)."""
        if adapter in self.seats:
            self.seats[adapter].weight = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the weights of the active adapters (diffusers)."""
        for name in self.active_adapters:
            if name in self.seats:
                self.seats[name].weight *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer`; None sets the weights of the active adapters to 1 (diffusers)."""
        for name in self.active_adapters:
            if name in self.seats:
                weight = self.seats[name].weight
                self.seats[name].weight = 1.0 if scale is None else weight / scale

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the residuals of adapters with one expert, whose gate is 1, to the base's weight.

        Raises:
            ConfigError: an adapter has several experts, or the weight is quantised.
            ValueError: `safe_merge` is set and the result is not finite.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.seats]
        weight = self._plain_weight()
        for name in names:
            weight = self._shifted(weight, self.seats[name].delta(), 1)
        if safe_merge and not weight.isfinite().all():
            raise ValueError(f"merging {names} gives weights that are not finite; nothing changed")
        self.set_base_weight(weight)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Subtract what `merge` added."""
        while self.merged_adapters:
            delta = self.seats[self.merged_adapters.pop()].delta()
            self.set_base_weight(self._shifted(self._plain_weight(), delta, -1))

    def _plain_weight(self) -> Tensor:
        weight = plain_weight(self.get_base_layer())
        if weight is None:
            target = next(seat.pool.targets[seat.projection] for seat in self.seats.values())
            raise ConfigError(
                f"the weight of {target!r} is quantised or distributed, and merging would round it "
                "anew; load the base in 16 or 32 bits on one device first"
            )
        return weight.data

    def _shifted(self, weight: Tensor, delta_OD: Tensor | None, sign: int) -> Tensor:
        """``weight + sign * delta``, typed like the weight."""
        if delta_OD is None:
            return weight
        delta = delta_OD.T if is_transposed(self.get_base_layer()) else delta_OD
        return (weight + sign * delta.to(weight.device)).to(weight.dtype)

    def __repr__(self) -> str:
        return "prw." + super().__repr__()
