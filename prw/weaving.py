"""The weave: all pools of one model, the stages they went through, and the call they obey."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prw import checkpoint, exchange, merging
from prw.call import Call, CallSlot, Recall, Record
from prw.checks import check_whole
from prw.config import Config
from prw.consolidation import consolidate
from prw.distributed import whole
from prw.errors import ConfigError, StageError
from prw.ledger import Ledger, Stage
from prw.linear import RoutedLinear
from prw.optim import Kinds, never_stepped, sync
from prw.pool import Pool
from prw.telemetry import RoutingSummary

if TYPE_CHECKING:
    from rich.console import Group


class Weave:
    """Grows, freezes, pins, saves and loads the pools of one model together.

    Args:
        pools: the routed groups, by name.
        config: the configuration they were built with.
        fingerprint: what identifies the base, see `prw.fingerprint`; plain JSON data.
        detach: called once by `unload` to take the pools out of the model.
        layers: the routed layers by full name, into whose weights `merge` folds an expert.
    """

    def __init__(
        self,
        pools: Mapping[str, Pool],
        config: Config,
        *,
        fingerprint: Mapping[str, Any],
        detach: Callable[[], None] | None = None,
        layers: Mapping[str, RoutedLinear] | None = None,
    ) -> None:
        if not pools:
            raise ConfigError("a weave needs at least one pool")
        self.pools = dict(pools)
        self.config = config
        self.fingerprint = dict(fingerprint)
        self._detach = detach
        self._layers = dict(layers or {})
        self._ledger = Ledger()
        self._slot = CallSlot()
        self._kinds = Kinds()
        for pool in self.pools.values():
            pool.slot = self._slot

    def __getstate__(self) -> dict[str, Any]:
        """Without what is known about parameters by identity, which a copy has to learn anew."""
        return {name: value for name, value in vars(self).items() if name != "_kinds"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._kinds = Kinds()
        for pool in self.pools.values():
            self._kinds.learn(dict(pool.named_parameters()))

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

        `sync` then tells an optimizer which parameters are new; a new optimizer needs no `sync`.

        Raises:
            StageError: the name is taken or cannot be a file name, or the weave is unloaded.
        """
        self._check_in_place()
        ledger = self._ledger.unlock(name)
        self._warn_if_never_stepped()
        self._follow(self._ledger.close())
        self._follow(ledger)

    def close(self) -> None:
        """End the open stage, if any: its router is snapshotted and nothing learns any more."""
        self._warn_if_never_stepped()
        self._follow(self._ledger.close())

    def _warn_if_never_stepped(self) -> None:
        stage = self._ledger.newest
        if stage is not None and never_stepped(p.expert(stage.index) for p in self.pools.values()):
            warnings.warn(
                f"the expert of stage {stage.name!r} had gradients, but no optimizer has stepped "
                "it; call weave.sync(optimizer) after unlock()",
                stacklevel=3,
            )

    def rollback(self, name: str) -> None:
        """Drop every stage after `name`; from now on the model is what `at_stage(name)` was.

        Raises:
            StageError: there is no such stage.
        """
        ledger = self._ledger.rollback(name)
        self._follow(ledger)
        for pool in self.pools.values():
            pool.columns.restore(ledger[name].index)

    def rename(self, old: str, new: str) -> None:
        """Give a stage and its expert another name; the folder on disk follows at the next save.

        Raises:
            StageError: there is no stage `old`, `new` is taken or cannot be a file name, or the
                stage is pinned by `at_stage` or `force_route` now.
        """
        ledger = self._ledger.rename(old, new)
        if old in (self._slot.call.stage, self._slot.call.force):
            raise StageError(f"stage {old!r} is pinned now; rename it outside of the with block")
        self._follow(ledger)

    def freeze(self, name: str) -> None:
        """Let an expert learn no longer, until the open stage ends.

        Freezing the newest leaves only the router to learn; freezing a veteran undoes `thaw`.
        `sync` takes the parameters out of an optimizer.

        Raises:
            StageError: there is no such stage.
        """
        self._follow(self._ledger.freeze(name))

    def thaw(self, name: str) -> None:
        """Let a veteran learn beside the newest expert, until the open stage ends.

        Its earlier self is gone then, and nothing keeps a copy: `at_stage` of its own and of every
        later stage changes wherever they route to it, the same for `rollback`; and the hash of its
        file is another one at the next save. `save` before, if the old expert may be wanted again.
        `sync` brings the parameters into an optimizer, without moments.

        Raises:
            StageError: there is no such stage, or none is open.
        """
        self._follow(self._ledger.thaw(name))

    def export_expert(self, name: str, path: str | Path) -> None:
        """Write the expert of a stage as a plain LoRA folder, which PEFT opens; all or nothing.

        ``PeftModel.from_pretrained(base, path)`` computes what the model does inside
        `force_route`, bit for bit on the reference backend in fp32. The router stays behind.

        Raises:
            StageError: there is no such stage.
            CheckpointError: `path` is something else than such a folder, or cannot be written.
        """
        exchange.export_expert(self.pools, self._ledger[name].index, path)

    def import_expert(self, path: str | Path, name: str) -> None:
        """Let an existing LoRA join as a closed stage of its own.

        The names and settings of PEFT, of diffusers and of kohya's tools are understood. Earlier
        stages keep their bits under `at_stage`. The router column of the LoRA is zero, so in the
        free route it takes the inputs for which every other column says no (all of them, if it is
        the first); `force_route` uses it on purpose, and with ``router_train="all"`` the router
        learns about it in the next stage. Where the LoRA lacks a layer its expert is zero, which
        the log says, and stays zero even when thawed.

        Args:
            path: a ``.safetensors`` file or a folder with one.
            name: of the new stage.

        Raises:
            StageError: a stage is open, or the name is taken or cannot be a file name.
            CheckpointError: the file is missing, damaged, no plain LoRA, or changes a layer that
                this weave does not adapt. Nothing is changed then.
        """
        if self.newest is not None:
            raise StageError(
                f"stage {self.newest!r} is open; close it before an expert is imported"
            )
        before, ledger = self._ledger, self._ledger.unlock(name)
        lora = exchange.read_lora(path, self.pools)
        try:
            self._follow(ledger, fresh=False)
            lora.fill(self.pools, ledger[name].index)
            self._follow(ledger.close())
        except BaseException:
            self._follow(before)
            raise

    def _follow(self, ledger: Ledger, *, fresh: bool = True) -> None:
        for pool in self.pools.values():
            pool.follow(ledger, fresh=fresh)
            self._kinds.learn(dict(pool.named_parameters()))
        self._ledger = ledger

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Unique names and parameters of what may learn now.

        Raises:
            StageError: FSDP2 or ZeRO-3 has sharded them; see `prw.distributed`.
        """
        whole(self.pools)
        for group, pool in self.pools.items():
            for name, parameter in pool.learners():
                yield f"{group}.{name}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that may learn now: as a rule the newest expert's and the router's."""
        return (parameter for _, parameter in self.named_parameters())

    def sync(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Iterable[nn.Parameter] | None = None,
    ) -> None:
        """Bring an optimizer up to date after whatever changed which parameters may learn.

        New parameters enter the parameter group of their kind (expert or router), frozen ones and
        their state leave, survivors keep their moments.

        Args:
            optimizer: any optimizer with parameter groups.
            parameters: what it should hold, where several optimizers share the work: those of
                `parameters` that are its own. Muon, for example, takes matrices only. None means
                all that may learn.
        """
        own = None if parameters is None else {id(parameter) for parameter in parameters}
        learning = [(n, p) for n, p in self.named_parameters() if own is None or id(p) in own]
        sync(optimizer, learning, self._kinds)

    def record(
        self,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        key: int | None = None,
        *,
        first: int = 0,
        keep_inputs: bool = False,
    ) -> Record:
        """Bind a training call that observes its routings, until its ``with`` block ends.

        Args:
            mask: bool ``[batch, tokens]``, the tokens that count.
            context: ``[batch, K]``, appended to what every router reads (``context_features`` K).
            key: 64-bit noise key; None draws one from torch's default generator.
            first: how many samples of the batch come before these, on other ranks or in earlier
                micro-batches: with one key, the parts have the noise of the whole.
            keep_inputs: also hold what the routers read, for the losses that say so.

        Returns:
            The record, for `veteran_gate_loss`; it stays bound until the next call.
        """
        fields = self._fields(mask, context, key, noisy=True)
        record = Record(**fields, first=first, keep_inputs=keep_inputs)
        self._bind(record)
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
        call = Call(**self._fields(mask, context, key, noisy=noisy))
        self._bind(call)
        return call

    def _bind(self, call: Call) -> None:
        """Bind a call; a record that was bound until now hears nothing more."""
        if isinstance(self._slot.call, Record):
            self._slot.call.tally.listening = False
        self._slot.call = call

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
    def at_stage(
        self, name: str, *, mask: Tensor | None = None, context: Tensor | None = None
    ) -> Iterator[Call]:
        """Inside, the model is bit for bit what it was at the end of stage `name`.

        Args:
            name: of the stage.
            mask, context: as in `record`, for the forwards inside.

        Raises:
            StageError: there is no such stage.
        """
        pin = self.pinned(stage=self._ledger[name].name)
        with self._bound(replace(pin, mask=mask, context=context)) as call:
            yield call

    @contextmanager
    def force_route(self, name: str) -> Iterator[Call]:
        """Inside, everything goes to the expert of stage `name` with gate 1."""
        with self._bound(self.pinned(force=self._ledger[name].name)) as call:
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
            rows: how many inputs are kept of each routed layer: tokens, or means of samples. Layers
                of a group that read the same ones keep them once.
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
        check_whole("rows", rows, 1)
        recall = Recall(stage=name, rows=rows, mask=mask, context=context)
        with self._bound(recall):
            yield recall
        kept = {}
        for group in self.pools:
            rows_MD = recall.kept(group)
            if rows_MD is None:
                raise StageError(f"nothing was routed by {group!r} while it was to remember")
            if not rows_MD.isfinite().all():
                raise ConfigError(f"an input of {group!r} is not finite and cannot be remembered")
            kept[group] = rows_MD
        for group, pool in self.pools.items():
            pool.columns.remember(stage.index, kept[group])

    def consolidate(self, iterations: int = 100) -> float:
        """Fit the live routers to how every stage routed what it remembers. Not in the paper.

        ``min_W mean_M KL(p_stage(h) || softmax(h W))`` per routed group, over the remembered inputs
        h of all stages, without noise. The result is the router that the last stage ends with: the
        free route, `at_stage` of the last stage, and where the next one begins. The snapshots of
        earlier stages stay. Call it between stages, after `remember`. Under data parallelism every
        rank must remember the same inputs, and nothing must have sharded the routers.

        Args:
            iterations: of L-BFGS, at most.

        Returns:
            The share of the remembered inputs, over all groups, that the free route now sends where
            their stage did.

        Raises:
            ConfigError: no iteration.
            StageError: a stage is open, a group remembers nothing, or a fit is not finite; nothing
                is changed then.
        """
        check_whole("iterations", iterations, 1)
        if self.newest is not None:
            raise StageError(f"stage {self.newest!r} is open; close it before it is consolidated")
        whole(self.pools)
        return consolidate(self.pools, len(self._ledger), iterations)

    def save(self, path: str | Path, *, extra: Mapping[str, str] | None = None) -> None:
        """Write the folder: configuration, ledger, routers, experts, hashes. All or nothing.

        Args:
            path: the folder; an older checkpoint there is replaced in one step.
            extra: further text files to write beside them, by file name.

        Raises:
            StageError: FSDP2 or ZeRO-3 has sharded the routed parameters; see `prw.distributed`.
        """
        whole(self.pools)
        checkpoint.save(
            path, self.pools, self._ledger, self.config, self.fingerprint, extra=extra or {}
        )

    def push_to_hub(self, repo_id: str, *, license: str, **options: Any) -> str:
        """Upload the folder with a model card to the Hugging Face Hub, see `prw.hub.push_to_hub`.

        Args:
            repo_id: ``"name"`` or ``"owner/name"``; made where it is missing.
            license: the Hub's identifier, ``"apache-2.0"``.
            options: ``base_model``, ``example``, ``memories``, ``private``, ``revision``,
                ``message`` and ``token``.

        Returns:
            The address of the commit.
        """
        from prw import hub

        return hub.push_to_hub(self, repo_id, license=license, **options)

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

    def report(self, summary: RoutingSummary | None = None) -> Group:
        """Tables of the stages and their experts, and of where routing went; prints nothing.

        Needs rich (extra ``report``). ``rich.print(weave.report(...))`` shows it.

        Args:
            summary: of some records of this weave, `prw.telemetry.summarise`.

        Raises:
            ConfigError: the summary is of another weave.
        """
        from prw.report import report

        return report(self, summary)

    def unload(self) -> None:
        """Take the pools out of the model: the untouched base again.

        Raises:
            StageError: that was done already, or the weave was built over bare pools.
        """
        self._check_in_place()
        if self._detach is None:
            raise StageError("this weave was built over bare pools; there is nothing to unload")
        self._detach()
        self._detach = None

    def _check_in_place(self) -> None:
        if self._detach is None and self._layers:
            raise StageError("this weave is unloaded already; weave or load the model again")

    def merge(self, name: str) -> None:
        """Fold the expert of a stage into the base weights and unload: a plain, faster model.

        ``W + alpha / R * B A``: the model of `force_route`, up to the rounding of one sum to the
        dtype of W. Everything else of the weave is gone; the layers get new weight parameters, so
        one that was tied to another layer's no longer is.

        Raises:
            StageError: there is no such stage, the weave has no layers or is unloaded, or a weight
                is quantised or distributed, where merging would lose more than that rounding.
                Nothing is changed then.
        """
        index = self._ledger[name].index
        self._check_mergeable()
        only = tuple(float(stage.index == index) for stage in self.stages)
        self._commit(merging.merged_weights(self._layers, dict.fromkeys(self.pools, only)))

    def merge_average(
        self,
        run: Callable[[], Tensor],
        *,
        tolerance: float,
        mask: Tensor | None = None,
        context: Tensor | None = None,
    ) -> merging.Fidelity:
        """Fold the average of all experts into the base weights and unload, if that costs little.

        ``W + sum_e s_e alpha_e / R_e B_e A_e`` with s_e the mean gate that expert e receives in
        `run`. A routed model is no linear one, so this is an approximation: it is tried first, and
        the model is changed only if its output stays within the tolerance.

        Args:
            run: runs the model, in eval mode, on inputs that stand for all that will come, and
                returns its output. It is called three times and binds no call of its own.
            tolerance: the largest relative error of that output, ``|merged - routed| / |routed|``,
                that is acceptable.
            mask: bool ``[batch, tokens]``, the tokens that count for s_e.
            context: ``[batch, K]``, appended to what every router reads.

        Returns:
            What was measured: the error of the model and of each layer, and the s_e.

        Raises:
            StageError: the error is above the tolerance, nothing was routed, or as in `merge`.
                Nothing is changed then.
            ConfigError: the tolerance is negative or not finite, or `run` returns no tensor.
        """
        merging.check_tolerance(tolerance)
        self._check_mergeable()
        record = Record(mask=mask, context=context)
        merged, fidelity = merging.average(self._layers, run, record, self._bound)
        merging.check_price(fidelity, tolerance)
        self._commit(merged)
        return fidelity

    def _check_mergeable(self) -> None:
        self._check_in_place()
        merging.check_mergeable(self._layers)

    def _commit(self, merged: Mapping[str, nn.Parameter]) -> None:
        self.unload()
        merging.put_weights(self._layers, merged)
