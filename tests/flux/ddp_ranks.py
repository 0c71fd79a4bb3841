"""What two gloo ranks check of training under DDP; `test_training_ranks` starts them.

Each compares with one process that has the whole batch, in fp64, and writes what went wrong, or
nothing, to ``<checkpointing>-<rank>.txt``.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from two_processes import report

import prw
import prw.distributed
from prw_flux import PRWAdapter, TwoPass
from prw_flux.encode import position_ids

DRAWS = 2
# sums of some hundred products in fp64, in two orders
CLOSE = {"rtol": 1e-9, "atol": 1e-13}


def build(checkpointing: bool) -> TwoPass:
    """The same on every rank: a veteran and a newest expert, without router noise.

    Noise is a hash of the row's number, which starts at 0 on each rank.
    """
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16,
        guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    adapter = PRWAdapter.for_transformer(transformer, rank=4, noise=False)
    for name in ("one", "two"):
        adapter.weave.unlock(name)
        for parameter in adapter.weave.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    module = TwoPass(nn.Module.to(transformer, torch.float64), adapter.double())
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    return module.train()


def batch(rank: int | None = None) -> dict[str, Tensor]:
    """Four sources with two noisy latents each, or the half of a rank."""
    draw = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    whole = {
        "noisy_BNC": normal(4 * DRAWS, 4, 64),
        "text_BLE": normal(4 * DRAWS, 5, 32),
        "pooled_BP": normal(4 * DRAWS, 16),
        "timestep_B": torch.linspace(0.1, 0.9, 4 * DRAWS, dtype=torch.float64),
        "source_BSC": normal(4, 6, 64),
    }
    mine = whole if rank is None else {k: v.chunk(2)[rank] for k, v in whole.items()}
    return mine | {
        "noisy_ids_N3": position_ids(2, 2, dtype=torch.float64),
        "source_ids_S3": position_ids(2, 3, dtype=torch.float64),
        "source_pooled_BP": torch.ones(1, 16, dtype=torch.float64),
    }


def backward(model: nn.Module, weave: Any, given: dict[str, Tensor]) -> None:
    """One forward of the module, one backward of both losses."""
    for parameter in weave.parameters():
        parameter.grad = None
    with weave.record(key=1) as record:
        loss = model(**given, call=record).square().mean()
    (loss + prw.veteran_gate_loss(record, 0.8, 0.5)).backward()


def check(checkpointing: bool, rank: int, _folder: Path) -> None:
    module, whole = build(checkpointing), build(checkpointing)
    model = DistributedDataParallel(module)
    for _ in range(2):  # the second forward fails where a parameter of the first was not reduced
        backward(model, module.adapter.weave, batch(rank))
    ranks, prw.losses.ranks = prw.losses.ranks, lambda: 1
    averaging, prw.distributed.ranks = prw.distributed.ranks, lambda: 1
    try:
        backward(whole, whole.adapter.weave, batch())
    finally:
        prw.losses.ranks, prw.distributed.ranks = ranks, averaging
    wanted = dict(whole.adapter.weave.named_parameters())
    found = dict(module.adapter.weave.named_parameters())
    assert list(found) == list(wanted)
    for name, parameter in wanted.items():
        assert found[name].grad is not None and parameter.grad is not None, name
        torch.testing.assert_close(found[name].grad, parameter.grad, **CLOSE, msg=name)
    assert max(float(p.grad.abs().max()) for p in wanted.values() if p.grad is not None) > 1e-4


if __name__ == "__main__":
    report({"False": partial(check, False), "True": partial(check, True)})
