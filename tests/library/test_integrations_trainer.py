"""The trainer: one loss per step however it is split, and a resumed run that never stopped."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import prw
from prw.integrations.peft import PRWPeftConfig, weave_of
from prw.integrations.stages import StageSampler
from prw.integrations.trainer import PRWTrainer, StageCallback

TARGETS = ["q_proj", "v_proj", "down_proj"]
WIDTH = 8


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16}
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    # a wide initialisation, so that the frozen random layers offer the experts something to use
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **ids, initializer_range=0.3))


def peft_model(**fields: Any) -> nn.Module:
    return get_peft_model(llama(), PRWPeftConfig(target_modules=TARGETS, rank=4, **fields))


def rows(step: int, count: int = 24) -> list[dict[str, list[int]]]:
    """Sequences that count in steps, the odd ones shorter and padded."""
    data = []
    for start in range(count):
        tokens = [(start + step * place) % 13 + 3 for place in range(WIDTH)]
        length = WIDTH - 3 * (start % 2)
        data.append(
            {
                "input_ids": tokens[:length] + [0] * (WIDTH - length),
                "attention_mask": [1] * length + [0] * (WIDTH - length),
                "labels": tokens[:length] + [-100] * (WIDTH - length),
            }
        )
    return data


def arguments(folder: Path, **fields: Any) -> TrainingArguments:
    given = {
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(folder), **given | fields)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items() if "prw_pool" in n}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    ids = torch.tensor([row["input_ids"][:5] for row in rows(1, 4)])
    model.eval()
    found: Tensor = model(ids).logits
    return found


DATA = {"up": rows(1), "down": rows(-2)}


def curriculum(
    folder: Path, stages: dict[str, int], model: Any = None, **fields: Any
) -> PRWTrainer:
    model = peft_model() if model is None else model
    trainer = PRWTrainer(
        model,
        args=arguments(folder, **fields),
        train_dataset={name: DATA[name] for name in stages},
        callbacks=[StageCallback(weave_of(model), stages)],
    )
    trainer.train()
    return trainer


def test_a_curriculum_needs_no_loop(tmp_path: Path) -> None:
    long = {"per_device_train_batch_size": 12, "learning_rate": 3e-2, "logging_steps": 5}
    first = curriculum(tmp_path / "a", {"up": 25}, lr_scheduler_type="constant", **long)
    both = curriculum(tmp_path / "b", {"up": 25, "down": 25}, lr_scheduler_type="constant", **long)
    weave = weave_of(both.model)
    assert both.state.global_step == 50 and both.args.max_steps == 50
    assert weave.ledger.names == ("up", "down") and weave.newest is None
    with weave.at_stage("up"):
        assert torch.equal(logits(both.model), logits(first.model)), "stage one keeps its bits"
    assert not torch.equal(logits(both.model), logits(first.model))
    logs = [entry for entry in both.state.log_history if "loss" in entry]
    assert logs[4]["loss"] < logs[0]["loss"] - 0.5 and logs[9]["loss"] < logs[5]["loss"] - 0.5
    assert all(entry["usage"] == entry["usage_deterministic"] == 1 for entry in logs[:5])
    assert all(0 <= entry["usage"] <= 1 for entry in logs[5:])
    assert all(0 <= entry["usage_deterministic"] <= 1 for entry in logs[5:])
    assert abs(logs[9]["usage"] - 0.8) < 0.15 and logs[9]["usage"] != logs[9]["usage_deterministic"]
    both.save_model(str(tmp_path / "end"))
    plain = llama()
    loaded = prw.load(plain, tmp_path / "end" / "weave")
    loaded.call(noisy=False)
    assert torch.equal(logits(plain), logits(both.model))


class Gradients(TrainerCallback):
    """Keeps the gradients of every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        named = model.named_parameters()
        self.steps.append({n: p.grad.clone() for n, p in named if p.grad is not None})


def one_step(folder: Path, gate_weight: float, model: Any = None, **fields: Any) -> Gradients:
    """The gradients of one step of the second stage, over the same eight rows."""
    model = peft_model(noise=False) if model is None else model
    weave = weave_of(model)
    torch.manual_seed(3)
    for name in ("one", "two"):
        weave.unlock(name)
        with torch.no_grad():
            for parameter in weave.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    seen = Gradients()
    trainer = PRWTrainer(
        model,
        args=arguments(folder, max_steps=1, max_grad_norm=0.0, **fields),
        train_dataset=rows(1, 8),
        callbacks=[seen],
        gate_weight=gate_weight,
        density=0.9,
    )
    trainer.train()
    return seen


