"""The columns of a router: parameters that grow with the stages, snapshots, remembered inputs.

Shape suffixes: D width of what the router reads, E experts, M remembered inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from prw.precision import at_least_fp32


class Columns(nn.Module):
    """Router columns, one parameter per expert, and their snapshots at the end of each stage.

    Args:
        width: D, the width of what the router reads.
        noise: whether each expert also has a column for the width of its noise.

    Attributes:
        persistent: whether snapshots made from now on are part of ``state_dict``. Their shapes
            depend on the stage only, so a file of few stages loads into a pool of more.
    """

    anchor: Tensor
    """Carries device and dtype while there is no column yet."""

    def __init__(self, width: int, *, noise: bool) -> None:
        super().__init__()
        self.width = width
        self.noisy = noise
        self.persistent = False
        self.signal = nn.ParameterList()
        self.noise = nn.ParameterList()
        self.snapshots = nn.ModuleDict()
        self.register_buffer("anchor", torch.empty(0), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts; a cast below fp32 leaves columns and snapshots as they are."""
        super()._apply(at_least_fp32(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def grow(self, first_D: Tensor | None = None) -> None:
        """Append a column that begins with `first_D`, or with zero: logit 0 for every input."""
        column = nn.Parameter(self.anchor.new_zeros(self.width))
        if first_D is not None:
            column.data.copy_(first_D)
        self.signal.append(column)
        if self.noisy:
            self.noise.append(nn.Parameter(self.anchor.new_zeros(self.width)))

    def truncate(self, count: int) -> None:
        """Drop all columns and snapshots from index `count` on."""
        if count < len(self.signal):
            self.signal = nn.ParameterList(list(self.signal)[:count])
            self.noise = nn.ParameterList(list(self.noise)[:count])
            for key in [key for key in self.snapshots if int(key) >= count]:
                del self.snapshots[key]

    def seen(
        self, count: int, pinned: bool, learning: frozenset[int]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The first `count` signal and noise columns, detached unless they learn.

        Args:
            count: E.
            pinned: read the snapshot of stage `count` - 1 where there is one.
            learning: indices of the live columns that may learn.
        """
        kept = self.snapshot(count - 1) if pinned else None
        if kept is not None:
            return kept[0].unbind(), kept[1].unbind()
        signal, noise = (
            tuple(c if i in learning else c.detach() for i, c in enumerate(list(part)[:count]))
            for part in (self.signal, self.noise)
        )
        return signal, noise

    def pairs(self, indices: frozenset[int]) -> list[tuple[int, Tensor, Tensor | None]]:
        """Index, signal and noise parameter of the given columns."""
        noise = list(self.noise) or [None] * len(self.signal)
        return [(index, self.signal[index], noise[index]) for index in sorted(indices)]

    def state(self) -> tuple[Tensor, Tensor]:
        """Copies of the live columns: signal ``[E, D]`` and noise ``[E, D]``, or ``[0, D]``."""
        signal, noise = (
            torch.stack([c.detach() for c in part])
            if len(part)
            else self.anchor.new_zeros(0, self.width)
            for part in (self.signal, self.noise)
        )
        return signal, noise

    @torch.no_grad()
    def set_signal(self, signal_ED: Tensor) -> None:
        """Write values into the live signal columns, which stay the same parameters."""
        for column, value in zip(self.signal, signal_ED, strict=True):
            column.copy_(value)

    def put_state(self, signal_ED: Tensor, noise_ED: Tensor) -> None:
        """Replace the live columns by new parameters with the given values."""
        device = self.anchor.device
        for part, values in ((self.signal, signal_ED), (self.noise, noise_ED)):
            for index, value in enumerate(values):
                part[index] = nn.Parameter(value.to(device, copy=True))

    def snapshot(self, stage: int) -> tuple[Tensor, Tensor] | None:
        """The columns as they were at the end of `stage`; None while it was never closed."""
        kept = self.snapshots[str(stage)] if str(stage) in self.snapshots else None
        return (kept.signal, kept.noise) if isinstance(kept, Snapshot) else None

    def memory(self, stage: int) -> Tensor:
        """Inputs ``[M, D]`` that `stage` routed, from `remember`; M is 0 where nothing was kept."""
        kept = self.snapshots[str(stage)] if str(stage) in self.snapshots else None
        if isinstance(kept, Snapshot):
            return kept.memory
        return self.anchor.new_zeros(0, self.width)

    def remember(self, stage: int, memory_MD: Tensor) -> None:
        """Keep router inputs beside the snapshot of a closed stage, instead of earlier ones."""
        kept = self.snapshots[str(stage)]
        assert isinstance(kept, Snapshot)
        kept.memory = memory_MD.detach().to(self.anchor.device, copy=True)

    def take_snapshot(self, stage: int) -> None:
        """Keep the columns 0..stage as they are now."""
        signal_ED, noise_ED = self.state()
        self.put_snapshot(stage, signal_ED[: stage + 1], noise_ED[: stage + 1])

    def renew_snapshot(self, stage: int) -> None:
        """Replace the columns of a snapshot by the live ones; its memory stays."""
        memory_MD = self.memory(stage)
        self.take_snapshot(stage)
        self.remember(stage, memory_MD)

    def put_snapshot(self, stage: int, signal_ED: Tensor, noise_ED: Tensor) -> None:
        """Keep the given columns as those of the end of `stage`."""
        device = self.anchor.device
        self.snapshots[str(stage)] = Snapshot(
            signal_ED.to(device), noise_ED.to(device), persistent=self.persistent
        )

    @torch.no_grad()
    def restore(self, stage: int) -> None:
        """Write the snapshot of `stage` back into the live columns."""
        kept = self.snapshot(stage)
        if kept is not None:
            for part, values in zip((self.signal, self.noise), kept, strict=True):
                for column, value in zip(list(part)[: stage + 1], values, strict=True):
                    column.copy_(value)


class Snapshot(nn.Module):
    """Router columns of one stage and inputs it routed: buffers, so that they follow the model."""

    signal: Tensor
    noise: Tensor
    memory: Tensor

    def __init__(self, signal_ED: Tensor, noise_ED: Tensor, *, persistent: bool = False) -> None:
        super().__init__()
        self.register_buffer("signal", signal_ED.detach().clone(), persistent=persistent)
        self.register_buffer("noise", noise_ED.detach().clone(), persistent=persistent)
        self.register_buffer("memory", signal_ED.new_empty(0, signal_ED.shape[1]), persistent=False)
