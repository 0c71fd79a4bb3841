"""An expert folded into the base: exact for one route, measured for the average, else refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import prw

X = torch.linspace(-2, 2, 3 * 5 * 8).sin().reshape(3, 5, 8)


def base(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8, bias=False)).to(dtype)


def woven(
    *names: str, dtype: torch.dtype = torch.float32, **fields: Any
) -> tuple[nn.Sequential, prw.Weave]:
    """A model in eval mode with random experts and routers."""
    net = base(dtype).eval()
    weave = prw.weave(net, prw.Config(target_modules=["0", "2"], rank=3, **fields))
    for name in names:
        weave.unlock(name)
        for parameter in weave.parameters():
            nn.init.normal_(parameter)
    weave.call(noisy=False)
    return net, weave


def tensors(net: nn.Module) -> list[Tensor]:
    return [*net.parameters(), *net.buffers()]


def test_a_merged_model_is_the_forced_route_and_plain() -> None:
    net, weave = woven("one", "two", dtype=torch.float64)
    with weave.force_route("one"):
        wanted = net(X.double())
    weave.merge("one")
    # fp64 twice: 1e-16 per operation, some tens of operations, values of the order of 10
    torch.testing.assert_close(net(X.double()), wanted, rtol=1e-12, atol=1e-12)
    assert type(net[0]) is nn.Linear and type(net[2]) is nn.Linear
    assert list(net.state_dict()) == list(base().state_dict())
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert not torch.equal(net[0].weight, base(torch.float64)[0].weight)
    assert torch.equal(net[0].bias, base(torch.float64)[0].bias)
    with pytest.raises(prw.StageError, match="unloaded already"):
        weave.merge("one")


@settings(max_examples=15)
@given(
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.integers(0, 2),
    st.sampled_from(["module", "parent"]),
    st.floats(0.01, 10),
)
def test_the_merged_weight_is_the_sum_rounded_once(
    dtype: torch.dtype, stage: int, share_router: str, alpha: float
) -> None:
    names = ["one", "two", "three"]
    net, weave = woven(*names, dtype=dtype, share_router=share_router, alpha=alpha)
    pools = {target: pool for pool in weave.pools.values() for target in pool.targets.values()}
    wanted = {}
    for target, pool in pools.items():
        layer = net.get_submodule(target)
        A, B = (f.detach().double() for f in pool.expert(stage).pair(target))
        exact = layer.base.weight.double() + B @ A * (alpha / 3)
        # fp32 sums of 3 products and 2 further terms, then one rounding to the dtype of W
        size = layer.base.weight.double().abs() + B.abs() @ A.abs() * (alpha / 3)
        bound = size * (8 * 2**-24) + exact.abs() * torch.finfo(dtype).eps
        wanted[target] = exact, bound
    weave.merge(names[stage])
    for target, (exact, bound) in wanted.items():
        weight = net.get_submodule(target).weight
        assert weight.dtype == dtype
        assert ((weight.double() - exact).abs() <= bound).all()


def test_weights_that_others_share_stay_theirs() -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"embed": nn.Embedding(8, 8), "head": nn.Linear(8, 8, bias=False)})
    net["head"].weight = net["embed"].weight
    tied = net["embed"].weight.detach().clone()
    weave = prw.weave(net, prw.Config(target_modules=["head"], rank=2))
    weave.unlock("one")
    for parameter in weave.parameters():
        nn.init.normal_(parameter)
    weave.merge("one")
    assert torch.equal(net["embed"].weight, tied) and not torch.equal(net["head"].weight, tied)


def test_a_transposed_weight() -> None:
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D
    from prw import merging
    from prw.linear import RoutedLinear
    from prw.pool import Pool

    pool = Pool("0", 8, {"p": 12}, prw.Config(rank=3, target_modules=["0"]))
    weave = prw.Weave({"0": pool}, pool.config, fingerprint={})
    weave.unlock("one")
    for parameter in weave.parameters():
        nn.init.normal_(parameter)
    layer = RoutedLinear(conv(12, 8), pool, "p", owner=True)
    with weave.force_route("one"):
        wanted = layer(X)
    merging.check_mergeable({"0": layer})
    merged = merging.merged_weights({"0": layer}, {"0": (1.0,)})
    layer.base.weight = merged["0"]
    # fp32, 11 products of order 10
    torch.testing.assert_close(layer.base(X), wanted, rtol=1e-5, atol=1e-4)


class Tagged(torch.Tensor):
    """A tensor subclass, as quantisation and sharding make them."""


def test_what_would_lose_more_is_refused() -> None:
    net, weave = woven("one")
    before = tensors(net)
    layer = net[2].base
    plain = layer.weight
    for weight, kind in (
        (nn.Parameter(plain.detach().to(torch.int8), requires_grad=False), r"torch\.int8"),
        (nn.Parameter(plain.detach().to(torch.float8_e4m3fn), requires_grad=False), "float8"),
        (nn.Parameter(plain.detach().to("meta")), r"torch\.float32"),
    ):
        layer.weight = weight
        with pytest.raises(prw.StageError, match=f"the weight of '2'.*{kind}.*load the base in 16"):
            weave.merge("one")
        with pytest.raises(prw.StageError, match="merging would round it anew"):
            weave.merge_average(lambda: net(X), tolerance=1.0)
    layer.weight = nn.Parameter(plain.detach().as_subclass(Tagged))
    with pytest.raises(prw.StageError, match="quantised or distributed Tagged"):
        weave.merge("one")
    layer.weight = plain
    assert all(one is other for one, other in zip(before, tensors(net), strict=True))
    with pytest.raises(prw.StageError, match="no stage 'won'"):
        weave.merge("won")


def test_a_quantised_base_of_torchao_is_refused() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    net, weave = woven("one")
    quantization.quantize_(net[2].base, quantization.Int8WeightOnlyConfig(version=2))
    with pytest.raises(prw.StageError, match="the weight of '2' is a quantised"):
        weave.merge("one")
    assert type(net[0]).__name__ == "RoutedLinear"


def test_a_weight_that_overflows_is_refused() -> None:
    net, weave = woven("one", dtype=torch.float16, alpha=1e6)
    with pytest.raises(
        prw.StageError, match=r"merged weight of '0' does not fit into torch.float16"
    ):
        weave.merge("one")
    assert type(net[0]).__name__ == "RoutedLinear"


def test_weaves_over_bare_pools_have_nothing_to_merge_into() -> None:
    pool = prw.Pool("p", 8, {"k": 8}, prw.Config(rank=2, target_modules=["k"]))
    weave = prw.Weave({"p": pool}, pool.config, fingerprint={})
    weave.unlock("one")
    with pytest.raises(prw.StageError, match="bare pools; there are no weights to merge into"):
        weave.merge("one")


def error(one: Tensor, other: Tensor) -> float:
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("granularity", ["token", "sample"])
@pytest.mark.parametrize("gate", ["softmax", "one"])
def test_the_average_is_measured_before_it_is_done(granularity: str, gate: str) -> None:
    net, weave = woven("one", "two", granularity=granularity, gate=gate, alpha=0.3)
    with torch.no_grad():
        routed = net(X)
    before = [(t, t.clone()) for t in tensors(net)]
    with pytest.raises(
        prw.StageError, match=r"changes the model's output by .*tolerance of 0\.00%"
    ):
        weave.merge_average(lambda: net(X), tolerance=0.0)
    after = tensors(net)
    assert all(a is b and torch.equal(a, c) for a, (b, c) in zip(after, before, strict=True))
    with torch.no_grad():
        assert torch.equal(net(X), routed)
    with weave.record() as record, torch.no_grad():
        net(X)
    shares = {
        name: tuple(
            float((group["gate"].double() * (group["expert"] == index)).mean()) for index in (0, 1)
        )
        for name, group in record.by_group().items()
    }
    weights = {
        target: net.get_submodule(target).base.weight.detach()
        + sum(
            share * 0.1 * pool.expert(index).pair(target)[1] @ pool.expert(index).pair(target)[0]
            for index, share in enumerate(shares[target])
        )
        for target, pool in weave.pools.items()
    }
    inputs = {"0": X, "2": torch.tanh(net[0](X)).detach()}
    layers = {
        target: error(
            nn.functional.linear(x, weights[target], net.get_submodule(target).bias),
            net.get_submodule(target)(x),
        )
        for target, x in inputs.items()
    }
    fidelity = weave.merge_average(lambda: net(X), tolerance=10.0)
    for name, wanted in shares.items():
        assert fidelity.shares[name] == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    assert fidelity.layers == pytest.approx(layers, rel=1e-4)
    assert type(net[0]) is nn.Linear
    with torch.no_grad():
        assert fidelity.model == pytest.approx(error(net(X), routed), rel=1e-12)
    assert 1e-3 < fidelity.model < 10


def test_an_average_of_one_expert_costs_rounding_only() -> None:
    net, weave = woven("one")
    with torch.no_grad():
        wanted = net(X)
    # fp32: two sums of 12 products in another order, against a tanh between them
    fidelity = weave.merge_average(lambda: net(X), tolerance=1e-5)
    assert fidelity.shares == {"0": (1.0,), "2": (1.0,)} and fidelity.model < 1e-5
    torch.testing.assert_close(net(X), wanted, rtol=1e-4, atol=1e-4)


def test_a_mask_says_which_rows_weigh() -> None:
    net, weave = woven("one", "two")
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[0, :2] = True
    first = weave.merge_average(lambda: net(X), tolerance=1e9, mask=mask)
    other, weave = woven("one", "two")
    with weave.record() as record, torch.no_grad():
        other(X)
    chosen = record.tally.groups["0"].routings[0]
    kept = torch.where(chosen.expert[0, :2] == 1, chosen.gate[0, :2], 0.0)
    assert first.shares["0"][1] == pytest.approx(float(kept.double().mean()))


def test_bad_requests_are_refused_before_anything_runs() -> None:
    net, weave = woven("one", "two")
    calls = []

    def run() -> Any:
        calls.append(1)
        return net(X)

    for tolerance in (-0.1, math.nan, math.inf):
        with pytest.raises(prw.ConfigError, match="tolerance, a relative error, must be"):
            weave.merge_average(run, tolerance=tolerance)
    assert not calls
    with pytest.raises(prw.ConfigError, match=r"run\(\) should return one tensor, got a dict"):
        weave.merge_average(lambda: {"logits": run()}, tolerance=1.0)  # type: ignore[arg-type,return-value]
    with pytest.raises(prw.StageError, match="'2' was not run"):
        weave.merge_average(lambda: net[0](X), tolerance=1.0)
    with pytest.raises(TypeError, match="tolerance"):
        weave.merge_average(run)  # type: ignore[call-arg]
    with pytest.raises(prw.StageError, match="more than the tolerance"):
        weave.merge_average(lambda: run() * math.nan, tolerance=1.0)


def test_a_run_that_fails_in_the_middle_changes_nothing() -> None:
    net, weave = woven("one", "two")
    before = [(t, t.clone()) for t in tensors(net)]
    with torch.no_grad():
        routed = net(X)
    calls = []

    def run() -> Tensor:
        calls.append(1)
        output: Tensor = net(X)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return output

    with pytest.raises(KeyboardInterrupt):
        weave.merge_average(run, tolerance=1e9)
    after = tensors(net)
    assert all(a is b and torch.equal(a, c) for a, (b, c) in zip(after, before, strict=True))
    with torch.no_grad():
        assert torch.equal(net(X), routed)
    assert not net[0]._forward_hooks