@pytest.mark.parametrize("items", [True, False])
def test_micro_batches_are_one_batch(tmp_path: Path, items: bool) -> None:
    def run(name: str, batch: int, parts: int, weight: float) -> dict[str, Tensor]:
        model = peft_model(noise=False)
        if not items:  # then the trainer divides by the number of micro-batches itself
            model.accepts_loss_kwargs = False
            for row in whole:
                row["labels"] = row["input_ids"]
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": parts}
        (step,) = one_step(tmp_path / name, weight, model, **sizes).steps
        return step

    whole = rows(1, 8)
    wanted = run("whole", 8, 1, 5.0)
    split = run("split", 2, 4, 5.0)
    without = run("without", 8, 1, 0.0)
    names = [name for name in wanted if ".columns.signal." in name]
    assert names and not torch.equal(wanted[names[0]], without[names[0]])
    if items:
        # fp32 sums of 8 rows in another order
        torch.testing.assert_close(split, wanted, rtol=1e-4, atol=1e-6)
    else:  # means of means differ for the task, the gate's part must not
        split_without = run("split-without", 2, 4, 0.0)
        for name in names:
            gate = wanted[name] - without[name]
            found = split[name] - split_without[name]
            torch.testing.assert_close(found, gate, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("reentrant", "parts"), [(False, 2), (True, 1)])
def test_gradients_do_not_change_under_checkpointing(
    tmp_path: Path, reentrant: bool, parts: int
) -> None:
    """Reentrant and in parts, the gate's gradient is added last: other roundings, not tested."""

    def run(name: str, **fields: Any) -> list[dict[str, Tensor]]:
        parted = {"gradient_accumulation_steps": parts}
        return one_step(tmp_path / name, 0.5, peft_model(), **parted, **fields).steps

    kwargs = {"activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    found = run("checkpointed", activation_checkpointing=True, **kwargs)
    torch.testing.assert_close(found, run("plain"), rtol=0, atol=0)


@pytest.mark.parametrize("boundary", [2, 3, 4])
def test_a_resumed_run_has_the_same_bits(tmp_path: Path, boundary: int) -> None:
    stages = {"up": boundary, "down": 6 - boundary}
    fields = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    whole = curriculum(tmp_path, stages, **fields)
    model = peft_model()
    again = PRWTrainer(
        model,
        args=arguments(tmp_path / "again", **fields),
        train_dataset=DATA,
        callbacks=[StageCallback(weave_of(model), stages)],
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    torch.testing.assert_close(state(again.model), state(whole.model), rtol=0, atol=0)
    assert weave_of(again.model).ledger == weave_of(whole.model).ledger
    usages = [[e.get("usage") for e in t.state.log_history[3:]] for t in (whole, again)]
    assert usages[0] == usages[1]


def test_resume_within_a_stage_after_growth_keeps_moments_in_place(tmp_path: Path) -> None:
    """After a stage has begun, the optimizer's order differs from that of a fresh one."""
    stages = {"up": 2, "down": 6}
    fields = {"save_strategy": "steps", "save_steps": 5}
    whole = curriculum(tmp_path, stages, **fields)
    names = json.loads((tmp_path / "checkpoint-5" / "optimizer_names.json").read_text())
    model = peft_model()
    fresh = PRWTrainer(model, args=arguments(tmp_path / "again", **fields), train_dataset=rows(1))
    fresh.weave.load_state(tmp_path / "checkpoint-5" / "weave")
    fresh.create_optimizer()
    order = {id(p): n for n, p in model.named_parameters()}
    made = [[order[id(p)] for p in group["params"]] for group in fresh.optimizer.param_groups]
    assert made != names and [sorted(g) for g in made] == [sorted(g) for g in names]
    again = curriculum_resumed(tmp_path, stages, "checkpoint-5", **fields)
    torch.testing.assert_close(state(again.model), state(whole.model), rtol=0, atol=0)
    with pytest.raises(prw.CheckpointError, match="names other parameters"):
        again._arrange([names[0][1:], names[1]], tmp_path)


def curriculum_resumed(
    folder: Path, stages: dict[str, int], name: str, **fields: Any
) -> PRWTrainer:
    model = peft_model()
    trainer = PRWTrainer(
        model,
        args=arguments(folder / "resumed", **fields),
        train_dataset=DATA,
        callbacks=[StageCallback(weave_of(model), stages)],
    )
    trainer.train(resume_from_checkpoint=str(folder / name))
    return trainer


def test_stages_by_epochs_on_one_shuffled_dataset_resume_alike(tmp_path: Path) -> None:
    def trainer(folder: Path) -> PRWTrainer:
        model = peft_model()
        return PRWTrainer(
            model,
            args=arguments(folder, num_train_epochs=3, save_strategy="steps", save_steps=6),
            train_dataset=rows(1),
            callbacks=[StageCallback(weave_of(model), {"one": 1, "two": 2}, unit="epochs")],
        )

    whole, again = trainer(tmp_path), trainer(tmp_path / "again")
    whole.train()
    assert weave_of(whole.model).ledger.names == ("one", "two")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))  # the end of an epoch
    torch.testing.assert_close(state(again.model), state(whole.model), rtol=0, atol=0)


