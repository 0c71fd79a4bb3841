"""Exponential moving averages of what trains: experts, router columns, features.

After the n-th step (n = 1, 2, ...) of a parameter p

    m_n = d_n m_{n-1} + (1 - d_n) p_n,    d_n = min(decay, (n - 1) / (n + 8))

so m_1 = p_1, and young averages follow quickly. Every parameter counts its own steps: the expert of
a new stage starts fresh beside routers that have trained for long, and a frozen expert keeps the
average that it had. Training itself never reads an average before the end of a stage, where the
averages become the weights: the expert that turns into a veteran, the routers that are snapshotted
with it, and the adapter that is written are all averaged, so that they fit each other in every
later stage. The weights as training left them stay in the state as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn

from prw import CheckpointError

Named = Iterable[tuple[str, nn.Parameter]]


@final
class Average:
    """The averages of one run, by the names of `prw_flux.resume.named_parameters`.

    Args:
        decay: in [0, 1); see the module.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.means: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.raw: dict[str, Tensor] = {}

    @torch.no_grad()
    def begin(self, learners: Named) -> None:
        """A stage begins: averages start where its parameters are; those that are new count from 0.

        What is consolidated between two stages moves routers, hence not where the stage before
        left its averages.
        """
        self.raw = {}
        for name, parameter in learners:
            self.means[name] = parameter.detach().clone()
            self.counts.setdefault(name, 0)

    @torch.no_grad()
    def update(self, learners: Named) -> None:
        """One step of training has been taken."""
        for name, parameter in learners:
            count = self.counts.get(name, 0) + 1
            if name not in self.means:
                self.means[name] = parameter.detach().clone()
            keep = min(self.decay, (count - 1) / (count + 8))
            self.means[name].lerp_(parameter, 1.0 - keep)
            self.counts[name] = count

    @contextmanager
    def applied(self, named: Named) -> Iterator[None]:
        """Inside, a parameter that has an average is it; afterwards it is itself, bit for bit."""
        before = self._put(named)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in before.values():
                    parameter.copy_(value)

    def settle(self, learners: Named) -> None:
        """A stage ends: the averages become the weights; what the weights were is kept in `raw`."""
        self.raw = {name: value for name, (_, value) in self._put(learners).items()}

    @torch.no_grad()
    def _put(self, named: Named) -> dict[str, tuple[nn.Parameter, Tensor]]:
        before: dict[str, tuple[nn.Parameter, Tensor]] = {}
        for name, parameter in named:
            if name in self.means:
                before[name] = parameter, parameter.detach().clone()
                parameter.copy_(self.means[name])
        return before

    # Files ------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """For a state: ``NAME/mean``, ``NAME/count`` and, after a stage has ended, ``NAME/raw``."""
        found = {f"{name}/mean": mean for name, mean in self.means.items()}
        found |= {f"{name}/count": torch.tensor(n) for name, n in self.counts.items()}
        return found | {f"{name}/raw": value for name, value in self.raw.items()}

    def load(self, tensors: Mapping[str, Tensor], named: Named) -> None:
        """Take over what `tensors` gave, beside the parameters that it belongs to.

        Raises:
            CheckpointError: an average of another shape than its parameter.
        """
        for name, parameter in named:
            mean, count = tensors.get(f"{name}/mean"), tensors.get(f"{name}/count")
            if mean is None or count is None:
                continue
            if mean.shape != parameter.shape:
                raise CheckpointError(
                    f"the average of {name} is {list(mean.shape)}, the parameter "
                    f"{list(parameter.shape)}; the state belongs to another run"
                )
            self.means[name] = mean.to(parameter.device, parameter.dtype)
            self.counts[name] = int(count)
            if f"{name}/raw" in tensors:
                self.raw[name] = tensors[f"{name}/raw"]
