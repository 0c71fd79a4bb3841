"""Whatever PEFT, transformers or diffusers do to a PRW adapter, it stays one, bit for bit."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import prw
from prw.integrations.peft import PRWLinear, PRWPeftConfig, load_adapter, weave_of


class Net(nn.Module):
    """Two projections of one input, and one elsewhere."""

    def __init__(self, mode: str = "none") -> None:
        super().__init__()
        self.to_k = nn.Linear(8, 8)
        self.to_v = nn.Linear(8, 6)
        self.out = nn.Linear(6, 8)
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "none":
            return self.body(x)
        return checkpoint(self.body, x, use_reentrant=self.mode == "reentrant")

    def body(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.to_k(x)[..., :6] * self.to_v(x)))


X = torch.linspace(-2, 2, 3 * 5 * 8).sin().reshape(3, 5, 8)
TARGETS = ["to_k", "to_v"]
SECOND = (
    "ignore:Already found a `peft_config` attribute:UserWarning"  # PEFT, for any second adapter
)


def config(**fields: Any) -> PRWPeftConfig:
    return PRWPeftConfig(target_modules=TARGETS, rank=2, **fields)


def net(mode: str = "none") -> Net:
    torch.manual_seed(0)
    return Net(mode)


@torch.no_grad()
def shake(weave: prw.Weave) -> None:
    """Stand in for training: move whatever may learn."""
    for parameter in weave.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.3)


def grow(weave: prw.Weave, *names: str) -> None:
    for name in names:
        weave.unlock(name)
        shake(weave)
    weave.close()
    weave.call(noisy=False)


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def learning(model: nn.Module, adapter: str = "default") -> set[str]:
    """Names in `model` of what the schedule of an adapter lets learn."""
    learners = {id(parameter) for parameter in weave_of(model, adapter).parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in learners}


def stages_of(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    found = {}
    weave = weave_of(model, adapter)
    for name in weave.ledger.names:
        with weave.at_stage(name):
            found[name] = model(X)
    return found


@pytest.mark.parametrize("share_router", ["module", "parent"])
def test_it_is_the_library_itself(share_router: str) -> None:
    fields: dict[str, Any] = {"share_router": share_router}
    plain, wrapped = net(), net()
    weave = prw.weave(plain, prw.Config(target_modules=TARGETS, rank=2, **fields))
    model = get_peft_model(wrapped, config(**fields))
    assert torch.equal(model(X), net()(X))
    ours = weave_of(model)
    assert list(ours.pools) == list(weave.pools)
    results = []
    for module, grown in ((plain, weave), (model, ours)):
        torch.manual_seed(1)
        for name in ("one", "two"):
            grown.unlock(name)
            shake(grown)
        with grown.record(key=5) as record:
            loss = module(X).square().mean()
        loss = loss + prw.veteran_gate_loss(record, 0.8, 0.5)
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in grown.named_parameters()}
        results.append((loss.detach(), record.usage(), gradients))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert learning(model) == trainable(model)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("share_router", ["module", "parent"])
def test_save_and_load(tmp_path: Path, share_router: str, low_cpu_mem_usage: bool) -> None:
    model = get_peft_model(net(), config(share_router=share_router))
    grow(weave_of(model), "one", "two")
    wanted, pinned = model(X), stages_of(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    layer = again.base_model.model.to_k
    assert isinstance(layer, PRWLinear) and not isinstance(layer, LoraLayer)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PRW"
    assert torch.equal(again(X), wanted)
    torch.testing.assert_close(stages_of(again), pinned, rtol=0, atol=0)
    assert weave_of(again).newest is None and weave_of(again).ledger.names == ("one", "two")
    assert not trainable(again)


def test_a_reload_goes_on_with_the_open_stage_and_the_next(tmp_path: Path) -> None:
    model = get_peft_model(net(), config(stages=["one"]))
    assert weave_of(model).newest == "one"
    shake(weave_of(model))
    weave_of(model).unlock("two")
    shake(weave_of(model))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path, is_trainable=True)
    weave = weave_of(again)
    assert weave.newest == "two" and trainable(again) == learning(again)
    optimizer = torch.optim.SGD(weave.parameters(), lr=0.1)
    weave.unlock("three")
    weave.sync(optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(parameter) for parameter in weave.parameters()}
    assert trainable(again) == learning(again)
    torch.testing.assert_close(stages_of(again)["one"], stages_of(model)["one"], rtol=0, atol=0)


def test_a_file_of_two_stages_loads_into_a_pool_of_three(tmp_path: Path) -> None:
    model = get_peft_model(net(), config())
    weave_of(model).unlock("one")
    shake(weave_of(model))
    weave_of(model).unlock("two")
    shake(weave_of(model))
    model.save_pretrained(tmp_path)
    weave_of(model).close()
    wanted = stages_of(model)
    place = tmp_path / "adapter_config.json"
    settings = json.loads(place.read_text())
    assert settings["stages"] == ["one", "two"] and settings["open"]
    place.write_text(json.dumps({**settings, "stages": ["one", "two", "three"]}))
    with pytest.warns(UserWarning, match="missing adapter keys"):
        again = PeftModel.from_pretrained(net(), tmp_path, is_trainable=True)
    assert isinstance(again.base_model.model.to_k, PRWLinear)
    assert weave_of(again).ledger.names == ("one", "two", "three")
    found = stages_of(again)
    assert torch.equal(found["one"], wanted["one"]) and torch.equal(found["two"], wanted["two"])
    for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items():
        there = again.state_dict()[name.replace("prw_pool.", "prw_pool.default.")]
        assert torch.equal(there, tensor), name


def test_the_freeze_survives_whatever_peft_does() -> None:
    model = get_peft_model(net(), config())
    weave = weave_of(model)
    for name in ("one", "two"):
        weave.unlock(name)
        shake(weave)
    wanted = learning(model)
    assert trainable(model) == wanted and any("experts.1" in name for name in wanted)
    with model.disable_adapter():
        assert not trainable(model)
    assert trainable(model) == wanted
    model.add_adapter("other", config(stages=["only"]))
    assert trainable(model) == wanted
    model.set_adapter("other")
    assert trainable(model) == learning(model, "other")
    model.set_adapter("default")
    assert trainable(model) == wanted
    model.base_model.set_adapter(["default", "other"])
    assert trainable(model) == wanted | learning(model, "other")
    model.set_adapter("default")
    model.set_requires_grad("default", False)
    assert not trainable(model)
    model.set_requires_grad("default")
    assert trainable(model) == wanted
    model.base_model.enable_adapter_layers()
    model.base_model._mark_only_adapters_as_trainable(model.base_model.model)
    assert trainable(model) == wanted
    weave.close()
    assert not trainable(model)
    with model.disable_adapter():
        pass
    assert not trainable(model)


def test_veterans_keep_their_bytes_when_peft_is_used_between_steps() -> None:
    model = get_peft_model(net(), config())
    weave = weave_of(model)
    weave.unlock("one")
    shake(weave)
    weave.unlock("two")
    before = {k: v.clone() for k, v in model.state_dict().items() if "experts.0" in k}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    weave.sync(optimizer)
    for step in range(10):
        with model.disable_adapter():
            model(X)
        with weave.record(key=step):
            loss = (model(X) - 1).square().mean()
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        optimizer.step()
    after = model.state_dict()
    assert before and all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_adapters_come_and_go() -> None:
    model = get_peft_model(net(), config())
    grow(weave_of(model), "one", "two")
    first = model(X)
    shared = config(gate="one")
    model.add_adapter("other", shared)
    model.add_adapter("third", shared)
    assert torch.equal(model(X), first), "a new adapter is not active"
    grow(weave_of(model, "other"), "uno")
    assert weave_of(model, "third").ledger.names == () == tuple(shared.stages)
    model.set_adapter("other")
    second = model(X)
    assert not torch.equal(second, first)
    model.base_model.set_adapter(["default", "other"])
    assert not torch.equal(model(X), first) and not torch.equal(model(X), second)
    with model.disable_adapter():
        assert torch.equal(model(X), net()(X))
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(model(X), first)
    with pytest.raises(prw.ConfigError, match="no PRW adapter 'other'; its PRW adapters are: def"):
        weave_of(model, "other")
    with pytest.raises(prw.StageError, match=r"delete_adapter\(\) or unload\(\)"):
        weave_of(model).unload()
    base = model.unload()
    assert type(base.to_k) is nn.Linear and torch.equal(base(X), net()(X))
    with pytest.raises(prw.ConfigError, match="it has no PRW adapter"):
        weave_of(base)


def test_one_adapter_is_saved_at_a_time(tmp_path: Path) -> None:
    model = get_peft_model(net(), config())
    grow(weave_of(model), "one")
    model.add_adapter("other", config(share_router="parent"))
    grow(weave_of(model, "other"), "uno", "due")
    model.save_pretrained(tmp_path)
    model.set_adapter("other")
    wanted = model(X)
    again = PeftModel.from_pretrained(net(), tmp_path)
    again.load_adapter(tmp_path / "other", "renamed")
    again.set_adapter("renamed")
    assert torch.equal(again(X), wanted)
    assert weave_of(again).ledger.names == ("one",)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_lives_its_own_life(duplicate: Any) -> None:
    model = get_peft_model(net(), config())
    grow(weave_of(model), "one", "two")
    wanted = model(X)
    twin = duplicate(model)
    assert torch.equal(twin(X), wanted)
    weave = weave_of(twin)
    weave.unlock("three")
    optimizer = torch.optim.SGD(weave.parameters(), lr=0.1)
    weave.unlock("four")
    weave.sync(optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(parameter) for parameter in weave.parameters()}
    assert twin.peft_config["default"].stages == ["one", "two", "three", "four"]
    assert model.peft_config["default"].stages == ["one", "two"]
    assert torch.equal(model(X), wanted)


def test_a_half_precision_base_keeps_adapters_in_full(tmp_path: Path) -> None:
    model = get_peft_model(net().bfloat16(), config())
    held = {id(p) for p in model.parameters()}
    weave = weave_of(model)
    grow(weave, "one", "two")
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "prw_pool" in n)
    model.save_pretrained(tmp_path)
    for low in (False, True):
        again = PeftModel.from_pretrained(net().bfloat16(), tmp_path, low_cpu_mem_usage=low)
        assert torch.equal(again(X.bfloat16()), model(X.bfloat16()))
        weave_of(again).unlock("three")
        assert all(p.dtype == torch.float32 for p in weave_of(again).parameters())
    assert held <= {id(p) for p in model.parameters()}, "PEFT replaced no parameter"


def test_a_merged_adapter_of_one_stage_is_a_plain_model() -> None:
    model = get_peft_model(net(), config())
    grow(weave_of(model), "one")
    wanted = model(X)
    model.merge_adapter()
    # (W + BA) x against W x + B (A x) in fp32, sums of 8 and 2 terms of size 1
    torch.testing.assert_close(model(X), wanted, rtol=0, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(model(X), net()(X), rtol=0, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(X), wanted, rtol=0, atol=1e-5)
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    assert type(merged.to_k) is nn.Linear
    torch.testing.assert_close(merged(X), wanted, rtol=0, atol=1e-5)
    grow(weave_of(model), "two")
    weight = model.base_model.model.to_k.weight.clone()
    with pytest.raises(prw.ConfigError, match="'to_k' has 2 routed experts"):
        model.merge_adapter()
    assert torch.equal(model.base_model.model.to_k.weight, weight)


@pytest.mark.filterwarnings(SECOND)
def test_a_plain_lora_on_the_same_layers() -> None:
    model = get_peft_model(net(), config())
    grow(weave_of(model), "one", "two")
    wanted = model(X)
    lora = LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)
    inject_adapter_in_model(lora, model.base_model.model, "lora")
    layer = model.base_model.model.to_k
    assert isinstance(layer, LoraLayer) and isinstance(layer.base_layer, PRWLinear)
    assert not torch.equal(model(X), wanted)
    layer.enable_adapters(False)
    model.base_model.model.to_v.enable_adapters(False)
    assert torch.equal(model(X), wanted)
    assert weave_of(model).ledger.names == ("one", "two")


def gradients(mode: str) -> dict[str, Tensor]:
    model = get_peft_model(net(mode), config())
    weave = weave_of(model)
    torch.manual_seed(2)
    for name in ("one", "two"):
        weave.unlock(name)
        shake(weave)
    x = X.clone().requires_grad_()
    with weave.record(key=3) as record:
        loss = model(x).square().mean()
    (loss + prw.veteran_gate_loss(record, 0.8, 0.5)).backward()
    assert x.grad is not None
    found = {"x": x.grad}
    return found | {n: p.grad for n, p in weave.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
def test_gradients_do_not_change_under_checkpointing(mode: str) -> None:
    wanted = gradients("none")
    assert len(wanted) == 13  # x; for each of two pools A, B and two columns of both kinds
    torch.testing.assert_close(gradients(mode), wanted, rtol=0, atol=0)


def test_the_folder_of_the_library_goes_both_ways(tmp_path: Path) -> None:
    model = get_peft_model(net(), config())
    grow(weave_of(model), "one", "two")
    weave_of(model).save(tmp_path / "weave")
    plain = net()
    prw.load(plain, tmp_path / "weave")
    assert torch.equal(plain(X), model(X))
    again = get_peft_model(net(), config())
    weave_of(again).load_state(tmp_path / "weave")
    assert torch.equal(again(X), model(X))
    assert again.peft_config["default"].stages == ["one", "two"]
    torch.testing.assert_close(stages_of(again), stages_of(model), rtol=0, atol=0)


def test_what_cannot_work_leaves_no_trace() -> None:
    base = net()
    names = [name for name, _ in base.named_modules()]
    cases: list[tuple[type[Exception], str, PRWPeftConfig, str]] = [
        (
            prw.ConfigError,
            "rank 7 is above the size of 'to_v'",
            PRWPeftConfig(target_modules=TARGETS, rank=7),
            "default",
        ),
        (prw.ConfigError, "adapter name 'experts' is part", config(), "experts"),
        (prw.ConfigError, "adapter name '0' is part", config(), "0"),
    ]
    for kind, message, bad, adapter in cases:
        with pytest.raises(kind, match=message):
            get_peft_model(base, bad, adapter_name=adapter)
        assert [name for name, _ in base.named_modules()] == names
        assert all(parameter.requires_grad for parameter in base.parameters())
    with pytest.raises(prw.ConfigError, match="target 'norm' is a LayerNorm"):
        get_peft_model(
            nn.ModuleDict({"norm": nn.LayerNorm(4)}), PRWPeftConfig(target_modules=["norm"])
        )
    with pytest.raises(prw.ConfigError, match="rank must be a whole number"):
        PRWPeftConfig(target_modules=TARGETS, rank=0)
    with pytest.raises(prw.StageError, match="cannot name a stage"):
        config(stages=["a/b"])
    with pytest.raises(prw.ConfigError, match=r"stages must be a list of names, got 'ab'; give \["):
        config(stages="ab")
    with pytest.raises(prw.ConfigError, match="open must be True or False, got 'no'"):
        config(stages=["ab"], open="no")
    with pytest.raises(prw.ConfigError, match=r"rank_pattern must map patterns .*, got \[1\]"):
        config(rank_pattern=[1])
    with pytest.raises(prw.ConfigError, match="target_modules must be a list of names .* got 3"):
        PRWPeftConfig(target_modules=3)  # type: ignore[arg-type]
    with pytest.raises(prw.StageError, match="there is no stage 'a'"):
        config(stages=["ab"], exempt=["a"])


def test_a_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(net(), config())
    grow(weave_of(model), "one", "two")
    model.save_pretrained(tmp_path)
    small = get_peft_model(net(), config(stages=["one"]))
    with pytest.raises(prw.CheckpointError, match="holds 2 experts, but adapter 'default' has 1"):
        small.load_adapter(tmp_path, "default")
    grow(weave_of(small), "two")
    expert = weave_of(model).pools["to_k"].expert(1)
    expert.put("to_k", torch.zeros(3, 8), torch.zeros(8, 3), alpha=1.0)
    model.save_pretrained(tmp_path)
    with pytest.raises(prw.CheckpointError, match=r"experts\.1\.A\.0' is \[3, 8\], but that of"):
        small.load_adapter(tmp_path, "default")
    place = tmp_path / "adapter_config.json"
    settings = json.loads(place.read_text())
    assert settings["sizes"] == {"two": {"to_k": [3, 1.0]}}
    for sizes, message in (
        ({"two": {"to_k": [0, 1.0]}}, "sizes must map stages to layers"),
        ({"two": {"to_q": [2, 1.0]}}, "sizes gives 'to_q' in stage 'two' a rank, but"),
        ({"six": {"to_k": [2, 1.0]}}, "sizes gives 'to_k' in stage 'six' a rank, but"),
    ):
        place.write_text(json.dumps(settings | {"sizes": sizes}))
        with pytest.raises(prw.ConfigError, match=message):
            PeftModel.from_pretrained(net(), tmp_path)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_what_was_frozen_or_thawed_stays_so_in_a_file(
    tmp_path: Path, low_cpu_mem_usage: bool
) -> None:
    model = get_peft_model(net(), config())
    weave = weave_of(model)
    for name in ("one", "two", "three"):
        weave.unlock(name)
        shake(weave)
    weave.freeze("three")
    weave.thaw("one")
    wanted = trainable(model)
    assert wanted == learning(model) and any(".experts.0." in name for name in wanted)
    assert not any(".experts.2." in name for name in wanted)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(
        net(), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert weave_of(again).ledger == weave.ledger
    assert trainable(again) == learning(again) == wanted
    with again.disable_adapter():
        pass
    assert trainable(again) == wanted
    again.save_pretrained(tmp_path / "again")
    settings = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert settings["exempt"] == ["one", "three"]
    weave_of(again).close()
    assert again.peft_config["default"].exempt == []


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_imported_expert_of_another_rank_is_in_the_file(
    tmp_path: Path, low_cpu_mem_usage: bool
) -> None:
    lora = LoraConfig(
        r=3, lora_alpha=5, use_rslora=True, rank_pattern={"to_v": 1}, target_modules=TARGETS,
        init_lora_weights=False,
    )  # fmt: skip
    stock = get_peft_model(net(), lora)
    stock.save_pretrained(tmp_path / "lora")
    model = get_peft_model(net(), config(share_router="parent", backend="reference"))
    weave = weave_of(model)
    grow(weave, "one")
    weave.import_expert(tmp_path / "lora", "style")
    weave.rename("style", "rain")
    weave.unlock("two")
    shake(weave)
    with weave.force_route("rain"):
        assert torch.equal(model(X), stock(X))
    weave.call(noisy=False)
    wanted, pinned = model(X), stages_of(model)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        net(), tmp_path / "adapter", is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(again(X), wanted) and trainable(again) == trainable(model)
    torch.testing.assert_close(stages_of(again), pinned, rtol=0, atol=0)
    with weave_of(again).force_route("rain"):
        assert torch.equal(again(X), stock(X))
    assert again.peft_config["default"].sizes == model.peft_config["default"].sizes
    assert set(again.peft_config["default"].sizes) == {"rain"}


class ForeignLinear(nn.Module):
    """As a quantisation library has them: packed, and no relative of nn.Linear."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.register_buffer("codes", (base.weight.detach() * 100).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.codes.to(x.dtype) / 100).T


