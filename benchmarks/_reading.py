"""What the data benchmark reads: pictures on disk, a cache of them, an index of twenty million."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from prw_flux.batch_order import batch_indices
from prw_flux.data.build import build
from prw_flux.data.row_checks import encode
from prw_flux.data.rows import Picture, Record
from prw_flux.data.sample_order import Part, SampleOrder
from prw_flux.draws import Draws
from prw_flux.shapeweave.source import ShapeWeave
from prw_flux.tasks import TASKS, Example

INDEX, RESUMED, BATCH = 20_000_000, 10_000_000, 256


class Twins:
    """A reader of editing pairs drawn from ShapeWeave."""

    inputs: tuple[Path, ...] = ()
    listed = ""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.drawn = count, ShapeWeave(size=size, seed=0)

    def __len__(self) -> int:
        return self.count

    def records(self, start: int = 0) -> Any:
        """The pairs from number `start` on."""
        for index in range(start, self.count):
            pair = self.drawn.example("edit", index).edit
            assert pair is not None
            yield Record(
                where=f"pair {index}",
                key=f"pair-{index}",
                text=pair.text,
                source=Picture(name="source", data=encode(pair.source)),
                target=Picture(name="target", data=encode(pair.target)),
            )


def written(folder: Path, count: int, size: int) -> Path:
    """A built data set of editing pairs."""
    build(Twins(count, size), "edit", folder, made_from={"kind": "benchmark"})
    return folder


def opened(folder: Path) -> Any:
    """Its rows as training opens them."""
    from datasets import load_dataset

    files = sorted(str(path) for path in (folder / "data").glob("*.parquet"))
    cache = str(folder / "arrow")
    return load_dataset("parquet", data_files=files, split="train", cache_dir=cache).with_format(
        "arrow"
    )


class Enormous(ShapeWeave):
    """Twenty million samples in the order of a mixture of three parts."""

    def __init__(self) -> None:
        super().__init__(size=64, seed=0)
        parts = [("a", 0.5, 2), ("b", 0.3, 1), ("c", 0.2, 1)]
        self.order = SampleOrder(
            [Part(name=n, size=int(s * INDEX), weight=w) for n, s, w in parts], seed=0
        )

    def example(self, task: str, index: int) -> Example:
        """Example of the sample that the order has at `index`."""
        picks = self.order.at([index])
        return super().example(task, int(picks.part_N[0]) * INDEX + int(picks.sample_N[0]))


def resume() -> dict[str, float]:
    """Seconds to the first batch at sample 10,000,000, and the largest memory of this process.

    "streaming" draws it as a run with data.samples=none does, "shuffled" finds the samples of a
    step of a run with data.samples=20,000,000; imports are not in the seconds, but in the memory.
    """
    started = time.process_time()
    draws = Draws(Enormous(), TASKS["inpaint"], stage="inpaint", seed=0)
    drawn = [draws.triple(RESUMED + place) for place in range(BATCH)]
    streaming = time.process_time() - started
    assert len(drawn) == BATCH
    streaming_mib = memory_mib()
    started = time.process_time()
    chosen = batch_indices(0, "inpaint", RESUMED // BATCH, BATCH, INDEX)
    shuffled = time.process_time() - started
    assert len(set(chosen)) == BATCH and max(chosen) < INDEX
    return {
        "streaming_s": round(streaming, 3),
        "streaming_MiB": streaming_mib,
        "shuffled_s": round(shuffled, 3),
        "shuffled_MiB": memory_mib(),
    }


def memory_mib() -> int:
    """Largest memory of this process so far; getrusage would count that of its parent."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    (peak,) = [line for line in lines if line.startswith("VmHWM:")]
    return int(peak.split()[1]) >> 10


def resumed() -> dict[str, float]:
    """`resume` in a fresh process."""
    code = "import json; from benchmarks._reading import resume; print(json.dumps(resume()))"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parent.parent, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    found: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return found


def shuffled(count: int) -> list[int]:
    """0 to count - 1 at random."""
    return [int(index) for index in np.random.default_rng(0).permutation(count)]
