"""`transformers.Trainer` for woven models: no loop of one's own. Needs the extra ``peft``.

What it adds to a step: the routing is recorded, padding left out; the veteran gate loss joins the
loss of the last micro-batch, so that usage is summed over all micro-batches (and ranks) before the
absolute value; and after a step the model is left with a plain deterministic call bound. The noise
key is a function of seed, step, micro-batch and rank.

What it adds to a checkpoint: the folder ``weave``, and the names behind the optimizer's numbers,
because an optimizer that has followed several stages holds its parameters in another order than one
that was just made. On the CPU, a resumed run ends with the same bits as one that never stopped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Sampler
from transformers import Trainer

from prw.call import Record, totals
from prw.checks import check_number
from prw.errors import CheckpointError, ConfigError, StageError
from prw.integrations.peft import weave_of
from prw.integrations.peft_layer import PeftWeave
from prw.integrations.stages import StageCallback, StageSampler
from prw.linear import RoutedLinear
from prw.losses import veteran_gate_loss
from prw.noise import group_id
from prw.weaving import Weave

__all__ = ["PRWTrainer", "StageCallback"]

WEAVE = "weave"
NAMES = "optimizer_names.json"
CONTEXT = "routing_context"


class PRWTrainer(Trainer):
    """Trains the open stage of a weave, or with a `StageCallback` a whole curriculum.

    Logs gain ``usage``, the share of rows that the newest expert received since the last log, and
    ``usage_deterministic``, the same without noise on the last micro-batch; both of this process.

    Routers that read a context (``context_features``) find it in a column of the data,
    ``routing_context``, which the model does not see; see `routing_context`.

    Args:
        model: a PEFT model, a transformers model with a PRW adapter, or one that `prw.weave` wove.
        weave: its weave; None means that of the adapter ``"default"``.
        density: target usage of the newest expert from the second stage on.
        gate_weight: factor of the veteran gate loss; 0 leaves it out.
        train_dataset: one dataset, or one per stage of the `StageCallback`, by name; then each
            stage trains on its own, and ``max_steps`` is the sum of their steps.
        callbacks: as in `transformers.Trainer`.
        **kwargs: as in `transformers.Trainer`.

    Raises:
        ConfigError: a model without a weave, datasets that do not match the stages,
            ``DataParallel``, or a density or weight out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        weave: Weave | None = None,
        density: float = 0.8,
        gate_weight: float = 0.5,
        train_dataset: Any = None,
        callbacks: list[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        check_number("density", density, 0, 1)
        check_number("gate_weight", gate_weight, 0)
        if isinstance(train_dataset, Mapping) and not train_dataset:
            raise ConfigError("train_dataset names no stage, got {}; give each stage its rows")
        self.weave = _weave_of(model, weave)
        self.density = density
        self.gate_weight = gate_weight
        self._records: list[Record] = []
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._last: dict[str, Any] | None = None
        self._evaluating = False
        datasets = train_dataset if isinstance(train_dataset, Mapping) else None
        data = train_dataset if datasets is None else ConcatDataset(datasets.values())
        super().__init__(model, train_dataset=data, callbacks=callbacks, **kwargs)
        if self.args.n_gpu > 1:
            raise ConfigError(
                "nn.DataParallel runs copies of the model, whose routings are lost; start one "
                "process per GPU (torchrun), or set CUDA_VISIBLE_DEVICES to one GPU"
            )
        self._curriculum = None if datasets is None else self._sampler(datasets, callbacks or [])

    def _sampler(self, datasets: Mapping[str, Any], callbacks: list[Any]) -> StageSampler:
        found = [callback for callback in callbacks if isinstance(callback, StageCallback)]
        stages = found[0].stages if found and found[0].unit == "steps" else None
        if stages is None or list(stages) != list(datasets) or not all(map(len, datasets.values())):
            what = "no StageCallback in steps" if stages is None else f"stages {list(stages)}"
            raise ConfigError(
                f"a dataset per stage needs a StageCallback in steps with the same names, and rows "
                f"in each; got datasets {list(datasets)} and {what}"
            )
        if self.args.max_steps > found[0].total:
            raise ConfigError(
                f"max_steps is {self.args.max_steps}, but the stages last {found[0].total} steps; "
                "leave max_steps out"
            )
        if self.args.max_steps <= 0:
            self.args.max_steps = found[0].total
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        rows = [steps * batch for steps in stages.values()]
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return StageSampler([len(data) for data in datasets.values()], rows, seed)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        if self._curriculum is not None:
            return self._curriculum
        sampler: Sampler[int] | None = super()._get_train_sampler(train_dataset)
        return sampler

    def routing_mask(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Which tokens count, bool ``[batch, tokens]``: those of a two-dimensional attention mask.

        Where samples are routed in a causal decoder, of these the prompt: tokens without a label.
        Override it for models whose layers see other shapes, such as encoder-decoders.

        Raises:
            ConfigError: a sample has no prompt.
        """
        mask = inputs.get("attention_mask")
        mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        prompts = any(pool.prompted for pool in self.weave.pools.values())
        if self.weave.config.granularity == "token" or not prompts:
            return mask
        labels = inputs.get("labels")
        if labels is not None:
            mask = (labels == -100) if mask is None else mask & (labels == -100)
            if not mask.any(1).all():
                raise ConfigError(
                    "a sample has no prompt to route by: give the tokens of its prompt the label "
                    "-100, or override routing_mask()"
                )
        return mask

    def routing_context(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """What routers read beside the hidden state, ``[batch, context_features]``, of every call.

        The column ``routing_context`` of the data, K numbers per row. Override it to compute the
        context from other inputs.
        """
        return inputs.get(CONTEXT)

    def _told(self, inputs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        """Mask and context of the call for these inputs."""
        context, width = self.routing_context(inputs), self.weave.config.context_features
        if width and context is None:
            raise ConfigError(
                f"the routers read a context of {width} numbers: give every row of the data a "
                f"column {CONTEXT!r}, or override routing_context()"
            )
        return self.routing_mask(inputs), context

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if CONTEXT not in self._signature_columns:
            self._signature_columns.append(CONTEXT)

    def routing_loss(self, records: list[Record]) -> Tensor | None:
        """The loss of one step's routing, from one record per micro-batch; None for none.

        The veteran gate (CoLoGen, Eq. 8 to 10), from the second stage on. Override it to add others
        (they need ``keep_inputs``, see `record`).
        """
        newest = self.weave.ledger.newest
        if newest is None or newest.index == 0 or self.gate_weight == 0:
            return None
        return veteran_gate_loss(records, self.density, self.gate_weight)

    def record(self, inputs: Mapping[str, Any]) -> Record:
        """The record of one micro-batch."""
        place = self.args.seed, self.state.global_step, len(self._records), self.args.process_index
        key = group_id("/".join(map(str, place)))
        return self.weave.record(*self._told(inputs), key=key)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The trainer's loss under a record; with the routing loss in the last micro-batch.

        In evaluation the call is deterministic.
        """
        if not model.training:
            with self._quiet(inputs) as given:
                return super().compute_loss(model, given, return_outputs, num_items_in_batch)
        with self.record(inputs) as record:
            given = _for_model(inputs)
            loss, outputs = super().compute_loss(model, given, True, num_items_in_batch)
        self._records.append(record)
        if self.accelerator.sync_gradients:
            extra = self.routing_loss(self._records)
            if extra is not None:
                loss = loss + extra * self._divisor(num_items_in_batch)
            self._seen.append(totals(self._records))
            self._records = []
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """As in `transformers.Trainer`, which without labels does not ask `compute_loss`."""
        with self._quiet(inputs) as given:
            return super().prediction_step(model, given, *args, **kwargs)

    @contextmanager
    def _quiet(self, inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Bind a deterministic call for these inputs, if none is; gives what the model takes."""
        if self._evaluating:
            yield dict(inputs)
            return
        self.weave.call(*self._told(inputs), key=0, noisy=False)
        self._evaluating = True
        try:
            yield _for_model(inputs)
        finally:
            self._evaluating = False
            self._rest()

    def _divisor(self, num_items_in_batch: Tensor | int | None) -> int:
        """What `training_step` will divide the loss of one micro-batch by."""
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = counted or self.compute_loss_func is not None
        return 1 if scaled else int(self.current_gradient_accumulation_steps)

    def _rest(self) -> None:
        """Bind a plain deterministic call, which fits inputs of any shape."""
        self.weave.call(key=0, noisy=False)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """As in `transformers.Trainer`; afterwards no mask or record stays bound.

        Raises:
            StageError: the loss is not finite, and no optimizer has seen its gradient; or no stage
                is open and nothing else may learn.
        """
        if self.weave.newest is None and not any(p.requires_grad for p in model.parameters()):
            raise StageError(
                "no stage is open, so nothing may learn; weave.unlock(name) before train(), or "
                "give a StageCallback"
            )
        self._last = dict(inputs)
        try:
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._rest()
        if not torch.isfinite(loss):  # transformers waits for this number in every step, too
            raise StageError(
                f"the loss of stage {self.weave.newest!r} is {float(loss)} in step "
                f"{self.state.global_step + 1}; earlier checkpoints in {self.args.output_dir} are "
                "as they were: lower the learning rate, look at the data of that step, and go on "
                "with resume_from_checkpoint"
            )
        return loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers.Trainer`."""
        self._records, self._seen, self._last = [], [], None
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `transformers.Trainer`, with both usages beside a training loss."""
        if "loss" in logs and self._seen and self._last is not None:
            used, count = (torch.stack(part).sum() for part in zip(*self._seen, strict=True))
            logs["usage"] = float(used) / max(int(count), 1)
            logs["usage_deterministic"] = self._deterministic_usage(self._last)
            self._seen = []
        super().log(logs, start_time)

    @torch.no_grad()
    def _deterministic_usage(self, inputs: dict[str, Any]) -> float:
        training = self.model.training
        inputs = self._prepare_inputs(inputs)
        self.model.eval()
        try:
            with self.weave.record(*self._told(inputs), key=0) as record:
                self.model(**_for_model(inputs))
        finally:
            self.model.train(training)
            self._rest()
        return record.usage()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        if isinstance(self.weave, PeftWeave):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:  # the base is frozen and belongs to somebody else
            folder.mkdir(parents=True, exist_ok=True)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
        if self.args.should_save:
            self.weave.save(folder / WEAVE)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        self.weave.load_state(Path(resume_from_checkpoint) / WEAVE)
        if isinstance(self.model, PeftModel):  # other adapters, and modules_to_save
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            names = {id(parameter): name for name, parameter in self.model.named_parameters()}
            groups = [[names.get(id(p)) for p in g["params"]] for g in self.optimizer.param_groups]
            (Path(output_dir) / NAMES).write_text(json.dumps(groups), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        file = None if checkpoint is None else Path(checkpoint) / NAMES
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if file is not None and file.is_file() and not sharded:
            self._arrange(json.loads(file.read_text(encoding="utf-8")), file)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _arrange(self, groups: list[list[str]], file: Path) -> None:
        """Put the parameters of a fresh optimizer where the saved one had them."""
        parameters = dict(self.model.named_parameters())
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        wanted = [[parameters.get(name) for name in group] for group in groups]
        flat = [parameter for group in wanted for parameter in group]
        if len(groups) != len(self.optimizer.param_groups) or {id(p) for p in flat} != held:
            raise CheckpointError(
                f"{file} names other parameters than this optimizer has; resume with the same "
                "model, adapters and parameter groups"
            )
        for group, members in zip(self.optimizer.param_groups, wanted, strict=True):
            group["params"] = members


def _weave_of(model: nn.Module, weave: Weave | None) -> Weave:
    """The weave to train: the given one, or that of the adapter ``"default"``."""
    if weave is None:
        if any(isinstance(module, RoutedLinear) for module in model.modules()):
            raise ConfigError(
                "prw.weave wove this model, which does not know its weave; give what it returned, "
                "PRWTrainer(model, weave=weave)"
            )
        return weave_of(model)
    if not isinstance(weave, Weave):
        raise ConfigError(f"weave must be a prw.Weave, got a {type(weave).__name__}")
    return weave


def _for_model(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs without the routers' context."""
    return {name: value for name, value in inputs.items() if name != CONTEXT}