def test_a_model_woven_without_peft(tmp_path: Path) -> None:
    def trainer(folder: Path) -> PRWTrainer:
        model = llama()
        weave = prw.weave(model, prw.Config(target_modules=TARGETS, rank=4))
        stages = StageCallback(weave, {"up": 2, "down": 2})
        fields = {"save_strategy": "steps", "save_steps": 3}
        given = {"train_dataset": DATA, "callbacks": [stages], "weave": weave}
        return PRWTrainer(model, args=arguments(folder, **fields), **given)

    whole, again = trainer(tmp_path), trainer(tmp_path / "again")
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(logits(again.model), logits(whole.model))
    assert not (tmp_path / "checkpoint-3" / "model.safetensors").exists()
    peft = peft_model()
    weave_of(peft).load_state(tmp_path / "checkpoint-4" / "weave")
    weave_of(peft).close()
    weave_of(peft).call(noisy=False)
    assert torch.equal(logits(peft), logits(whole.model))


def test_padding_counts_nowhere_and_nothing_stays_bound(tmp_path: Path) -> None:
    model = peft_model(stages=["one"])
    weave_of(model).unlock("two")
    trainer = PRWTrainer(model, args=arguments(tmp_path), train_dataset=rows(1))
    inputs = {name: torch.tensor([row[name] for row in rows(1, 4)]) for name in rows(1)[0]}
    model.train()
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    trainer.compute_loss(model, inputs)
    (used, count), groups = trainer._seen[0], len(trainer.weave.pools)
    assert int(count) == int(inputs["attention_mask"].sum()) * groups and 0 <= used <= count
    trainer.training_step(model, inputs)
    model(torch.ones(1, 3, dtype=torch.int64))  # a bound mask would not fit
    model.eval()
    before = copy.deepcopy(state(model))
    result = trainer.evaluate(eval_dataset=rows(1, 4))
    assert result["eval_loss"] > 0
    model(torch.ones(1, 3, dtype=torch.int64))
    torch.testing.assert_close(state(model), before, rtol=0, atol=0)
    assert trainer.routing_mask({"attention_mask": torch.ones(1, 1, 4, 4)}) is None
    assert trainer.routing_mask({}) is None


def test_whole_samples_of_a_decoder_are_routed_by_their_prompts(tmp_path: Path) -> None:
    model = peft_model(granularity="sample", stages=["one"])
    trainer = PRWTrainer(model, args=arguments(tmp_path), train_dataset=rows(1))
    inputs = {name: torch.tensor([row[name] for row in rows(1, 2)]) for name in rows(1)[0]}
    with pytest.raises(prw.ConfigError, match="a sample has no prompt to route by"):
        trainer.routing_mask(inputs)
    inputs["labels"][:, :2] = -100
    mask = trainer.routing_mask(inputs)
    assert mask is not None and mask.sum(1).tolist() == [2, 2]


class Rows(list[dict[str, Any]]):
    """Rows with the column that a context needs."""

    @classmethod
    def make(cls, count: int) -> Rows:
        found = rows(1, count)
        return cls(row | {"routing_context": [float(i % 2), i / 9]} for i, row in enumerate(found))


def with_context(width: int = 2) -> tuple[nn.Module, prw.Weave]:
    """A model of two experts whose routers listen to a context."""
    model = peft_model(context_features=width, noise=False)
    weave = weave_of(model)
    torch.manual_seed(3)
    for name in ("one", "two"):
        weave.unlock(name)
        with torch.no_grad():
            for parameter in weave.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.5)
    return model, weave


