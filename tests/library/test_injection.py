"""`prw.weave` on plain models: what it adapts, what it refuses, what it leaves behind."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prw
from prw.linear import RoutedLinear


class Attention(nn.Module):
    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(context, width)
        self.to_v = nn.Linear(context, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_q(x) * self.to_k(x) + self.to_v(x)


class Net(nn.Module):
    def __init__(self, context: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(4, context) for _ in range(2))
        self.norm = nn.LayerNorm(4)
        self.to_out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.norm(layer(x))
        return self.to_out(x)


def adapted(net: nn.Module) -> list[str]:
    return [name for name, m in net.named_modules() if isinstance(m, RoutedLinear)]


def weave(model: nn.Module, *targets: str, **fields: object) -> prw.Weave:
    return prw.weave(model, prw.Config(target_modules=targets, rank=2, **fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        (["to_k"], ["layers.0.to_k", "layers.1.to_k"]),
        (["to_out", "layers.1.to_q"], ["layers.1.to_q", "to_out"]),
        (["0.to_v"], ["layers.0.to_v"]),
        (["layers.*.to_[kv]"], [f"layers.{i}.to_{p}" for i in (0, 1) for p in "kv"]),
        (["to_k", "layers.0.to_k"], ["layers.0.to_k", "layers.1.to_k"]),
    ],
)
def test_targets_match_names_endings_and_patterns(targets: list[str], wanted: list[str]) -> None:
    net = Net()
    woven = weave(net, *targets)
    assert adapted(net) == wanted
    assert list(woven.pools) == wanted


LAYERS = [f"layers.{i}.to_{p}" for i in (0, 1) for p in "qkv"]


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"target_modules": r".*\.to_(q|k)"}, [n for n in LAYERS if n[-1] in "qk"]),
        ({"target_modules": r"layers\.1\.\w+"}, LAYERS[3:]),
        ({"target_modules": "to_out"}, ["to_out"]),
        ({"target_modules": "all-linear"}, [*LAYERS, "to_out"]),
        ({"target_modules": "All-Linear", "exclude_modules": ["to_out", "to_v"]}, "qk"),
        ({"target_modules": ["to_q", "to_k"], "exclude_modules": r"layers\.0.*"}, LAYERS[3:5]),
        ({"target_modules": ["to_q"], "exclude_modules": ["layers.0.*"]}, LAYERS[3:4]),
    ],
)
def test_expressions_and_exclusions(fields: dict[str, object], wanted: object) -> None:
    net = Net()
    prw.weave(net, prw.Config(rank=2, **fields))  # type: ignore[arg-type]
    assert adapted(net) == ([n for n in LAYERS if n[-1] in "qk"] if wanted == "qk" else wanted)


@pytest.mark.parametrize("share", ["module", "parent"])
def test_rank_pattern(share: str, tmp_path: Path) -> None:
    pattern = {"layers.0.to_k": 3, "to_k": 1, r"to_[qv]": 4}
    net, config = (
        Net(),
        prw.Config(
            target_modules="all-linear", rank=2, alpha=4, rank_pattern=pattern, share_router=share
        ),
    )
    woven = prw.weave(net, config)
    woven.unlock("one")
    found = {
        target: (pool.expert(0).rank(p), pool.expert(0).scaling(p))
        for pool in woven.pools.values()
        for p, target in pool.targets.items()
    }
    ranks = {n: 4 if n[-1] != "k" else 3 if ".0." in n else 1 for n in LAYERS} | {"to_out": 2}
    assert found == {name: (rank, 2.0) for name, rank in ranks.items()}
    for parameter in woven.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 3, 4)
    now = net(x)
    woven.save(tmp_path / "weave")
    woven.unload()
    prw.load(net, tmp_path / "weave")
    assert torch.equal(net(x), now)


ALL = {"target_modules": "all-linear", "rank": 2}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": "to_k"}, r"'to_k' matches nothing.*\['to_k'\] matches endings"),
        ({"target_modules": r".*\.q_proj"}, r"nearest linear layers are .*to_q.*whole names"),
        ({"target_modules": "norm"}, "matches 'norm', a LayerNorm"),
        (ALL | {"exclude_modules": ["to_w"]}, "exclusion 'to_w' matches nothing; the nearest"),
        (ALL | {"exclude_modules": ["layers.0"]}, r"'layers.0.\*' means the layers inside"),
        (ALL | {"exclude_modules": ".*"}, "leaves nothing of the targets 'layers.0.to_q'"),
        ({"target_modules": ["to_k"], "exclude_modules": ["to_k"]}, r"\['to_k'\] leaves nothing"),
        (ALL | {"rank_pattern": {"to_w": 1}}, "'to_w', which matches no target; .*to_"),
        (ALL | {"exclude_modules": ["to_k"], "rank_pattern": {"to_k": 1}}, "matches no target"),
        (ALL | {"rank_pattern": {"to_k": 9}}, r"rank 9 is above the size of 'layers.0.to_k'"),
    ],
)
def test_patterns_that_cannot_work(fields: dict[str, object], message: str) -> None:
    net = Net()
    with pytest.raises(prw.ConfigError, match=message):
        prw.weave(net, prw.Config(**fields))  # type: ignore[arg-type]
    assert not adapted(net) and all(p.requires_grad for p in net.parameters())


def test_share_router_by_parent_and_width() -> None:
    woven = weave(Net(), "to_q", "to_k", "to_v", share_router="parent")
    assert {n: list(p.projections) for n, p in woven.pools.items()} == {
        "layers.0": ["to_q", "to_k", "to_v"],
        "layers.1": ["to_q", "to_k", "to_v"],
    }
    woven = weave(Net(context=6), "to_q", "to_k", "to_v", share_router="parent")
    assert {n: list(p.projections) for n, p in woven.pools.items() if "0:" in n} == {
        "layers.0:4": ["to_q"],
        "layers.0:6": ["to_k", "to_v"],
    }


def test_every_parameter_has_one_name_and_only_routed_ones_learn() -> None:
    net = Net()
    net.norm.weight.requires_grad_(False)
    woven = weave(net, "to_k", "to_v", share_router="parent")
    assert not any(p.requires_grad for p in net.parameters())
    woven.unlock("one")
    names = [n for n, _ in net.named_parameters(remove_duplicate=False)]
    assert len(names) == len({id(p) for p in net.parameters()})
    assert {id(p) for p in net.parameters() if p.requires_grad} == {
        id(p) for p in woven.parameters()
    }
    woven.unload()
    assert not net.norm.weight.requires_grad, "the flags are those from before"
    assert net.to_out.weight.requires_grad


def test_a_layer_used_in_two_places_is_replaced_in_both() -> None:
    net = Net()
    net.layers[1].to_k = net.layers[0].to_k
    base = net.layers[0].to_k
    woven = weave(net, "to_k")
    assert len(woven.pools) == 1
    assert net.layers[0].to_k is net.layers[1].to_k
    woven.unload()
    assert net.layers[0].to_k is net.layers[1].to_k is base


def test_a_routed_linear_still_looks_like_a_linear() -> None:
    net = Net()
    base = net.layers[0].to_v
    weave(net, "to_v")
    routed = net.layers[0].to_v
    assert routed.weight is base.weight and routed.bias is None
    assert (routed.in_features, routed.out_features) == (4, 4)


def test_dtype_and_mode_follow_the_model() -> None:
    net = Net().double().eval()
    woven = weave(net, "to_k")
    woven.unlock("one")
    assert {p.dtype for p in woven.parameters()} == {torch.float64}
    assert not any(m.training for m in net.modules())
    half = Net().bfloat16()
    woven = weave(half, "to_k")
    woven.unlock("one")
    assert {p.dtype for p in woven.parameters()} == {torch.float32}
    assert half(torch.randn(2, 4).bfloat16()).dtype == torch.bfloat16


class Decoder(Net):
    def can_generate(self) -> bool:
        return True


def test_a_causal_decoder_needs_a_mask_for_sample_routing() -> None:
    net = Decoder()
    woven = weave(net, "to_k", granularity="sample")
    woven.unlock("one")
    x = torch.randn(2, 3, 4)
    with pytest.raises(prw.ConfigError, match="prompt's tokens as mask="):
        net(x)
    with woven.record(mask=torch.ones(2, 3).bool()):
        net(x)


class WithAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.mlp = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("model", "targets", "message"),
    [
        (Net(), [], "target_modules is empty"),
        (Net(), ["to_kk"], "'to_kk' matches nothing; the nearest linear layers are to_k"),
        (Net(), ["to_k", "q_proj"], "'q_proj' matches nothing"),
        (Net(), ["norm"], r"matches 'norm', a LayerNorm; only linear layers \(nn.Linear, Conv1D"),
        (nn.LayerNorm(3), ["x"], "the model has no linear layer"),
        (nn.Sequential(nn.Linear(4, 1)), ["0"], r"rank 2 is above the size of '0' \(4 -> 1\)"),
        (WithAttention(), ["out_proj"], "'attention' is an nn.MultiheadAttention.*do nothing"),
        (WithAttention(), ["attention"], "choose linears outside of it, such as 'mlp'"),
        (WithAttention(), ["in_proj_weight"], "or an attention with q, k and v projections"),
    ],
)
def test_mistakes_are_named_and_change_nothing(
    model: nn.Module, targets: list[str], message: str
) -> None:
    before = dict(model.named_modules())
    with pytest.raises(prw.ConfigError, match=message):
        weave(model, *targets)
    assert dict(model.named_modules()) == before
    assert all(p.requires_grad for p in model.parameters())


def test_arguments_of_another_kind_are_refused() -> None:
    config: Any = {"target_modules": ["to_k"]}
    with pytest.raises(
        prw.ConfigError, match=r"takes an nn.Module and a prw.Config, got Net, dict"
    ):
        prw.weave(Net(), config)
    model: Any = "meta-llama/Llama-3.2-1B"
    with pytest.raises(prw.ConfigError, match=r"an nn.Module and a prw.Config, got str, Config"):
        prw.weave(model, prw.Config(target_modules=["to_k"]))


def test_a_woven_model_is_not_woven_again() -> None:
    net = Net()
    weave(net, "to_k")
    with pytest.raises(prw.ConfigError, match=r"woven already at 'layers.0.to_k'; unload\(\)"):
        weave(net, "to_v")


ROUTER = """import prw


