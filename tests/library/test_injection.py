"""`prw.weave` on plain models: what it adapts, what it refuses, what it leaves behind."""

from __future__ import annotations

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
    assert [name for name, m in net.named_modules() if isinstance(m, RoutedLinear)] == wanted
    assert list(woven.pools) == wanted


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


@pytest.mark.parametrize(
    ("model", "targets", "message"),
    [
        (Net(), [], "target_modules is empty"),
        (Net(), ["to_kk"], "'to_kk' matches nothing; the nearest linear layers are to_k"),
        (Net(), ["to_k", "q_proj"], "'q_proj' matches nothing"),
        (Net(), ["norm"], "matches 'norm', a LayerNorm; only nn.Linear"),
        (nn.LayerNorm(3), ["x"], "the model has no nn.Linear layer"),
        (nn.Sequential(nn.Linear(4, 1)), ["0"], r"rank 2 is above the size of '0' \(4 -> 1\)"),
        (WithAttention(), ["out_proj"], "nn.MultiheadAttention"),
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


def test_a_woven_model_is_not_woven_again() -> None:
    net = Net()
    weave(net, "to_k")
    with pytest.raises(prw.ConfigError, match=r"woven already at 'layers.0.to_k'; unload\(\)"):
        weave(net, "to_v")