@pytest.mark.parametrize("parts", [1, 2])
def test_a_context_reaches_training_and_logs(tmp_path: Path, parts: int) -> None:
    model, weave = with_context()
    data = Rows.make(8)
    batch = {n: torch.tensor([row[n] for row in data]) for n in data[0]}
    context = batch.pop("routing_context")
    model.train()
    with weave.record(batch["attention_mask"].bool(), context) as record:
        loss = model(**batch).loss
    (loss + prw.veteran_gate_loss(record, 0.9, 0.5)).backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    usage = record.usage()
    model.zero_grad()
    seen = Gradients()
    given = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
    trainer = PRWTrainer(
        model,
        args=arguments(tmp_path, max_steps=1, max_grad_norm=0.0, learning_rate=0.0, **given),
        train_dataset=data,
        callbacks=[seen],
        density=0.9,
    )
    trainer.train()
    # fp32 sums of 8 rows in another order
    torch.testing.assert_close(seen.steps[0], wanted, rtol=1e-4, atol=1e-6)
    log = trainer.state.log_history[0]
    assert 0 < usage < 1 and log["usage"] == pytest.approx(usage)
    if parts == 1:
        assert log["usage_deterministic"] == pytest.approx(usage)


def test_a_context_reaches_evaluation_and_prediction(tmp_path: Path) -> None:
    model, weave = with_context()
    data = Rows.make(4)
    batch = {n: torch.tensor([row[n] for row in data]) for n in data[0]}
    context = batch.pop("routing_context")
    model.eval()
    weave.call(batch["attention_mask"].bool(), context, noisy=False)
    with torch.no_grad():
        wanted = model(**batch)
        weave.call(batch["attention_mask"].bool(), context.flip(0), noisy=False)
        assert not torch.equal(model(**batch).logits, wanted.logits)
    args = arguments(tmp_path, per_device_eval_batch_size=4)
    trainer = PRWTrainer(model, args=args, train_dataset=data)
    found = trainer.predict(Rows(data))
    assert torch.equal(torch.from_numpy(found.predictions), wanted.logits)
    assert found.metrics["test_loss"] == pytest.approx(float(wanted.loss))
    bare = Rows({n: v for n, v in row.items() if n != "labels"} for row in data)
    assert torch.equal(torch.from_numpy(trainer.predict(bare).predictions), wanted.logits)

    class Own(PRWTrainer):
        def routing_context(self, inputs: Any) -> Tensor:
            numbers = torch.arange(len(inputs["input_ids"]))
            return torch.stack([numbers % 2, numbers / 9], 1).float()

    plain = rows(1, 4)
    own = Own(model, args=args, train_dataset=plain).predict(plain)
    assert torch.equal(torch.from_numpy(own.predictions), wanted.logits)
    with pytest.raises(prw.ConfigError, match="a context of 2 numbers: give every row of the data"):
        trainer.predict(plain)
    trainer._set_signature_columns_if_needed()
    assert "routing_context" in trainer._signature_columns


def test_the_best_model_is_the_weave_of_that_time(tmp_path: Path) -> None:
    trainer = curriculum(tmp_path, {"up": 2, "down": 2}, save_strategy="steps", save_steps=2)
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-2")
    trainer._load_best_model()
    assert weave_of(trainer.model).ledger.names == ("up",)


