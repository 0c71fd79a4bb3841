"""The weave: all pools of one model, the stages they went through, and the call they obey."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prw import checkpoint
from prw.call import Call, CallSlot, Recall, Record, spread
from prw.config import Config
from prw.consolidation import agreement, centred, fit, remembered
from prw.distributed import whole
from prw.errors import ConfigError, StageError
from prw.ledger import Ledger, Stage
from prw.optim import Kinds, sync
from prw.pool import Pool


class Weave:
    """Grows, freezes, pins, saves and loads the pools of one model together.

    Args:
        pools: the routed groups, by name.
        config: the configuration they were built with.
        fingerprint: what identifies the base, see `prw.fingerprint`; plain JSON data.
        detach: called once by `unload` to take the pools out of the model.
    """

    def __init__(
        self,
        pools: Mapping[str, Pool],
        config: Config,
        *,
        fingerprint: Mapping[str, Any],
        detach: Callable[[], None] | None = None,
    ) -> None:
        if not pools:
            raise ConfigError("a weave needs at least one pool")
        self.pools = dict(pools)
        self.config = config
        self.fingerprint = dict(fingerprint)
        self._detach = detach
        self._ledger = Ledger()
        self._slot = CallSlot()
        self._kinds = Kinds()
        for pool in self.pools.values():
            pool.slot = self._slot

    @property
    def ledger(self) -> Ledger:
        """The stage ledger, an immutable value."""
        return self._ledger

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All stages, oldest first."""
        return self._ledger.stages

    @property
    def newest(self) -> str | None:
        """The name of the open stage, whose expert learns; None between stages."""
        stage = self._ledger.newest
        return None if stage is None else stage.name

    def unlock(self, name: str) -> None:
        """End the open stage and open a new one: a fresh expert joins, the others are veterans.

        Raises:
            StageError: the name is taken or cannot be a file name.
        """
        ledger = self._ledger.unlock(name)
        self._follow(self._ledger.close())
        self._follow(ledger)

    def close(self) -> None:
        """End the open stage, if any: its router is snapshotted and nothing learns any more."""
        self._follow(self._ledger.close())

    def rollback(self, name: str) -> None:
        """Drop every stage after `name`; from now on the model is what `at_stage(name)` was.

        Raises:
            StageError: there is no such stage.
        """
        ledger = self._ledger.rollback(name)
        self._follow(ledger)
        for pool in self.pools.values():
            pool.columns.restore(ledger[name].index)

    def _follow(self, ledger: Ledger, *, fresh: bool = True) -> None:
        for pool in self.pools.values():
            pool.follow(ledger, fresh=fresh)
            self._kinds.learn(dict(pool.named_parameters()))
        self._ledger = ledger

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Unique names and parameters of what may learn now.

        Raises:
            StageError: FSDP2 has sharded them; see `prw.distributed`.
        """
        whole(self.pools)
        for group, pool in self.pools.items():
            for name, parameter in pool.learners():
                yield f"{group}.{name}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that may learn now: the newest expert's and the router's."""
        return (parameter for _, parameter in self.named_parameters())

    def sync(self, optimizer: torch.optim.Optimizer) -> None:
        """Bring an optimizer up to date after `unlock`, `close`, `rollback` or `load_state`.

        New parameters enter the parameter group of their kind (expert or router), frozen ones and
        their state leave, survivors keep their moments.
        """
        sync(optimizer, list(self.parameters()), self._kinds)

    def record(
        self,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        key: int | None = None,
        *,
        keep_inputs: bool = False,
    ) -> Record:
        """Bind a training call that observes its routings, until its ``with`` block ends.

        Args:
            mask: bool ``[batch, tokens]``, the tokens that count.
            context: ``[batch, K]``, appended to what every router reads (``context_features`` K).
            key: 64-bit noise key; None draws one from torch's default generator.
            keep_inputs: also hold what the routers read, for the losses that say so.

        Returns:
            The record, for `veteran_gate_loss`; it stays bound until the next call.
        """
        record = Record(**self._fields(mask, context, key, noisy=True), keep_inputs=keep_inputs)
        self._slot.call = record
        return record

    def call(
        self,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        key: int | None = None,
        *,
        noisy: bool = True,
    ) -> Call:
        """Bind a call like `record` does, without observing; ``noisy=False`` for a quiet one."""
        self._slot.call = Call(**self._fields(mask, context, key, noisy=noisy))
        return self._slot.call

    def _fields(
        self, mask: Tensor | None, context: Tensor | None, key: int | None, *, noisy: bool
    ) -> dict[str, Any]:
        """The fields of a new call; inside `at_stage` or `force_route` it keeps their pin."""
        pin = self._slot.call
        pinned = pin.stage is not None or pin.force is not None
        return {
            "mask": mask,
            "context": context,
            "key": int(torch.randint(-(2**63), 2**63 - 1, ())) if key is None else key,
            "stage": pin.stage,
            "force": pin.force,
            "noisy": noisy and self.config.noise and not pinned,
        }

    def pinned(self, stage: str | None = None, force: str | None = None) -> Call:
        """A deterministic call, not bound, that sees the end of `stage` or forces one expert.

        Raises:
            StageError: there is no such stage.
        """
        for name in (stage, force):
            if name is not None:
                self._ledger[name]
        return Call(stage=stage, force=force)

    @contextmanager
    def at_stage(self, name: str) -> Iterator[Call]:
        """Inside, the model is bit for bit what it was at the end of stage `name`."""
        with self._bound(self.pinned(stage=name)) as call:
            yield call

    @contextmanager
    def force_route(self, name: str) -> Iterator[Call]:
        """Inside, everything goes to the expert of stage `name` with gate 1."""
        with self._bound(self.pinned(force=name)) as call:
            yield call

    @contextmanager
    def _bound(self, call: Call) -> Iterator[Call]:
        before, self._slot.call = self._slot.call, call
        try:
            yield call
        finally:
            self._slot.call = before

    @contextmanager
    def remember(
        self, name: str, rows: int = 64, mask: Tensor | None = None, context: Tensor | None = None
    ) -> Iterator[Call]:
        """Inside, as `at_stage`; afterwards every router holds some inputs that it routed there.

        `consolidate` gives these inputs back to the experts they had at the end of stage `name`.
        Run the model once or a few times on data of that stage. The rows are what the routed layers
        read, so for a first layer they are data; they are saved with the routers,
        and replace those that the stage had unless something is refused. Under data parallelism
        every rank must remember the same inputs.

        Args:
            name: a closed stage.
            rows: how many inputs each routed group keeps: tokens, or means of samples.
            mask: bool ``[batch, tokens]``, the tokens that count.
            context: ``[batch, K]``, appended to what every router reads.

        Raises:
            StageError: there is no such stage, it is still open, or nothing that counts was routed
                inside.
            ConfigError: fewer than one row, or an input that is not finite.
        """
        stage = self._ledger[name]
        if stage.open:
            raise StageError(f"stage {name!r} is still open; close it before it is remembered")
        if rows < 1:
            raise ConfigError(f"rows must be at least 1, got {rows}")
        recall = Recall(stage=name, rows=rows, mask=mask, context=context)
        with self._bound(recall):
            yield recall
        kept = {g: torch.cat(recall.inputs.get(g, [torch.empty(0, 0)])) for g in self.pools}
        for group, rows_MD in kept.items():
            if not len(rows_MD):
                raise StageError(f"nothing was routed by {group!r} while it was to remember")
            if not rows_MD.isfinite().all():
                raise ConfigError(f"an input of {group!r} is not finite and cannot be remembered")
        for group, pool in self.pools.items():
            pool.columns.remember(stage.index, spread(kept[group], rows))

    def consolidate(self, iterations: int = 100) -> float:
        """Fit the live routers to how every stage routed what it remembers. Not in the paper.

        ``min_W mean_M KL(p_stage(h) || softmax(h W))`` per routed group, over the remembered inputs
        h of all stages, without noise. The result is the router that the last stage ends with: the
        free route, `at_stage` of the last stage, and where the next one begins. The snapshots of
        earlier stages stay. Call it between stages, after `remember`. Under data parallelism every
        rank must remember the same inputs, and FSDP2 must not have sharded the routers.

        Args:
            iterations: of L-BFGS, at most.

        Returns:
            The share of the remembered inputs, over all groups, that the free route now sends where
            their stage did.

        Raises:
            StageError: a stage is open, a group remembers nothing, or a fit is not finite; nothing
                is changed then.
        """
        if self.newest is not None:
            raise StageError(f"stage {self.newest!r} is open; close it before it is consolidated")
        whole(self.pools)
        found = {}
        for group, pool in self.pools.items():
            known = remembered(pool.router, pool.columns, len(self._ledger))
            if known is None:
                raise StageError(f"{group!r} remembers nothing yet; run the model in remember()")
            columns_ED = fit(pool.router, known, pool.columns.state()[0], iterations)
            found[group] = known, centred(pool.router, known, columns_ED)
            if not found[group][1].isfinite().all():
                raise StageError(f"the fit for {group!r} is not finite; nothing was changed")
        for group, (_, columns_ED) in found.items():
            self.pools[group].columns.set_signal(columns_ED)
            self.pools[group].columns.renew_snapshot(len(self._ledger) - 1)
        shares = [agreement(self.pools[g].router, *fitted) for g, fitted in found.items()]
        return sum(shares) / len(shares)

    def save(self, path: str | Path, *, extra: Mapping[str, str] | None = None) -> None:
        """Write the folder: configuration, ledger, routers, experts, hashes. All or nothing.

        Args:
            path: the folder; an older checkpoint there is replaced in one step.
            extra: further text files to write beside them, by file name.

        Raises:
            StageError: FSDP2 has sharded the routed parameters; see `prw.distributed`.
        """
        whole(self.pools)
        checkpoint.save(
            path, self.pools, self._ledger, self.config, self.fingerprint, extra=extra or {}
        )

    def load_state(self, path: str | Path) -> None:
        """Become what the folder holds, whatever stages this weave has now.

        Raises:
            CheckpointError: the folder is damaged, too new, or was made for another base.
        """
        self.adopt(checkpoint.read(path))

    def adopt(self, stored: checkpoint.Stored) -> None:
        """Become what a verified checkpoint holds; raises like `load_state`, changing nothing."""
        stored.check_base(self.fingerprint)
        stored.check_config(self.config)
        state = stored.tensors(self.pools)
        self._follow(Ledger())
        self._follow(stored.ledger, fresh=False)
        state.fill(self.pools)
        self._follow(stored.ledger)

    def unload(self) -> None:
        """Take the pools out of the model: the untouched base again."""
        if self._detach is None:
            raise StageError("this weave was built over bare pools; there is nothing to unload")
        self._detach()
        self._detach = None