@pytest.mark.parametrize("kind", ["conv1d", "foreign"])
def test_layers_that_are_no_linear_of_torch(tmp_path: Path, kind: str) -> None:
    def fresh() -> nn.Module:
        torch.manual_seed(0)
        if kind == "conv1d":
            return nn.Sequential(Conv1D(6, 8), Conv1D(5, 6))
        return nn.Sequential(ForeignLinear(nn.Linear(8, 6)), ForeignLinear(nn.Linear(6, 5)))

    settings = PRWPeftConfig(target_modules=["0", "1"], rank=2)
    model, plain = get_peft_model(fresh(), settings), fresh()
    assert torch.equal(model(X), plain(X))
    twin = prw.weave(plain, prw.Config(target_modules=["0", "1"], rank=2))
    torch.manual_seed(1)
    grow(weave_of(model), "one")
    torch.manual_seed(1)
    grow(twin, "one")
    assert torch.equal(model(X), plain(X)) and not torch.equal(model(X), fresh()(X))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(fresh(), tmp_path)
    assert torch.equal(again(X), model(X))
    if kind == "foreign":
        with pytest.raises(prw.ConfigError, match="the weight of '0' is quantised or distributed"):
            model.merge_adapter()
        assert torch.equal(again(X), model(X))
        assert type(model.unload()[0]) is ForeignLinear
        return
    model.merge_adapter()
    # (W + BA) x against W x + B (A x) in fp32, sums of 8 and 2 terms of size 1
    torch.testing.assert_close(model(X), again(X), rtol=0, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(X), again(X), rtol=0, atol=1e-5)
    assert type(model.unload()[0]) is Conv1D


