"""What a run trains: experts, routers and a feature stream, with their optimizer and averages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, final

import torch
from torch import nn

from prw.distributed import broadcast
from prw_flux.config import OptimizerConfig
from prw_flux.optimization import new_optimizer
from prw_flux.ranks import Ranks
from prw_flux.resume import (
    Position,
    named_parameters,
    read_average,
    read_moments,
    restore_moments,
    save_state,
)
from prw_flux.rundir import RunFolder
from prw_flux.session import Session


@final
class Learners:
    """Everything that a step moves, and that a state must hold.

    Args:
        run: whose state the optimizer and the averages go on from.
        session: the adapter, and the feature stream where the run has one.
    """

    def __init__(self, run: RunFolder, session: Session) -> None:
        self.run, self.adapter, self.coredi = run, session.adapter, session.coredi
        self.average = read_average(run, self.adapter, self.coredi)
        self.optimizer: torch.optim.AdamW | None = None

    def parameters(self) -> list[nn.Parameter]:
        """What learns now, on every rank in the same order."""
        learning = list(self.adapter.weave.parameters())
        return learning + ([] if self.coredi is None else self.coredi.learners())

    def named(self) -> list[tuple[str, nn.Parameter]]:
        """The same, by name."""
        named = named_parameters(self.adapter, self.coredi)
        learning = {id(parameter) for parameter in self.parameters()}
        return [(name, parameter) for name, parameter in named if id(parameter) in learning]

    def spread(self, ranks: Ranks) -> None:
        """Give every rank the first one's weights, whatever drew them."""
        broadcast(self.adapter.weave)
        if self.coredi is not None:
            for tensor in (*self.coredi.parameters(), *self.coredi.buffers()):
                ranks.spread(tensor)

    # Steps ------------------------------------------------------------------------------------

    def hold(self, config: OptimizerConfig) -> None:
        """Let the optimizer hold what learns now; router moments survive the stages."""
        if self.optimizer is None:
            self.optimizer = new_optimizer(self.adapter, config, self.coredi)
            moments = read_moments(self.run)
            restore_moments(self.optimizer, self.adapter, moments, self.coredi)
        else:
            self.adapter.weave.sync(self.optimizer)

    def step(self, rate: float) -> None:
        """Descend along the gradients at this learning rate; averages follow."""
        assert self.optimizer is not None
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.named())

    # Averages ---------------------------------------------------------------------------------

    def begin_averages(self) -> None:
        """A stage begins; nothing where the run has no averages, as in `settle`."""
        if self.average is not None:
            self.average.begin(self.named())

    def settle(self) -> None:
        """A stage ends: the averages become the weights."""
        if self.average is not None:
            self.average.settle(self.named())

    @property
    def averaged(self) -> Callable[[], AbstractContextManager[None]] | None:
        """Inside what it returns the weights are the averages; None where the run has none."""
        average = self.average
        return None if average is None else lambda: average.applied(self.named())

    # Files ------------------------------------------------------------------------------------

    def save_state(self, position: Position, ended: Mapping[str, Any] | None = None) -> None:
        """Add a state to the run, as `prw_flux.resume.save_state`."""
        save_state(
            self.run, self.adapter, self.optimizer, position, self.coredi, self.average, ended
        )

    def save(self) -> None:
        """Write what the run has learnt so far, for inference and for the stages that follow."""
        if self.coredi is not None:
            self.coredi.save(self.run.coredi)
        self.adapter.save_pretrained(self.run.adapter)
