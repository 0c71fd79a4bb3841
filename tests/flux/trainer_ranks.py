"""What two gloo ranks check of the trainer; `test_trainer_ranks` starts them, one process compares.

The folder holds ``config.json``, ``wanted.safetensors`` (gradients of one process) and ``run``,
which one process has begun and which is to go on.
"""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from two_processes import report

from prw_flux.config import RunConfig
from prw_flux.coredi import FunctionEncoder
from prw_flux.interrupt import Interrupted, Stop
from prw_flux.progress import Quiet
from prw_flux.ranks import Ranks
from prw_flux.resume import Position, adapter_to_continue
from prw_flux.rundir import RunFolder
from prw_flux.session import open_session
from prw_flux.trainer import Trainer, open_training_data, train

STOP_AT = ("control", 1)
FEATURES = ["coredi.enabled=true", "coredi.encoder=flux.trainer_ranks:encoder",
            "coredi.channels=3", "coredi.drop=0.3", "coredi.similarity=0.2"]  # fmt: skip


def encoder() -> FunctionEncoder:
    """Ten fixed functions of the colours of a place."""

    def maps(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        pooled = torch.nn.functional.adaptive_avg_pool2d(pixels, grid)
        weight = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
        return torch.einsum("dc,bcrk->bdrk", weight, pooled).sin()

    return FunctionEncoder(maps, 10)


def gradients_of(config: RunConfig, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """By name, those of the second stage's first step, and its losses."""
    session = open_session(config)
    data = open_training_data(config, session)
    if not ranks.once(folder.exists):
        ranks.once(lambda: RunFolder.create(folder, config).path)
    run = RunFolder.open(folder)
    assert run.config == config
    trainer = Trainer(run, session, data, Quiet(), Stop(), ranks)
    for stage in config.stages[:2]:
        trainer._unlock(stage)
    for name, parameter in session.adapter.weave.named_parameters():
        parameter.data.add_(0.1 * len(name) ** -0.5)  # no B and no column stays zero
    samples = trainer._samples(1, Position())
    learning = dict(session.adapter.weave.named_parameters())
    if session.coredi is not None:
        trainer._begin_features(samples)
        trainer.learners.spread(ranks)
        learning |= {n: p for n, p in session.coredi.named_parameters() if p.requires_grad}
    loss = trainer._gradients(samples, config.stages[1], 0)
    found = {name: p.grad.clone() for name, p in learning.items() if p.grad is not None}
    assert found.keys() == learning.keys()
    usage = loss.total.new_tensor(trainer.objective.usage(loss.records))
    quiet = trainer.objective.usage([trainer.objective.quiet(samples, config.stages[1], 0)])
    return found | {"loss": loss.flow, "gate": loss.gate, "total": loss.total, "usage": usage,
                    "quiet": usage.new_tensor(quiet)}  # fmt: skip


def gradients(ranks: Ranks, folder: Path) -> None:
    """Those of one process, with dropout, several draws, router noise and the veteran gate."""
    config = RunConfig.from_json((folder / "config.json").read_text())
    wanted = load_file(folder / "wanted.safetensors")
    for accumulate in (1, 2):
        split = config.with_settings([f"accumulate={accumulate}"])
        found = gradients_of(split, ranks, folder / f"gradients-{accumulate}")
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=f"{name}, {accumulate}")


def features(ranks: Ranks, folder: Path) -> None:
    """With a feature stream, whose statistics are those of the whole batch."""
    config = RunConfig.from_json((folder / "config.json").read_text()).with_settings(FEATURES)
    wanted = load_file(folder / "wanted-features.safetensors")
    for accumulate in (1, 2):
        split = config.with_settings([f"accumulate={accumulate}"])
        found = gradients_of(split, ranks, folder / f"features-{accumulate}")
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=f"{name}, {accumulate}")


class Signals(Quiet):
    """Only one rank is told to stop."""

    def __init__(self, rank: int) -> None:
        self.rank, self.stage = rank, ""

    def begin(self, number: int, total: int, stage: Any) -> None:
        self.stage = stage.name

    def stepped(self, done: int) -> None:
        if (self.stage, done) == STOP_AT and self.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


