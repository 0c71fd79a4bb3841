"""The processes that train one run together: who writes, who has which samples, who is gone.

Every rank holds the whole adapter and steps it by the same gradient, the mean over ranks. What
happens on a run's folder is the first rank's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final, TypeVar, final

import torch
import torch.distributed as dist
from torch import Tensor

from prw import ConfigError, PRWError
from prw_flux import zero
from prw_flux.config import RunConfig

T = TypeVar("T")

PATIENCE: Final = timedelta(minutes=30)
"""How long a rank waits for one that lives; one that died is noticed at once."""


LOST: Final = (
    "another rank of this run has ended or cannot be reached, so this one cannot go on; what it "
    "said itself tells why"
)


class RankLost(PRWError, RuntimeError):
    """Another rank has ended, or cannot be reached."""


@final
class Ranks:
    """This process among those that train together; alone by default.

    What the ranks agree on goes over gloo, whatever their gradients take: it needs no device, and a
    rank that died closes its connections, which the others notice at their next word.

    Args:
        index: of this process.
        count: of all.
        control: the process group that they agree over, where there are several.
    """

    def __init__(self, index: int = 0, count: int = 1, control: Any = None) -> None:
        self.index, self.count = index, count
        self._control = control

    @property
    def first(self) -> bool:
        """Whether this one writes."""
        return self.index == 0

    def share(self, batch_size: int) -> range:
        """Which samples of a batch are this rank's; `require_even` has seen that it can be cut."""
        size = batch_size // self.count
        return range(self.index * size, (self.index + 1) * size)

    def largest(self, value: int) -> int:
        """The largest of the ranks' values.

        Raises:
            RankLost: one of them is gone.
        """
        if self.count == 1:
            return value
        found = torch.tensor([value])
        with noticing():
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self._control)
        return int(found)

    def gathered(self, value: T) -> list[T]:
        """The values of all ranks, by rank; raises like `largest`."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        with noticing():
            dist.all_gather_object(found, value, group=self._control)
        return found

    def each(self, action: Callable[[], T]) -> list[T]:
        """What `action` returns on every rank, by rank.

        Raises:
            PRWError: it raised on one rank an error that users are told; every rank then raises it.
            RankLost: it failed otherwise, or a rank is gone.
        """
        if self.count == 1:
            return [action()]
        made: list[T] = []
        problem: Exception | None = None
        try:
            made.append(action())
        except (PRWError, ValueError, OSError) as told:
            problem = told
        found = self.gathered((made, problem))
        for _, theirs in found:
            if theirs is not None:
                raise theirs
        return [result for results, _ in found for result in results]

    def exchanged(self, mine: Sequence[Tensor]) -> list[list[Tensor]]:
        """The tensors of every rank, by rank; raises like `largest`.

        Args:
            mine: contiguous, on the CPU; any number of any shapes, which may differ from rank to
                rank.
        """
        if self.count == 1:
            return [list(mine)]
        found = []
        for rank, shapes in enumerate(self.gathered([(x.shape, x.dtype) for x in mine])):
            own = rank == self.index
            tensors = list(mine) if own else [torch.empty(s, dtype=dtype) for s, dtype in shapes]
            for tensor in tensors:
                if tensor.numel():
                    with noticing():  # as bytes, which gloo carries whatever they mean
                        dist.broadcast(tensor.view(-1).view(torch.uint8), rank, self._control)
            found.append(tensors)
        return found

    def wait(self) -> None:
        """Until all ranks are here; raises like `largest`."""
        self.largest(0)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a scalar over the ranks, without graph; raises like `largest`."""
        value = value.detach()
        if self.count == 1:
            return value
        found = value.clone()
        with noticing():
            dist.all_reduce(found)
        return found / self.count

    def spread(self, tensor: Tensor) -> None:
        """Overwrite a tensor by the first rank's; raises like `largest`."""
        if self.count > 1 and tensor.numel():
            with noticing():
                dist.broadcast(tensor.data, 0)

    def once(self, action: Callable[[], T]) -> T:
        """What `action` returns on the first rank, the only one where it runs.

        Raises:
            PRWError: it raised there one that users are told; every rank then raises it.
            RankLost: it failed otherwise, or a rank is gone.
        """
        if self.count == 1:
            return action()
        told: list[Any] = [None, None]
        if self.first:
            try:
                told[0] = action()
            except (PRWError, ValueError, OSError) as problem:
                told[1] = problem
        with noticing():
            dist.broadcast_object_list(told, 0, group=self._control)
        if told[1] is not None:
            raise told[1]
        result: T = told[0]
        return result


def join() -> Ranks:
    """This process's place among those that torchrun or accelerate started; alone without them.

    Chooses the device: the local rank's GPU, or the CPU where there is none.

    Raises:
        ConfigError: the launcher asks for DeepSpeed, which is not installed.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if zero.is_launched():
        zero.require_installed()
    if count == 1:
        return Ranks()
    from accelerate import PartialState

    on_cpu = not torch.cuda.is_available() or bool(os.environ.get("ACCELERATE_USE_CPU"))
    state = PartialState(cpu=on_cpu, timeout=PATIENCE)
    return Ranks(state.process_index, count, dist.new_group(backend="gloo", timeout=PATIENCE))


def leave() -> None:
    """End what `join` began; nothing where it began nothing."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def noticing(remedy: str = "") -> Iterator[None]:
    """Turns a collective that failed because of another rank into RankLost, and says what to do."""
    try:
        yield
    except RuntimeError as problem:
        if not isinstance(problem, RankLost) and not is_lost(problem):
            raise
        raise RankLost(f"{LOST}{remedy and f'; {remedy}'}") from problem


def is_lost(problem: RuntimeError) -> bool:
    """Whether an error of torch says that another process is gone or too slow."""
    return isinstance(problem, dist.DistError) or (
        not isinstance(problem, PRWError) and "gloo" in str(problem)
    )


def require_even(config: RunConfig, ranks: int) -> None:
    """Refuse batches that cannot be split evenly over ranks and micro-batches.

    Their losses are means, and the mean of unequal parts is another one.

    Raises:
        ConfigError: names the stage, and a size that can.
    """
    parts = ranks * config.accumulate
    for stage in config.stages:
        if stage.batch_size % parts:
            near = max(1, round(stage.batch_size / parts)) * parts
            raise ConfigError(
                f"stages.{stage.name}.batch_size {stage.batch_size} cannot be split evenly over "
                f"{ranks} ranks with accumulate={config.accumulate}: set it to {near}, or any "
                f"multiple of {parts}"
            )