def test_gpt2_by_transformers_own_adapters(tmp_path: Path) -> None:
    def gpt2() -> GPT2LMHeadModel:
        torch.manual_seed(0)
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32, "n_positions": 16}
        return GPT2LMHeadModel(GPT2Config(**sizes)).eval()

    model = gpt2()
    model.add_adapter(PRWPeftConfig(target_modules=["c_attn", "c_proj"], rank=2))
    assert torch.equal(model(IDS).logits, gpt2()(IDS).logits)
    grow(weave_of(model), "one", "two")
    model.save_pretrained(tmp_path)
    again = gpt2()
    again.load_adapter(tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert not torch.equal(again(IDS).logits, gpt2()(IDS).logits)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # the base uses them
@pytest.mark.parametrize("padded", [False, True])
def test_the_fast_path_of_torchs_encoder_does_not_skip_experts(padded: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    mask = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 3 + [True] * 2])
    given = {"src_key_padding_mask": mask} if padded else {}
    with torch.no_grad():
        base = encoder(X, **given)
        model = get_peft_model(encoder, PRWPeftConfig(target_modules=["linear1"], rank=2))
        grow(weave_of(model), "one", "two")
        with weave_of(model).force_route("two"):
            found = model(X, **given)
        assert (found - base)[~mask].abs().max() > 0.1
        plain = model.unload()
        assert torch.equal(plain(X, **given), base)
    with pytest.raises(prw.ConfigError, match=r"'self_attn.out_proj' is part of an nn.MultiheadAt"):
        get_peft_model(layer, PRWPeftConfig(target_modules=["out_proj"], rank=2))


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