def test_what_does_not_fit_is_refused_before_training(tmp_path: Path) -> None:
    model = peft_model()
    weave = weave_of(model)
    with pytest.raises(prw.ConfigError, match="whole numbers above 0"):
        StageCallback(weave, {"up": 0})
    with pytest.raises(prw.ConfigError, match='"steps" or "epochs"'):
        StageCallback(weave, {"up": 1}, unit="days")  # type: ignore[arg-type]
    with pytest.raises(prw.StageError, match="cannot name a stage"):
        StageCallback(weave, {"u p": 1})
    callback = StageCallback(weave, {"up": 1})
    cases: list[tuple[str, dict[str, Any]]] = [
        ("datasets .'up', 'down'. and stages .'up'.", {"callbacks": [callback]}),
        ("and no StageCallback in steps", {}),
        ("density must be a finite number from 0 to 1, got 2.0", {"density": 2.0}),
        ("gate_weight must be a finite number of at least 0, got inf", {"gate_weight": math.inf}),
        ("weave must be a prw.Weave, got a str", {"weave": "default"}),
    ]
    for message, fields in cases:
        with pytest.raises(prw.ConfigError, match=message):
            PRWTrainer(model, args=arguments(tmp_path), train_dataset=DATA, **fields)
    with pytest.raises(prw.ConfigError, match="max_steps is 9, but the stages last 1 steps"):
        args = arguments(tmp_path, max_steps=9)
        PRWTrainer(model, args=args, train_dataset={"up": rows(1)}, callbacks=[callback])
    for other, message in (
        (["up", "down"], r"such as .'first': 100., got \['up', 'down'\]"),
        ("up", "got 'up'"),
        (None, "got None"),
    ):
        with pytest.raises(prw.ConfigError, match=message):
            StageCallback(weave, other)  # type: ignore[arg-type]
    with pytest.raises(prw.ConfigError, match="weave must be a prw.Weave, got a PeftModel"):
        StageCallback(model, {"up": 1})  # type: ignore[arg-type]
    with pytest.raises(prw.ConfigError, match="train_dataset names no stage"):
        PRWTrainer(model, args=arguments(tmp_path), train_dataset={})
    plain = llama()
    with pytest.raises(prw.ConfigError, match="no PRW adapter: add one with get_peft_model"):
        PRWTrainer(plain, args=arguments(tmp_path), train_dataset=rows(1))
    prw.weave(plain, prw.Config(target_modules=TARGETS, rank=2))
    with pytest.raises(prw.ConfigError, match=r"give what it returned, PRWTrainer\(model, weave=w"):
        PRWTrainer(plain, args=arguments(tmp_path), train_dataset=rows(1))
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(prw.ConfigError, match="DataParallel"):
        PRWTrainer(model, args=args, train_dataset=rows(1))


def test_stages_begin_once_in_order_and_in_one_process() -> None:
    weave = weave_of(peft_model())
    callback = StageCallback(weave, {"up": 2, "down": 3, "last": 1})
    assert [callback.stage(step) for step in range(8)] == [
        *["up"] * 2,
        *["down"] * 3,
        *["last"] * 3,
    ]
    control, alone = TrainerControl(), SimpleNamespace(world_size=1, deepspeed=None)

    def begin(step: int, args: Any = alone) -> None:
        callback.on_step_begin(args, TrainerState(global_step=step), control)

    with pytest.raises(prw.StageError, match="'down' should begin, but 'up' was never trained"):
        begin(2)
    with pytest.raises(prw.ConfigError, match="over 2 processes"):
        begin(0, SimpleNamespace(world_size=2, deepspeed=None))
    assert weave.stages == ()
    begin(0)
    begin(1)
    begin(2)
    assert weave.ledger.names == ("up", "down")
    with pytest.raises(prw.StageError, match="'up' is closed already"):
        begin(0)
    callback.on_train_end(alone, TrainerState(global_step=5), control)
    assert weave.newest == "down"


def test_the_sampler_gives_every_stage_its_own_rows() -> None:
    sampler = StageSampler([3, 5], [7, 6], seed=1)
    order = list(sampler)
    assert order == list(sampler) and len(order) == len(sampler) == 13
    assert set(order[:7]) == {0, 1, 2} and set(order[7:]) == {3, 4, 5, 6, 7}
    assert sorted(order[:3]) == sorted(order[3:6]) == [0, 1, 2]
    assert order != list(StageSampler([3, 5], [7, 6], seed=2))


def test_training_without_a_stage_is_refused(tmp_path: Path) -> None:
    trainer = PRWTrainer(peft_model(), args=arguments(tmp_path), train_dataset=rows(1))
    with pytest.raises(prw.StageError, match=r"no stage is open, so nothing may learn; weave.unl"):
        trainer.train()


class Bursting(PRWTrainer):
    """Its loss is not finite in the third step."""

    burst = math.nan

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss * self.burst if self.state.global_step == 2 else loss


@pytest.mark.parametrize("burst", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_training(tmp_path: Path, burst: float) -> None:
    model = peft_model()
    weave = weave_of(model)
    weave.unlock("up")
    fields = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    trainer = Bursting(model, args=arguments(tmp_path, **fields), train_dataset=rows(1))
    trainer.burst = burst
    with pytest.raises(prw.StageError, match=rf"the loss of stage 'up' is {burst} in step 3; ear"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-1",
        "checkpoint-2",
    ]
    before = state(model)
    assert all(tensor.isfinite().all() for tensor in before.values())
    weave.load_state(tmp_path / "checkpoint-2/weave")
    assert all(torch.equal(before[name], tensor) for name, tensor in state(model).items())
