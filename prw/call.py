"""The call: one frozen value that fixes everything a forward may depend on beside its input.

Shape suffixes: T routed rows, D in_features, N experts that take part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prw.errors import ConfigError, StageError
from prw.noise import word
from prw.prompt import Prompt
from prw.router import RouterPass, Routing


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """What a forward is told. The default is a plain deterministic call.

    Attributes:
        key: 64-bit noise key; the same key gives the same noise.
        mask: bool, ``[batch, tokens]``, True where a token counts: others enter neither usage nor
            a sample's mean.
        context: ``[batch, K]``, appended to what every router reads; never with a graph.
        first: how many samples of a batch come before these: the parts of a batch, on ranks or as
            micro-batches, then have the noise of the whole one.
        stage: pin routing to the end of this stage.
        force: send everything to the expert of this stage with gate 1.
        noisy: whether routers add noise, in modules that are in training mode.
        prompt: what a decoder's prompt decided for the tokens that continue it.
        seed, start: key and first as tensors, for the routers.
    """

    key: int = 0
    mask: Tensor | None = None
    context: Tensor | None = None
    first: int = 0
    stage: str | None = None
    force: str | None = None
    noisy: bool = False
    prompt: Prompt = field(default_factory=Prompt, repr=False)
    seed: Tensor = field(init=False, repr=False)
    start: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        mask: Any = self.mask
        if mask is not None and not (isinstance(mask, Tensor) and mask.dtype == torch.bool):
            what = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise ConfigError(f"a mask is a bool tensor, got {what}; give mask.bool()")
        context: Any = self.context
        if context is not None and not isinstance(context, Tensor):
            what = type(context).__name__
            raise ConfigError(f"a context is a tensor [batch, context_features], got a {what}")
        if type(self.key) is not int:
            raise ConfigError(f"a key is a whole number of 64 bits, got {self.key!r}")
        if type(self.first) is not int or self.first < 0:
            raise ConfigError(f"first counts samples, got {self.first!r}")
        object.__setattr__(self, "seed", word(self.key))
        object.__setattr__(self, "start", word(self.first))

    def __enter__(self) -> Call:
        return self

    def __exit__(self, *exception: object) -> None:
        return None


@dataclass(frozen=True, kw_only=True, eq=False)
class Recall(Call):
    """A call that keeps what the routers of a finished stage read; see `Weave.remember`.

    Attributes:
        rows: how many inputs are kept per layer and forward, evenly spread over the rows.
        inputs: by group and layer, the inputs ``[rows, D]`` of each forward.
    """

    rows: int
    inputs: dict[str, dict[str, list[Tensor]]] = field(default_factory=dict, repr=False)

    def keep(self, group: str, layer: str, h_TD: Tensor, counted_T: Tensor | None) -> None:
        """Keep some of the rows that count."""
        rows_TD = h_TD.detach() if counted_T is None else h_TD.detach()[counted_T.flatten()]
        layers = self.inputs.setdefault(group, {})
        layers.setdefault(layer, []).append(spread(rows_TD, self.rows))

    def kept(self, group: str) -> Tensor | None:
        """``[M, D]``: what each layer of the group read, once where several read the same."""
        found: list[Tensor] = []
        for forwards in self.inputs.get(group, {}).values():
            rows_MD = spread(torch.cat(forwards), self.rows)
            if len(rows_MD) and not any(torch.equal(rows_MD, other) for other in found):
                found.append(rows_MD)
        return torch.cat(found) if found else None


def spread(rows_TD: Tensor, count: int) -> Tensor:
    """At most `count` of the rows, evenly spread from the first to the last."""
    last = len(rows_TD) - 1
    if last < count:
        return rows_TD
    return rows_TD[torch.arange(count, device=rows_TD.device) * last // max(count - 1, 1)]


@dataclass
class GroupRecord:
    """What was observed of one routed group: sums without graph.

    Attributes:
        used: int64 scalar, how many rows went to the newest expert.
        count: int64 scalar, how many rows were counted.
        columns: router columns (the parameters themselves) that may learn.
        jacobian: for each of them ``[D]``, the derivative of the straight-through ``used``.
        routings: the detached routing of each counted forward.
        newest: index of the expert whose usage was counted.
        masks: of each forward, which of its rows count; None counts all.
        passes: where the record keeps inputs, the evaluation behind each forward; its columns are
            the parameters themselves.
        first: of each forward, bool scalar, False for one that was recomputed in backward and
            counts no row; None where that was known before it was observed.
    """

    used: Tensor
    count: Tensor
    columns: tuple[Tensor, ...]
    jacobian: tuple[Tensor, ...]
    routings: list[Routing]
    newest: int
    masks: list[Tensor | None] = field(default_factory=list)
    passes: list[RouterPass] = field(default_factory=list)
    first: list[Tensor | None] = field(default_factory=list)

    def forwards(self) -> list[Routing]:
        """The routings, without those of recomputed forwards; waits for the device."""
        pairs = zip(self.routings, self.first, strict=True)
        return [routing for routing, first in pairs if first is None or bool(first)]

    def joined(self, other: GroupRecord) -> GroupRecord:
        """This and later forwards of the same group.

        Raises:
            StageError: other columns learn there.
        """
        if len(self.columns) != len(other.columns) or self.newest != other.newest:
            raise StageError("a stage began inside a record; begin a new record after unlock()")
        return GroupRecord(
            used=self.used + other.used,
            count=self.count + other.count,
            columns=self.columns,
            jacobian=tuple(a + b for a, b in zip(self.jacobian, other.jacobian, strict=True)),
            routings=self.routings + other.routings,
            newest=self.newest,
            masks=self.masks + other.masks,
            passes=self.passes + other.passes,
            first=self.first + other.first,
        )


@dataclass
class Heard:
    """One forward of one group, and what was heard before it; the first link holds nothing."""

    name: str = ""
    seen: GroupRecord | None = None
    before: Heard | None = None


class Tally:
    """The mutable part of a record: sums per group, whether it was entered and still listens.

    A forward is heard by putting it in front of a chain, and added up later. A compiled graph can
    do that without looking at the chain, so that it is the same graph for every micro-batch.
    """

    def __init__(self) -> None:
        self.listening = True
        self.entered = False
        self._heard = Heard()
        self._groups: dict[str, GroupRecord] = {}

    def add(self, name: str, seen: GroupRecord) -> None:
        """Hear one forward of the group `name`."""
        self._heard = Heard(name, seen, self._heard)
        if not torch.compiler.is_compiling():
            self._add_up()

    @property
    def groups(self) -> dict[str, GroupRecord]:
        """The sums, by the name of the group."""
        self._add_up()
        return self._groups

    def _add_up(self) -> None:
        heard: Heard | None = self._heard
        self._heard = Heard()
        chain: list[tuple[str, GroupRecord]] = []
        while heard is not None and heard.seen is not None:
            chain.append((heard.name, heard.seen))
            heard = heard.before
        for name, seen in reversed(chain):
            known = self._groups.get(name)
            self._groups[name] = seen if known is None else known.joined(seen)


@dataclass(frozen=True, kw_only=True, eq=False)
class Record(Call):
    """A call that also observes routing, until its ``with`` block ends.

    A forward that activation checkpointing repeats inside backward is not counted again. A record
    is entered once: it may span many forwards, but when its block has ended, or another call was
    bound since, it would count nothing, and says so.

    Attributes:
        keep_inputs: whether it holds what the routers read, without graph, for losses that need
            more of a routing than the usage of the newest expert.
    """

    keep_inputs: bool = False
    tally: Tally = field(default_factory=Tally, repr=False)

    def __enter__(self) -> Record:
        if self.tally.entered or not self.tally.listening:
            raise StageError(
                "this record has ended and would count nothing; make a new one with weave.record()"
            )
        self.tally.entered = True
        return self

    def __exit__(self, *exception: object) -> None:
        self.tally.listening = False

    @property
    def listening(self) -> bool:
        """Whether a forward that happens now is observed."""
        return self.tally.listening and (torch.compiler.is_compiling() or not _recomputing())

    def usage(self) -> float:
        """U, the share of counted rows (all groups together) that the newest expert received."""
        used, count = totals([self])
        return float(used) / max(int(count), 1)

    def by_group(self) -> dict[str, dict[str, Any]]:
        """Per group: ``expert`` and ``gate`` of every counted forward, flattened, and ``usage``."""
        return {
            name: {
                "expert": torch.cat([routing.expert.flatten() for routing in group.forwards()]),
                "gate": torch.cat([routing.gate.flatten() for routing in group.forwards()]),
                "usage": float(group.used) / max(int(group.count), 1),
            }
            for name, group in self.tally.groups.items()
        }


def _recomputing() -> bool:
    """Whether autograd runs a backward now, so that a forward is a recomputation."""
    return torch._C._current_graph_task_id() != -1


@torch.library.custom_op("prw::is_first", mutates_args=())
def is_first(like: Tensor) -> Tensor:
    """Bool scalar beside `like`: whether this is no recomputation.

    For compiled graphs, which know it only when they run: activation checkpointing around a
    compiled module repeats the whole graph.
    """
    return torch.full((), not _recomputing(), device=like.device)


@is_first.register_fake
def _(like: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.bool, device=like.device)


def totals(records: Sequence[Record]) -> tuple[Tensor, Tensor]:
    """Used and counted rows summed over the groups of all records, int64 scalars."""
    groups = [group for record in records for group in record.tally.groups.values()]
    if not groups:
        return torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    device = groups[0].used.device
    used = torch.stack([group.used.to(device) for group in groups]).sum()
    return used, torch.stack([group.count.to(device) for group in groups]).sum()


class CallSlot:
    """Where a weave and its pools find the call that is bound now."""

    def __init__(self) -> None:
        self.call = Call()