class Mine(prw.Router):
    def logits(self, h_TD, signal, noise, eps_TE):
        return prw.Top1().logits(h_TD, signal, noise, eps_TE)
"""


def test_a_folder_never_imports_the_router_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_router_of_test.py").write_text(ROUTER, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    model = nn.Sequential(nn.Linear(4, 4))
    config = prw.Config(target_modules=["0"], rank=2, router="own_router_of_test:Mine")
    weave = prw.weave(model, config)  # what the user writes is imported
    weave.unlock("one")
    weave.save(tmp_path / "weave")
    weave.unload()
    monkeypatch.delitem(sys.modules, "own_router_of_test")
    with pytest.raises(prw.CheckpointError, match="write `import own_router_of_test` before"):
        prw.load(model, tmp_path / "weave")
    assert "own_router_of_test" not in sys.modules and isinstance(model[0], nn.Linear)
    importlib.import_module("own_router_of_test")
    prw.load(model, tmp_path / "weave").unload()
    monkeypatch.delitem(sys.modules, "own_router_of_test")


def test_a_name_that_is_no_router_is_not_called() -> None:
    called: list[int] = []

    class Other:
        def __init__(self) -> None:
            called.append(1)

    module = types.ModuleType("module_of_test")
    module.Other = Other  # type: ignore[attr-defined]
    sys.modules["module_of_test"] = module
    try:
        with pytest.raises(prw.ConfigError, match="is Other, not a prw.Router"):
            prw.router.find_router("module_of_test:Other", noise=False)
    finally:
        del sys.modules["module_of_test"]
    assert not called


def test_a_copy_of_model_and_weave_is_on_its_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    weave = prw.weave(model, prw.Config(target_modules=["0", "2"], rank=1))
    weave.unlock("a")
    with torch.no_grad():
        for parameter in weave.parameters():
            parameter.normal_()
    weave.close()
    other, woven = copy.deepcopy((model, weave))
    x = torch.randn(3, 4)
    trained = model(x)
    assert torch.equal(other(x), trained)
    woven.unload()
    assert type(other[0]) is nn.Linear and not torch.equal(other(x), trained)
    assert torch.equal(model(x), trained)
    weave.unload()
    assert torch.equal(model(x), other(x))


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_goes_on_where_it_was(duplicate: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    weave = prw.weave(model, prw.Config(target_modules=["0", "2"], rank=1))
    weave.unlock("a")
    weave.unlock("b")
    model(torch.ones(2, 4))
    model, weave = duplicate((model, weave))
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1)), *weave.parameters()])
    weave.rollback("a")
    weave.sync(optimizer)
    assert [p.shape for p in optimizer.param_groups[0]["params"]] == [(1,)]
    weave.unlock("c")
    weave.sync(optimizer)
    held = {id(p) for p in optimizer.param_groups[0]["params"][1:]}
    assert (
        held
        == {id(p) for p in weave.parameters()}
        == {id(p) for p in model.parameters() if p.requires_grad}
    )
    weave.unload()
    assert type(model[0]) is nn.Linear


def test_a_woven_layer_takes_its_input_by_keyword() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    prw.weave(model, prw.Config(target_modules=["0"], rank=1)).unlock("a")
    x = torch.randn(3, 4)
    assert torch.equal(model[0](input=x), model[0](x))