IDS = torch.arange(12).reshape(2, 6)


@pytest.mark.filterwarnings(SECOND)
def test_transformers_own_adapters(tmp_path: Path) -> None:
    model, base = llama(), llama()(IDS).logits
    model.add_adapter(PRWPeftConfig(target_modules=["q_proj", "v_proj"], rank=2))
    assert torch.equal(model(IDS).logits, base)
    weave = weave_of(model)
    grow(weave, "one", "two")
    wanted = model(IDS).logits
    with weave.at_stage("one"):
        pinned = model(IDS).logits
    model.add_adapter(PRWPeftConfig(target_modules="all-linear", rank=2, stages=["x"]), "other")
    model.set_adapter("default")
    assert torch.equal(model(IDS).logits, wanted)
    model.disable_adapters()
    assert torch.equal(model(IDS).logits, base)
    model.enable_adapters()
    assert not trainable(model), "everything of this adapter is closed"
    model.delete_adapter("other")
    model.save_pretrained(tmp_path)

    again = llama()
    again.load_adapter(tmp_path)
    assert isinstance(again.model.layers[0].self_attn.q_proj, PRWLinear)
    assert not any(isinstance(module, LoraLayer) for module in again.modules())
    assert torch.equal(again(IDS).logits, wanted)
    with weave_of(again).at_stage("one"):
        assert torch.equal(again(IDS).logits, pinned)
    peft = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(peft(IDS).logits, wanted)
    again.delete_adapter("default")
    assert torch.equal(again(IDS).logits, base)


