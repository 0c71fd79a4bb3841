"""Compiles kernels for chips that are not there, and reports what they need of them.

Run as a program, it reads one `Build` per line from standard input, as JSON, and writes one report
per line. Every build runs in a process of its own, forked after the imports, because a failed
assertion of the compiler ends its process.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SHARED_MEMORY = {
    "sm_80": 166912,
    "sm_90": 232448,
    "sm_100": 232448,
    "gfx942": 65536,
    "sm_89": 101376,
    "sm_120": 101376,
}
"""Bytes that one program may have."""

PRODUCTS = ("wgmma.mma_async", "mma.sync", "tcgen05.mma", "v_mfma")
"""How products on tensor cores are called in PTX and in AMD's assembly."""


@dataclass(frozen=True, kw_only=True)
class Build:
    """One kernel, for one chip, with one tile.

    Attributes:
        kernel: ``package.module:function``.
        arch: a key of `SHARED_MEMORY`.
        args: the arguments before the keywords: the dtype of a tensor ("bf16"), a number, or None.
        meta: constants of the kernel, ``num_warps`` and ``num_stages``.
        products: which of `PRODUCTS` must be in the code; empty where there is no product.
        note: more of its name, where the rest is not all there is to tell it by.
    """

    kernel: str
    arch: str
    args: Sequence[Any]
    meta: dict[str, Any] = field(default_factory=dict)
    products: str = ""
    note: str = ""

    def __str__(self) -> str:
        meta = "-".join(f"{name.removeprefix('num_')}{value}" for name, value in self.meta.items())
        return f"{self.kernel.partition(':')[2]}{self.note}-{self.arch}-{meta}"


def reports(builds: Sequence[Build], *paths: Path) -> dict[str, dict[str, Any]]:
    """What compiling each of the builds gave, by its name; kernels are imported from `paths`."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, paths), *sys.path[1:]])
    lines = "".join(json.dumps(asdict(build)) + "\n" for build in builds)
    command = [sys.executable, __file__]
    done = subprocess.run(command, input=lines, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the compiling process failed:\n{done.stderr}")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {str(build): report for build, report in zip(builds, found, strict=True)}


SLOT = 16
"""Bytes of stack that are no spill: ptxas of Triton 3.7 keeps 8 or 16 with half the registers free,
that of 3.9 none."""


def complaints(build: Build, report: dict[str, Any]) -> list[str]:
    """What is wrong with a kernel, one sentence each; none where it may be shipped."""
    if "error" in report:
        return [f"does not compile: {report['error']}"]
    wrong = []
    if report["spills"] > SLOT:
        wrong.append(f"spills {report['spills']} bytes of registers")
    if report["shared"] > SHARED_MEMORY[build.arch]:
        limit = SHARED_MEMORY[build.arch]
        wrong.append(f"needs {report['shared']} bytes of shared memory, {build.arch} has {limit}")
    if report["scratch"]:
        wrong.append(f"needs {report['scratch']} bytes of global scratch memory")
    if build.products and not report["products"].get(build.products):
        wrong.append(f"has no {build.products}, but {report['products']}")
    return wrong


def main() -> None:
    """Read builds, write reports."""
    import torch  # noqa: F401  before the forks, which then need not import it
    import triton  # noqa: F401

    for line in sys.stdin.read().splitlines():
        sys.stdout.write(json.dumps(_forked(json.loads(line))) + "\n")
        sys.stdout.flush()


def _forked(build: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder, "report"), Path(folder, "log")
        child = os.fork()
        if child == 0:
            os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY), 2)
            os.dup2(2, 1)
            try:
                report = _report(build)
            except BaseException as error:
                report = {"error": f"{type(error).__name__}: {error}"[-2000:]}
            out.write_text(json.dumps(report))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if out.exists():
            found: dict[str, Any] = json.loads(out.read_text())
            return found
        return {"error": f"the compiler died with status {status}: {log.read_text()[-2000:]}"}


class _Absent:
    """What compiling asks of a driver, for a chip that is not there."""

    def __init__(self, arch: str) -> None:
        from triton.backends.compiler import GPUTarget

        if arch.startswith("sm_"):
            self.target = GPUTarget("cuda", int(arch[3:]), 32)
        else:
            self.target = GPUTarget("hip", arch, 64)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: object = None) -> int:
        return 0


def _report(build: dict[str, Any]) -> dict[str, Any]:
    import torch
    from triton.runtime import driver

    dtypes = {
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        "fp32": torch.float32,
        "i32": torch.int32,
        "i64": torch.int64,
    }
    module, _, name = build["kernel"].partition(":")
    kernel = getattr(importlib.import_module(module), name)
    driver.set_active(_Absent(build["arch"]))
    args = [dtypes.get(arg, arg) if isinstance(arg, str) else arg for arg in build["args"]]
    compiled = kernel.warmup(*args, grid=(1,), **build["meta"])
    text = compiled.asm["ptx" if "ptx" in compiled.asm else "amdgcn"]
    counts = {product: text.count(product) for product in PRODUCTS}
    needs = _nvidia(compiled.asm["cubin"]) if "cubin" in compiled.asm else _amd(text)
    return {
        **needs,
        "shared": compiled.metadata.shared,
        "scratch": getattr(compiled.metadata, "global_scratch_size", 0),
        "products": {product: count for product, count in counts.items() if count},
    }


def _nvidia(cubin: bytes) -> dict[str, int]:
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _output(tools / "cuobjdump", "--dump-resource-usage", file.name)
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
        assert found is not None, text
        registers, stack, local = map(int, found.groups())
        # A stack that no instruction stores to is an alignment, not a spill.
        stores = (stack or local) and "STL" in _output(tools / "nvdisasm", "-c", file.name)
    return {"registers": registers, "spills": max(stack, local) if stores else 0}


def _output(*command: object) -> str:
    return subprocess.run(map(str, command), capture_output=True, text=True, check=True).stdout


def _amd(text: str) -> dict[str, int]:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found is not None, name
        return int(found.group(1))

    return {"registers": number("vgpr_count"), "spills": 4 * number("vgpr_spill_count")}


if __name__ == "__main__":
    main()
