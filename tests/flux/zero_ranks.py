"""What two gloo ranks check of a base sharded by ZeRO-3; `test_zero` starts them.

The folder holds ``config.json``, the gradients of one process, and ``stopped``, a run that one
process has begun and that is to go on.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed.ops
import torch
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from diffusers import FluxTransformer2DModel
from flux.trainer_ranks import FEATURES, gradients_of, with_ranks
from safetensors.torch import load_file
from torch.testing import assert_close
from two_processes import report

from prw_flux.config import RunConfig
from prw_flux.progress import Quiet
from prw_flux.ranks import Ranks
from prw_flux.resume import adapter_to_continue
from prw_flux.rundir import RunFolder
from prw_flux.session import open_session
from prw_flux.trainer import open_training_data, train

ZERO = """{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0,
"stage3_max_live_parameters": 1, "stage3_max_reuse_distance": 1, "stage3_prefetch_bucket_size": 0},
"train_batch_size": "auto", "bf16": {"enabled": "auto"}}"""
"""Nothing stays gathered because the base is small."""

LINEAR = torch.nn.functional.linear


def gathered(transformer: FluxTransformer2DModel) -> Counter[str]:
    """Blocks that are whole on this rank, and how many of their numbers."""
    found: Counter[str] = Counter()
    for name, parameter in transformer.named_parameters():
        if parameter.numel():
            found[".".join(name.split(".")[:2])] += parameter.numel()
    return found


def sharded(config: RunConfig) -> Any:
    """A session whose base is in halves."""
    session = open_session(config)
    base = list(session.passes.transformer.parameters())
    assert not any(p.numel() for p in base)
    here, whole = sum(p.ds_tensor.numel() for p in base), sum(p.ds_numel for p in base)
    assert whole / 2 <= here < 0.51 * whole
    assert not any(hasattr(p, "ds_id") for p in session.adapter.parameters())
    assert torch.nn.functional.linear is LINEAR  # DeepSpeed may put in one of its own, for all
    return session


def gradients(ranks: Ranks, folder: Path) -> None:
    """Those of one process, in one and in two micro-batches, and with a feature stream.

    And those of two ranks that hold the whole base.
    """
    config = RunConfig.from_json((folder / "config.json").read_text())
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "false"
    whole = gradients_of(config, ranks, folder / "whole-ranks")
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    kinds = {"wanted": [], "wanted-twice": ["accumulate=2"], "wanted-features": FEATURES}
    for name, settings in kinds.items():
        kind = config.with_settings([*settings, "checkpointing=true"])
        wanted = load_file(folder / f"{name.replace('-twice', '')}.safetensors")
        found = gradients_of(kind, ranks, folder / f"zero-{name}")
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=f"{name}, {key}")
            if name == "wanted":
                assert_close(found[key], whole[key], rtol=1e-5, atol=1e-6, msg=key)


class Looks(Quiet):
    """How much of the base is whole after each step."""

    def __init__(self, transformer: FluxTransformer2DModel) -> None:
        self.transformer = transformer
        self.whole: list[Counter[str]] = []
        self.depth: list[int] = []

    def logged(self, line: Mapping[str, Any]) -> None:
        self.whole.append(gathered(self.transformer))
        self.depth.append(len(FWD_MODULE_STACK))


def run(ranks: Ranks, folder: Path) -> None:
    """All stages, with averages, pictures, held-out losses and consolidation."""
    config = RunConfig.from_json((folder / "config.json").read_text())
    config = config.with_settings(["checkpointing=true"])
    path = ranks.once(lambda: RunFolder.create(folder / "zero", config).path)
    session = sharded(config)
    looks = Looks(session.passes.transformer)
    data = open_training_data(config, session)
    train(RunFolder.open(path), session, data, progress=looks, ranks=ranks)
    assert looks.whole and all(not whole for whole in looks.whole), looks.whole
    assert len(set(looks.depth)) == 1, looks.depth
    mine = {name: p.detach().sum().item() for name, p in session.adapter.named_parameters()}
    theirs, ours = ranks.gathered(mine)
    assert ours == theirs, "the ranks' weights differ"
    memory = [p.columns.memory(2) for p in session.adapter.weave.pools.values()]
    assert all(len(rows) == 6 for rows in memory)


def resumed(ranks: Ranks, folder: Path) -> None:
    """Goes on where one process with a whole base stopped."""
    stopped = RunFolder.open(folder / "stopped")
    session = open_session(stopped.config, ranks.once(lambda: adapter_to_continue(stopped)))
    train(stopped, session, open_training_data(stopped.config, session), ranks=ranks)


if __name__ == "__main__":
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled here
    rank, made = sys.argv[1], Path(sys.argv[2])
    (made / "zero.json").write_text(ZERO)
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "LOCAL_RANK": rank, "WORLD_SIZE": "2",
                   "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(made / "zero.json")}  # fmt: skip
    checks = {"gradients": gradients, "run": run, "resumed": resumed}
    report({name: with_ranks(check) for name, check in checks.items()}, seconds=250)