def test_transformers_generates_and_trains_on(tmp_path: Path) -> None:
    model = llama()
    model.add_adapter(PRWPeftConfig(target_modules="all-linear", rank=2, stages=["one"]))
    shake(weave_of(model))
    model.save_pretrained(tmp_path)
    again = llama()
    again.load_adapter(tmp_path, is_trainable=True)
    weave_of(again).unlock("two")
    assert trainable(again) == learning(again)
    again.train()
    with weave_of(again).record() as record:
        loss = again(IDS, labels=IDS).loss
    (loss + prw.veteran_gate_loss(record, 0.8, 0.5)).backward()
    assert all(parameter.grad is not None for parameter in weave_of(again).parameters())
    again.eval()
    weave_of(again).call(noisy=False)
    tokens = again.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False, pad_token_id=0
    )
    logits = again(tokens[:, :-1]).logits[:, 5:]
    assert torch.equal(logits.argmax(-1), tokens[:, 6:])


def flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    ).eval()


def paint(model: nn.Module, scale: float | None = None) -> Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        output = model(
            hidden_states=torch.randn(1, 6, 4),
            encoder_hidden_states=torch.randn(1, 3, 8),
            pooled_projections=torch.randn(1, 8),
            timestep=torch.tensor([0.5]),
            img_ids=torch.zeros(6, 3),
            txt_ids=torch.zeros(3, 3),
            joint_attention_kwargs=None if scale is None else {"scale": scale},
            return_dict=False,
        )
    return output[0]


