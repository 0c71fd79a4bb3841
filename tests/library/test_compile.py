"""A woven module is one graph for torch.compile, whatever the call says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

import prw

# torch's own tracing makes an instance of every autograd function and warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

X = torch.linspace(-2, 2, 3 * 5 * 8).sin().reshape(3, 5, 8)


class Net(nn.Module):
    """Two siblings that share a router."""

    def __init__(self) -> None:
        super().__init__()
        self.to_k = nn.Linear(8, 8)
        self.to_v = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.to_k(x)) * self.to_v(x)


class Graphs:
    """A backend that runs graphs eagerly and counts those of forward and of backward."""

    def __init__(self) -> None:
        self.forward = self.backward = 0
        self.backend = aot_autograd(fw_compiler=self.count, bw_compiler=self.count_backward)

    def count(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.forward += 1
        return make_boxed_func(graph.forward)

    def count_backward(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.backward += 1
        return make_boxed_func(graph.forward)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def build(**fields: Any) -> tuple[Net, prw.Weave]:
    torch.manual_seed(0)
    net = Net()
    weave = prw.weave(
        net, prw.Config(target_modules=["to_k", "to_v"], rank=4, share_router="parent", **fields)
    )
    for name in ("one", "two"):
        weave.unlock(name)
        for parameter in weave.parameters():
            nn.init.normal_(parameter, std=0.3)
    return net, weave


def step(model: Any, weave: prw.Weave, key: int, mask: Tensor | None = None) -> list[Tensor]:
    """A training step of two micro-batches under one record: output, usage and gradients."""
    for parameter in weave.parameters():
        parameter.grad = None
    with weave.record(key=key, mask=mask, keep_inputs=True) as record:
        y = model(X)
        z = model(X.flip(0))
    loss = (y + z).square().mean() + prw.veteran_gate_loss(record, 0.8, 0.5)
    (loss + prw.load_balance_loss(record, 0.1)).backward()
    group = next(iter(record.tally.groups.values()))
    grads = [p.grad for p in weave.parameters() if p.grad is not None]
    return [y.detach(), group.used, group.count, *grads]


@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_a_recorded_step_is_one_graph_for_any_key_mask_and_micro_batch(granularity: str) -> None:
    net, weave = build(granularity=granularity)
    graphs = Graphs()
    compiled = torch.compile(net, backend=graphs.backend, fullgraph=True)
    for key in (10**15, -3, 7):
        found = step(compiled, weave, key)
        # Graphs decompose operators: fp32 sums of some ten products in another order.
        torch.testing.assert_close(found, step(net, weave, key), rtol=1e-4, atol=1e-6)
        assert (graphs.forward, graphs.backward) == (1, 1)
    for kept in (4, 3):
        mask = torch.arange(5).expand(3, 5) < kept
        found = step(compiled, weave, 5, mask)
        torch.testing.assert_close(found, step(net, weave, 5, mask), rtol=1e-4, atol=1e-6)
        assert (graphs.forward, graphs.backward) == (2, 2)  # one more, because there is a mask now


@pytest.mark.slow
def test_a_stage_compiles_each_kind_of_call_once() -> None:
    net, weave = build()
    graphs = Graphs()
    compiled = torch.compile(net, backend=graphs.backend, fullgraph=True)
    calls: list[Callable[[int], object]] = [
        lambda key: weave.call(noisy=False),
        lambda key: weave.call(key=key),
        lambda key: weave.record(key=key),
    ]
    for stage in range(2):
        if stage:
            weave.unlock("three")
        for kind, call in enumerate(calls):
            for key in (1, 2):
                call(key)
                y = compiled(X)
                torch.testing.assert_close(y, net(X), rtol=1e-4, atol=1e-6)
                y.sum().backward()
            assert graphs.forward == graphs.backward == stage * len(calls) + kind + 1


def test_checkpointing_around_a_compiled_module_counts_once() -> None:
    net, weave = build()
    compiled = torch.compile(net, backend=Graphs().backend, fullgraph=True)
    for reentrant in (True, False):
        x = X.clone().requires_grad_()
        with weave.record(key=5, keep_inputs=True) as record:
            y = checkpoint(compiled, x, use_reentrant=reentrant)
        y.square().mean().backward()
        with weave.record(key=5, keep_inputs=True) as plain:
            net(X)
        assert record.usage() == plain.usage()
        assert int(next(iter(record.tally.groups.values())).count) == 15
        losses = [prw.load_balance_loss(r, 1.0) for r in (record, plain)]
        torch.testing.assert_close(losses[0], losses[1])
        (group,) = record.by_group().values()
        assert group["expert"].shape == (15,)


def test_checkpointing_inside_a_compiled_module_counts_once() -> None:
    net, weave = build()

    def inside(x: Tensor) -> Tensor:
        y: Tensor = checkpoint(net, x, use_reentrant=False)
        return y

    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        compiled = torch.compile(inside, backend=Graphs().backend, fullgraph=True)
        found = step(compiled, weave, 5)
    torch.testing.assert_close(found, step(net, weave, 5), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # inductor's own
def test_inductor_agrees() -> None:
    net, weave = build()
    compiled = torch.compile(net, fullgraph=True)
    torch.testing.assert_close(step(compiled, weave, 5), step(net, weave, 5), rtol=1e-4, atol=1e-6)
