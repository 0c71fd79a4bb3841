"""A weave's whole life in any order of events, against a simple model of what must hold."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

import prw

SHAPE = (3, 5, 6)
X = torch.linspace(-2, 2, 3 * 5 * 6).sin().reshape(SHAPE)


class Net(nn.Module):
    """Two siblings that read one input, and a layer that is left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.to_k = nn.Linear(6, 6)
        self.to_v = nn.Linear(6, 4)
        self.out = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.to_v(x + torch.tanh(self.to_k(x)))))


def base() -> Net:
    torch.manual_seed(0)
    return Net()


@dataclass
class Closed:
    """What is known of a closed stage: what the model computed, and the expert's bytes."""

    name: str
    output: Tensor
    expert: list[Tensor] = field(repr=False)


class Life(RuleBasedStateMachine):
    """The model: a list of closed stages, whether one is open, and what the folder holds."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="prw-life-"))
        self.closed: list[Closed] = []
        self.open: str | None = None
        self.saved: tuple[list[Closed], str | None, Tensor] | None = None
        self.names = 0
        self.remembers = False

    @initialize(
        granularity=st.sampled_from(["token", "sample"]),
        share_router=st.sampled_from(["module", "parent"]),
        router_train=st.sampled_from(["all", "new"]),
        gate=st.sampled_from(["softmax", "one"]),
        noise=st.booleans(),
    )
    def begin(self, **fields: Any) -> None:
        self.config = prw.Config(target_modules=["to_k", "to_v"], rank=2, **fields)
        self.net = base()
        self.weave = prw.weave(self.net, self.config)
        self.untouched = [p.detach().clone() for p in base().parameters()]
        self.plain = base()(X)
        self.renew()

    def renew(self) -> None:
        """A new optimizer, as after an unload or a load into another model."""
        self.optimizer = torch.optim.AdamW(
            [nn.Parameter(torch.zeros(1))], lr=0.05, weight_decay=0.1
        )
        self.weave.sync(self.optimizer)

    def now(self) -> Tensor:
        """What the free route computes."""
        self.weave.call(noisy=False)
        with torch.no_grad():
            return self.net(X)

    def expert(self, index: int) -> list[Tensor]:
        pools = self.weave.pools.values()
        return [p.detach().clone() for pool in pools for p in pool.expert(index).parameters()]

    def finished(self) -> None:
        """The open stage has just been closed: from now on it may not change."""
        if self.open is not None:
            index = len(self.closed)
            with self.weave.at_stage(self.open), torch.no_grad():
                output = self.net(X)
            self.closed.append(Closed(self.open, output, self.expert(index)))
            self.open = None

    @rule()
    def unlock(self) -> None:
        if len(self.weave.stages) >= 5:
            return
        before = dict(self.weave.named_parameters())
        moments = self.moments(before)
        name = f"s{self.names}"
        self.names += 1
        self.weave.unlock(name)
        self.finished()
        self.open = name
        self.weave.sync(self.optimizer)
        self.survivors_keep(moments)

    def moments(self, parameters: dict[str, nn.Parameter]) -> dict[str, dict[str, Any]]:
        state = self.optimizer.state
        return {
            name: {key: torch.as_tensor(value).clone() for key, value in state[p].items()}
            for name, p in parameters.items()
            if p in state
        }

    def survivors_keep(self, moments: dict[str, dict[str, Any]]) -> None:
        learning = dict(self.weave.named_parameters())
        for name in moments.keys() & learning.keys():
            found = self.optimizer.state[learning[name]]
            for key, wanted in moments[name].items():
                assert torch.equal(torch.as_tensor(found[key]), wanted), f"{name}: {key} changed"

    @precondition(lambda self: self.open is not None)
    @rule(steps=st.integers(1, 2), veteran=st.booleans())
    def train(self, steps: int, veteran: bool) -> None:
        for step in range(steps):
            with self.weave.record(key=step) as record:
                loss = (self.net(X) - 1).square().mean()
            if veteran:
                loss = loss + prw.veteran_gate_loss(record, 0.8, 0.5)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    @rule()
    def close(self) -> None:
        before = self.now()
        self.weave.close()
        self.finished()
        self.weave.sync(self.optimizer)
        assert torch.equal(self.now(), before), "closing a stage changed the model"
        if self.closed:
            assert not self.optimizer.state, "a moment outlived its parameter"

    @precondition(lambda self: self.closed)
    @rule(which=st.integers(0, 9))
    def rollback(self, which: int) -> None:
        index = which % len(self.closed)
        self.weave.rollback(self.closed[index].name)
        self.weave.sync(self.optimizer)
        self.closed, self.open = self.closed[: index + 1], None
        assert torch.equal(self.now(), self.closed[-1].output)

    @rule()
    def save(self) -> None:
        self.weave.save(self.folder / "weave")
        self.saved = list(self.closed), self.open, self.now()

    @precondition(lambda self: self.saved is not None)
    @rule(anew=st.booleans())
    def load(self, anew: bool) -> None:
        assert self.saved is not None
        if anew:
            self.net = base()
            self.weave = prw.load(self.net, self.folder / "weave")
            self.renew()
        else:
            self.weave.load_state(self.folder / "weave")
            self.weave.sync(self.optimizer)
        closed, self.open, output = self.saved
        self.closed = list(closed)
        assert self.weave.newest == self.open
        assert torch.equal(self.now(), output), "loaded, but not what was saved"

    @precondition(lambda self: self.closed)
    @rule(which=st.integers(0, 9))
    def force(self, which: int) -> None:
        name = self.closed[which % len(self.closed)].name
        bound = self.weave.call(key=3)
        with self.weave.force_route(name), self.weave.record() as record, torch.no_grad():
            first, second = self.net(X), self.net(X)
        assert torch.equal(first, second)
        assert all(bool((group["gate"] == 1).all()) for group in record.by_group().values())
        index = [stage.name for stage in self.weave.stages].index(name)
        chosen = [group["expert"] for group in record.by_group().values()]
        assert all(bool((expert == index).all()) for expert in chosen)
        assert next(iter(self.weave.pools.values())).slot.call is bound

    @precondition(lambda self: self.closed and self.open is None)
    @rule()
    def consolidate(self) -> None:
        last = self.closed[-1]
        for stage in self.closed:
            with self.weave.remember(stage.name, rows=4), torch.no_grad():
                self.net(X)
        assert 0 <= self.weave.consolidate(iterations=5) <= 1
        # Consolidation is how the last stage ends; the earlier ones stay.
        with self.weave.at_stage(last.name), torch.no_grad():
            last_output = self.net(X)
        self.closed[-1] = Closed(last.name, last_output, last.expert)
        assert torch.equal(self.now(), last_output)

    @precondition(lambda self: self.closed and self.open is None and len(self.closed) < 5)
    @rule(which=st.integers(0, 9))
    def exchange(self, which: int) -> None:
        """An expert leaves as a LoRA, and the same LoRA joins as a stage of its own."""
        given = which % len(self.closed)
        self.weave.export_expert(self.closed[given].name, self.folder / "lora")
        name = f"s{self.names}"
        self.names += 1
        self.weave.import_expert(self.folder / "lora", name)
        self.weave.sync(self.optimizer)
        self.open = name
        self.finished()
        assert all(map(torch.equal, self.closed[-1].expert, self.closed[given].expert))
        with torch.no_grad():
            with self.weave.force_route(self.closed[given].name):
                wanted = self.net(X)
            with self.weave.force_route(name):
                assert torch.equal(self.net(X), wanted)

    @precondition(lambda self: self.closed)
    @rule(which=st.integers(0, 9))
    def rename(self, which: int) -> None:
        index = which % len(self.closed)
        name = f"s{self.names}"
        self.names += 1
        self.weave.rename(self.closed[index].name, name)
        self.closed[index] = replace(self.closed[index], name=name)

    @precondition(lambda self: self.open is not None)
    @rule()
    def freeze_the_newest(self) -> None:
        assert self.open is not None
        self.weave.freeze(self.open)
        self.weave.sync(self.optimizer)
        before = self.expert(len(self.closed))
        self.train(steps=1, veteran=True)
        assert all(map(torch.equal, self.expert(len(self.closed)), before)), "a frozen expert moved"

    @precondition(lambda self: self.closed and self.open is not None)
    @rule(which=st.integers(0, 9))
    def thaw_a_veteran(self, which: int) -> None:
        """It learns until the stage ends; what it was is gone, the stages before it keep theirs."""
        index = which % len(self.closed)
        self.weave.thaw(self.closed[index].name)
        self.weave.sync(self.optimizer)
        self.train(steps=1, veteran=False)
        self.weave.close()
        self.weave.sync(self.optimizer)
        self.finished()
        for later in range(index, len(self.closed)):
            stage = self.closed[later]
            with self.weave.at_stage(stage.name), torch.no_grad():
                self.closed[later] = replace(stage, output=self.net(X), expert=self.expert(later))

    @rule()
    def unload(self) -> None:
        """And weave the model again, from nothing or from the folder."""
        self.weave.unload()
        with torch.no_grad():
            assert torch.equal(self.net(X), self.plain), "unload left something behind"
        assert type(self.net.to_k) is nn.Linear
        if self.saved is not None:
            self.weave = prw.load(self.net, self.folder / "weave")
            self.closed, self.open = list(self.saved[0]), self.saved[1]
        else:
            self.weave = prw.weave(self.net, self.config)
            self.closed, self.open = [], None
        self.renew()

    @rule()
    def refuse(self) -> None:
        """Mistakes change nothing."""
        stages, output = self.weave.stages, self.now()
        with pytest.raises(prw.StageError, match="there is no stage"):
            self.weave.rollback("never")
        with pytest.raises(prw.StageError):
            self.weave.unlock(stages[0].name if stages else "a/b")
        assert self.weave.stages == stages and torch.equal(self.now(), output)

    @invariant()
    def stages_are_those_of_the_model(self) -> None:
        wanted = [(stage.name, False) for stage in self.closed]
        wanted += [] if self.open is None else [(self.open, True)]
        assert [(stage.name, stage.open) for stage in self.weave.stages] == wanted

    @invariant()
    def closed_stages_keep_their_bits(self) -> None:
        for index, stage in enumerate(self.closed):
            with self.weave.at_stage(stage.name), torch.no_grad():
                assert torch.equal(self.net(X), stage.output), f"{stage.name} computes otherwise"
            for now, then in zip(self.expert(index), stage.expert, strict=True):
                assert torch.equal(now, then), f"the expert of {stage.name} has moved"

    @invariant()
    def the_base_does_not_move(self) -> None:
        layers = (self.net.to_k, self.net.to_v, self.net.out)
        found = [p for layer in layers for p in (layer.weight, layer.bias)]
        assert all(map(torch.equal, found, self.untouched))

    @invariant()
    def the_optimizer_holds_what_learns(self) -> None:
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        learning = {id(p) for p in self.weave.parameters()}
        assert learning <= held and len(held) == len(learning) + 1

    def teardown(self) -> None:
        shutil.rmtree(self.folder)


Life.TestCase.settings = settings(
    max_examples=max(settings.default.max_examples // 4, 5),  # type: ignore[attr-defined]
    stateful_step_count=12,
)
TestLife = Life.TestCase
