"""What loading an adapter costs, beside reading the same bytes: is it bound by the disk?

    python -m benchmarks.loading [--device cpu] [--quick] [--json FILE]

Five experts of FLUX.1-dev's width (57 blocks of 3072, rank 128, bf16), in a temporary folder that
needs twice their size:

``read``    the bytes of the folder's files
``plain``   `safetensors.torch.load_file` of them
``folder``  `PRWAdapter.from_pretrained`
``file``    `load_flat` of the same adapter as one file

Every page of what was loaded is touched, as a copy to a GPU would. Ours verify the sha256 of every
file. Cold asks the system to forget the files before each; warm has read all of them. Interleaved
medians, by the clock on the wall and by that of the process, which does not wait for the disk.
``--quick`` has rank 4. What was loaded must be what was saved, bit for bit: a wrong result has no
speed.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks._common import keep, machine, parser, spread
from benchmarks._flux import EXPERTS, RANKS, SIZES
from prw_flux import PRWAdapter
from prw_flux.digests import adapter_digest
from prw_flux.flat_file import load_flat, pack

PAGE = 4096


def main(arguments: list[str] | None = None) -> int:
    """Check, time, print; 1 where what was loaded is wrong."""
    found = parser("loading", __doc__ or "")
    args = found.parse_args(arguments)
    rank, rounds = (4, 1) if args.quick else (RANKS["full"], 5)
    adapter = experts(rank)
    with tempfile.TemporaryDirectory(prefix="prw-") as place:
        folder, file = Path(place) / "adapter", Path(place) / "adapter.safetensors"
        adapter.save_pretrained(folder)
        pack(folder, file)
        for loaded in (PRWAdapter.from_pretrained(folder), load_flat(file)):
            if adapter_digest(loaded) != adapter_digest(adapter):
                print("no times: what was loaded is not what was saved", file=sys.stderr)
                return 1
        parts = sorted(folder.rglob("*.safetensors"))
        seconds = timed(ways(folder, file, parts), [*parts, file], rounds)
        size = sum(part.stat().st_size for part in parts)
    result = {
        "benchmark": "loading",
        **machine("cpu"),
        "rank": rank,
        "experts": EXPERTS,
        "MiB": round(size / 2**20, 1),
        "rounds": rounds,
        "variants": {name: spread([wall for wall, _ in found]) for name, found in seconds.items()},
        "process": {name: spread([cpu for _, cpu in found]) for name, found in seconds.items()},
    }
    print(f"{EXPERTS} experts of rank {rank}, {result['MiB']} MiB, {rounds} rounds")
    for name, wall in result["variants"].items():
        print(f"{name:>12}  {wall['median_ms']:8.0f} ms, of the process "
              f"{result['process'][name]['median_ms']:8.0f} ms")  # fmt: skip
    keep(result, args.json)
    return 0


def experts(rank: int) -> PRWAdapter:
    """Random experts of FLUX.1-dev's width, as a trained adapter has them."""
    shape = SIZES["full"]
    width = shape["attention_head_dim"] * shape["num_attention_heads"]
    torch.manual_seed(0)
    adapter = PRWAdapter(shape["num_layers"], shape["num_single_layers"], width, rank=rank)
    for stage in range(EXPERTS):
        adapter.weave.unlock(f"stage-{stage}")
    adapter.weave.close()
    return adapter.to(torch.bfloat16)


def ways(folder: Path, file: Path, parts: list[Path]) -> dict[str, Callable[[], object]]:
    """What is timed; `parts` are the safetensors files of the folder."""
    return {
        "read": lambda: [_read(part) for part in parts],
        "plain": lambda: [_touch(load_file(part).values()) for part in parts],
        "folder": lambda: _touch(PRWAdapter.from_pretrained(folder).state_dict().values()),
        "file": lambda: _touch(load_flat(file).state_dict().values()),
    }


def timed(
    variants: dict[str, Callable[[], object]], files: list[Path], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Seconds on the wall and of the process, per variant cold and warm."""
    seconds: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for state in ("cold", "warm"):
            if state == "warm":
                for path in files:
                    _read(path)
            for name, way in variants.items():
                if state == "cold":
                    _forget(files)
                started = time.perf_counter(), time.process_time()
                way()
                took = time.perf_counter() - started[0], time.process_time() - started[1]
                seconds.setdefault(f"{name}, {state}", []).append(took)
    return seconds


def _read(path: Path) -> None:
    with path.open("rb") as file:
        while file.read(2**22):
            pass


def _touch(tensors: Iterable[Tensor]) -> int:
    """One byte of each page, which brings all of them into memory."""
    return sum(int(t.reshape(-1).view(torch.uint8)[::PAGE].sum()) for t in tensors if t.numel())


def _forget(paths: Iterable[Path]) -> None:
    """Drop the pages of files from the system's memory, where it can be asked to."""
    if sys.platform != "linux":
        return
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


if __name__ == "__main__":
    sys.exit(main())
