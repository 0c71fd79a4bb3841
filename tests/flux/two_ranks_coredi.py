"""What two gloo processes check of the projection; `test_coredi_ranks` starts them.

Each rank holds its part of a batch, of different sizes; the mean of the ranks' weighted losses and
gradients must be what one process with the whole batch has, in fp64.
"""

from __future__ import annotations

import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from prw_flux.coredi import Projection, covariance, effective_rank

# Sums of some dozens of products in fp64, in two orders.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def projected(seen: Tensor) -> tuple[Projection, Tensor, Tensor, Tensor]:
    """A projection, its output for `seen`, its covariance loss and its effective rank."""
    projection = Projection(6, 3).double()
    projection.fit(seen)
    with torch.no_grad():
        projection.weight_DK.add_(torch.linspace(0, 0.5, 18).view(6, 3).double())
    z = projection(seen)
    return projection, z, covariance(z), effective_rank(z)


def check(rank: int, folder: Path) -> None:
    """One process first; then its part of the batch, beside the other rank."""
    draw = torch.Generator().manual_seed(0)
    whole = torch.randn(5, 2, 2, 6, generator=draw).double()
    target = torch.randn(5, 2, 2, 3, generator=draw).double()
    alone, wanted, spread, wanted_rank = projected(whole)
    ((wanted - target).pow(3).sum() + spread).backward()

    dist.init_process_group(
        "gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    part = slice(0, 2) if rank == 0 else slice(2, 5)
    ours, z, spread, rank_found = projected(whole[part])
    ((z - target[part]).pow(3).sum() + 0.5 * spread).backward()
    gradient = ours.weight_DK.grad
    assert gradient is not None
    dist.all_reduce(gradient)
    torch.testing.assert_close(ours.std_D, alone.std_D, **CLOSE)
    torch.testing.assert_close(z.detach(), wanted.detach()[part], **CLOSE)
    torch.testing.assert_close(gradient, alone.weight_DK.grad, **CLOSE)
    torch.testing.assert_close(rank_found, wanted_rank, **CLOSE)
    torch.testing.assert_close(ours.running_mean_K, alone.running_mean_K, **CLOSE)
    torch.testing.assert_close(ours.running_var_K, alone.running_var_K, **CLOSE)
    dist.barrier()
    dist.destroy_process_group()


def main(rank: int, folder: Path) -> None:
    """Write what went wrong, or nothing."""
    torch.set_num_threads(1)
    problem = ""
    try:
        check(rank, folder)
    except Exception:
        problem = traceback.format_exc()
    (folder / f"coredi-{rank}.txt").write_text(problem, encoding="utf-8")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