class Impatient(Quiet):
    """One rank is told to stop while samples are encoded."""

    def __init__(self, rank: int) -> None:
        self.rank, self.told = rank, list[int]()

    def encoded(self, done: int, total: int) -> None:
        self.told.append(done)
        if self.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def preparing(ranks: Ranks, folder: Path) -> None:
    """A signal ends the encoding of both ranks after the samples in hand; nothing is trained."""
    config = RunConfig.from_json((folder / "config.json").read_text())
    config = config.with_settings(["data.samples=140"])
    path = ranks.once(lambda: RunFolder.create(folder / "preparing", config).path)
    session, progress = open_session(config), Impatient(ranks.index)
    data = open_training_data(config, session)
    try:
        with Stop() as stop:
            train(RunFolder.open(path), session, data, progress=progress, stop=stop, ranks=ranks)
    except Interrupted as stopped:
        assert stopped.status == 143
    else:
        raise AssertionError("nobody stopped")
    assert progress.told == [0] and not RunFolder.open(path).states.paths()


def resumed(ranks: Ranks, folder: Path) -> None:
    """Goes on where one process stopped, and stops in turn."""
    run = RunFolder.open(folder / "run")
    session = open_session(run.config, ranks.once(lambda: adapter_to_continue(run)))
    data = open_training_data(run.config, session)
    try:
        with Stop() as stop:
            train(run, session, data, progress=Signals(ranks.index), stop=stop, ranks=ranks)
    except Interrupted as stopped:
        assert stopped.status == 143
    else:
        raise AssertionError("nobody stopped")
    mine = {name: p.detach().sum().item() for name, p in session.adapter.named_parameters()}
    theirs, ours = ranks.gathered(mine)
    assert ours == theirs, "the ranks' weights differ"


def sharded(ranks: Ranks, folder: Path) -> None:
    """The base spread over both ranks by FSDP2; a stage then ends with the same routers on both."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    config = RunConfig.from_json((folder / "config.json").read_text())
    split = config.with_settings(["checkpointing=true", "accumulate=2"])
    wanted = load_file(folder / "wanted.safetensors")
    found = gradients_of(split, ranks, folder / "gradients-sharded")
    for name, value in wanted.items():
        assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
    with_features = config.with_settings([*FEATURES, "checkpointing=true"])
    wanted = load_file(folder / "wanted-features.safetensors")
    found = gradients_of(with_features, ranks, folder / "features-sharded")
    for name, value in wanted.items():
        assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)
    run = ranks.once(lambda: RunFolder.create(folder / "sharded", split).path)
    session = open_session(split)
    base = list(session.passes.transformer.parameters())
    assert all(isinstance(p, DTensor) for p in base)
    here = sum(p.to_local().numel() for p in base)
    assert here < 0.55 * sum(p.numel() for p in base)
    train(RunFolder.open(run), session, open_training_data(split, session), ranks=ranks)
    mine = {name: p.detach().sum().item() for name, p in session.adapter.named_parameters()}
    theirs, ours = ranks.gathered(mine)
    assert ours == theirs, "the ranks' weights differ"
    memory = [p.columns.memory(2) for p in session.adapter.weave.pools.values()]
    assert all(len(rows) == 6 for rows in memory)


def ahead(ranks: Ranks, folder: Path) -> None:
    """A thread of each rank makes its part of the next batches: the bits of none doing so."""
    config = RunConfig.from_json((folder / "config.json").read_text()).with_settings(
        ["data.samples=none", "accumulate=2", "held_out.samples=0", "sample_every=0"]
    )
    found = []
    for depth in (0, 2):
        one = replace(config, stages=config.stages[:1]).with_settings([f"data.prefetch={depth}"])
        create = partial(RunFolder.create, folder / f"ahead-{depth}", one)
        path = ranks.once(lambda create=create: create().path)
        session = open_session(one)
        train(RunFolder.open(path), session, open_training_data(one, session), ranks=ranks)
        found.append({name: p.detach() for name, p in session.adapter.named_parameters()})
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def with_ranks(check: Any) -> Any:
    """A scenario that is given the ranks."""

    def run(rank: int, folder: Path) -> None:
        check(Ranks(rank, 2, dist.new_group(backend="gloo")), folder)

    return run


if __name__ == "__main__":
    checks = {"gradients": gradients, "features": features, "preparing": preparing,
              "resumed": resumed, "ahead": ahead, "sharded": sharded}  # fmt: skip
    report({name: with_ranks(check) for name, check in checks.items()})