@pytest.mark.filterwarnings(SECOND)
def test_diffusers_adapters(tmp_path: Path) -> None:
    model, base = flux(), paint(flux())
    model.add_adapter(PRWPeftConfig(target_modules=["to_k", "to_v"], rank=2))
    weave = weave_of(model)
    grow(weave, "one", "two")
    wanted = paint(model)
    assert not torch.equal(wanted, base)
    weave.unlock("three")
    free = learning(model)
    model.set_adapters("default", 0.0)
    assert torch.equal(paint(model), base) and trainable(model) == free
    model.set_adapters("default", 1.0)
    paint_open = paint(model)
    assert not torch.equal(paint_open, base) and trainable(model) == free
    model.set_adapters("default", 0.5)
    half = paint(model)
    assert not torch.equal(half, base) and not torch.equal(half, paint_open)
    model.set_adapters("default")
    assert torch.equal(paint(model, scale=0.5), half) and torch.equal(paint(model), paint_open)
    assert torch.equal(paint(model, scale=0.0), base) and torch.equal(paint(model), paint_open)
    weave.rollback("two")
    assert torch.equal(paint(model), wanted)
    model.disable_adapters()
    assert torch.equal(paint(model), base)
    model.enable_adapters()
    assert torch.equal(paint(model), wanted) and not trainable(model)
    model.save_lora_adapter(tmp_path)

    again = flux()
    loaded = load_adapter(again, tmp_path / "pytorch_lora_weights.safetensors", "mine")
    assert loaded.ledger.names == ("one", "two") and torch.equal(paint(again), wanted)
    with loaded.at_stage("one"), weave.at_stage("one"):
        assert torch.equal(paint(again), paint(model))
    again.add_adapter(PRWPeftConfig(target_modules=["to_q"], rank=2), "second")
    again.set_adapters(["mine", "second"], [1.0, 0.0])
    assert torch.equal(paint(again), wanted)
    again.delete_adapters("second")
    again.set_adapters("mine")
    assert torch.equal(paint(again), wanted)
    again.unload_lora()
    assert torch.equal(paint(again), base)


