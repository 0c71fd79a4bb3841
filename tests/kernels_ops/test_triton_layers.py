"""Layers of `prw` on the Triton kernels: residual first, base added to it, one node for K and V."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import prw

places = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", id="interpreter", marks=pytest.mark.interpreted),
        pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
    ],
)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_k, self.to_v = nn.Linear(48, 64), nn.Linear(48, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_k(x).sin() * self.to_v(x)


def run(
    backend: Literal["reference", "triton"],
    granularity: Literal["token", "sample"],
    stages: int,
    device: str,
) -> dict[str, Tensor]:
    """Output and gradients after some stages, one of which is open."""
    torch.manual_seed(0)
    model = Attention().to(device)
    config = prw.Config(
        target_modules=["to_k", "to_v"],
        rank=8,
        backend=backend,
        granularity=granularity,
        share_router="parent",
    )
    weave = prw.weave(model, config)
    for stage in range(stages):
        weave.unlock(f"s{stage}")
        for parameter in weave.parameters():
            nn.init.normal_(parameter, std=0.3)
    x = torch.randn(3, 7, 48, device=device, requires_grad=True)
    with weave.record(key=5) as routing:
        y = model(x)
    loss = y.square().mean()
    if stages > 1:
        loss = loss + prw.veteran_gate_loss(routing, density=0.8, weight=0.5)
    loss.backward()
    with weave.at_stage("s0"), torch.no_grad():
        found = {"y": y.detach(), "x": x.grad, "at s0": model(x)}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad
    return found


@places
@pytest.mark.parametrize("granularity", ["token", "sample"])
@pytest.mark.parametrize("stages", [1, 3])
def test_a_layer_is_that_of_the_reference(
    granularity: Literal["token", "sample"], stages: int, device: str
) -> None:
    wanted, found = (
        run(backend, granularity, stages, device) for backend in ("reference", "triton")
    )
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_a_whole_training_step_never_waits_for_the_device(
    granularity: Literal["token", "sample"],
) -> None:
    torch.manual_seed(0)
    model = Attention().to("cuda", torch.bfloat16)
    targets = ["to_k", "to_v"]
    weave = prw.weave(model, prw.Config(target_modules=targets, rank=16, granularity=granularity))
    for stage in ("one", "two"):
        weave.unlock(stage)
    optimizer = torch.optim.AdamW(weave.parameters(), lr=1e-3, foreach=True)
    x = torch.randn(4, 64, 48, device="cuda", dtype=torch.bfloat16)

    def step() -> None:
        with weave.record() as routing:
            loss = model(x).float().square().mean()
        loss = loss + prw.veteran_gate_loss(routing, density=0.8, weight=0.5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # compiles, and makes the optimizer's state
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