@pytest.mark.filterwarnings(SECOND)
def test_load_adapter_refuses_other_files(tmp_path: Path) -> None:
    place = tmp_path / "file.safetensors"
    with pytest.raises(prw.CheckpointError, match="cannot be read"):
        load_adapter(flux(), place)
    save_file(
        {"x": torch.zeros(1)}, place, metadata={"lora_adapter_metadata": '{"peft_type": "LORA"}'}
    )
    with pytest.raises(prw.CheckpointError, match="holds no PRW adapter, its type is 'LORA'"):
        load_adapter(flux(), place)
    source = flux()
    source.add_adapter(PRWPeftConfig(target_modules=["to_k"], rank=2, stages=["one"]))
    source.save_lora_adapter(tmp_path)
    whole = tmp_path / "pytorch_lora_weights.safetensors"
    with safe_open(whole, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(whole)
    name = next(name for name in tensors if ".experts.0.A." in name)
    key = name.removeprefix("transformer.").replace("prw_pool.", "prw_pool.default.")
    for changed, message in (
        ({n: t for n, t in tensors.items() if n != name}, f"damaged: it lacks '{key}'"),
        (
            tensors | {f"{name[:-1]}9": tensors[name].clone()},
            "does not fit this model, which has no",
        ),
        (tensors | {name: tensors[name][:1]}, r"is \[1, 32\], but that of adapter 'default' is"),
    ):
        save_file(changed, place, metadata=metadata)
        model = flux()
        with pytest.raises(prw.CheckpointError, match=message):
            load_adapter(model, place)
        assert torch.equal(paint(model), paint(flux()))
        with pytest.raises(prw.ConfigError, match="it has no PRW adapter"):
            weave_of(model)
        assert load_adapter(model, whole).ledger.names == ("one",)


@pytest.mark.slow
def test_a_fresh_process_needs_the_import_and_says_so(tmp_path: Path) -> None:
    model = get_peft_model(net(), config())
    grow(weave_of(model), "one", "two")
    model.save_pretrained(tmp_path)
    torch.save(model(X), tmp_path / "wanted.pt")
    torch.save(net().state_dict(), tmp_path / "base.pt")
    code = """
import sys, torch
from torch import nn
from peft import PeftModel
if sys.argv[2] == "with":
    import prw.integrations.peft
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_k, self.to_v, self.out = nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 8)
    def forward(self, x):
        return self.out(torch.tanh(self.to_k(x)[..., :6] * self.to_v(x)))
net = Net()
net.load_state_dict(torch.load(sys.argv[1] + "/base.pt"))
model = PeftModel.from_pretrained(net, sys.argv[1])
x = torch.linspace(-2, 2, 3 * 5 * 8).sin().reshape(3, 5, 8)
wanted = torch.load(sys.argv[1] + "/wanted.pt")
print(type(model.base_model.model.to_k).__name__, torch.equal(model(x), wanted))
"""
    for how, expected in (("with", "PRWLinear True"), ("without", "KeyError: 'PRW'")):
        command = [sys.executable, "-c", code, str(tmp_path), how]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert expected in result.stdout + result.stderr


def test_generation_under_peft_follows_the_prompt() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=32, pad_token_id=0,
    )  # fmt: skip
    settings = PRWPeftConfig(target_modules=["q_proj"], rank=2, granularity="sample", stages=["a"])
    model = get_peft_model(LlamaForCausalLM(config), settings)
    weave = weave_of(model)
    weave.unlock("b")
    with torch.no_grad():
        for parameter in weave.parameters():
            parameter.normal_()
    model.eval()
    ids = torch.randint(1, 32, (2, 5))
    prompt = torch.ones_like(ids).bool()
    weave.call(mask=prompt, noisy=False)
    made = model.generate(
        input_ids=ids, attention_mask=prompt.long(), min_new_tokens=3, max_new_tokens=3,
        do_sample=False, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    whole = torch.cat([prompt, torch.zeros(2, 3, dtype=torch.bool)], 1)
    weave.call(mask=whole, noisy=False)
    with torch.no_grad():
        logits = model(input_ids=made.sequences).logits
    for step, found in enumerate(made.logits):  # sums in another order: fp32, a few layers
        torch.testing.assert_close(found, logits[:, 4 + step].float(), rtol=1e-4, atol=1e-4)
    inner = model.get_base_model()
    assert inner._forward_hooks and inner._forward_pre_hooks
    model.delete_adapter("default")
    assert not inner._forward_hooks and not inner._forward_pre_hooks


def test_the_order_of_rank_patterns_survives_a_file(tmp_path: Path) -> None:
    model = get_peft_model(
        nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)),
        PRWPeftConfig(target_modules=["0", "1"], rank_pattern={"1": 4, ".*": 2}, stages=["a"]),
    )
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), tmp_path / "adapter"
    )
    ranks = {name: pool.expert(0).A[0].shape[0] for name, pool in weave_of(again).pools.items()}
    assert ranks == {"0": 2, "1": 4}
