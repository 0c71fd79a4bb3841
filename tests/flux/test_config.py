"""RunConfig: JSON round trip, --set, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prw import ConfigError
from prw_flux.config import AdapterConfig, DataConfig, OptimizerConfig, RunConfig
from prw_flux.curriculum import Stage
from prw_flux.recipes import demo
from prw_flux.schema import keys

stages = st.builds(
    Stage,
    task=st.sampled_from(["inpaint", "edit", "my_tasks:Colourise"]),
    steps=st.integers(1, 10**6),
    batch_size=st.integers(1, 512),
    lr=st.floats(1e-8, 1.0),
    density=st.floats(0.0, 1.0),
    weight=st.floats(0.0, 10.0),
)
configs = st.builds(
    RunConfig,
    stages=st.lists(stages, min_size=1, max_size=4, unique_by=lambda stage: stage.name).map(tuple),
    size=st.integers(1, 64).map(lambda n: 16 * n),
    seed=st.integers(),
    precision=st.sampled_from(["fp32", "bf16"]),
    caption_dropout=st.floats(0.0, 1.0),
    source_dropout=st.floats(0.0, 1.0),
    time_shift=st.none() | st.floats(0.1, 10.0),
    data=st.builds(DataConfig, samples=st.none() | st.integers(1, 9), photos=st.none() | st.text()),
    adapter=st.builds(AdapterConfig, rank=st.integers(1, 256), noise=st.booleans()),
    optimizer=st.builds(OptimizerConfig, weight_decay=st.floats(0.0, 1.0)),
)


@given(configs)
def test_json_round_trip_is_exact(config: RunConfig) -> None:
    assert RunConfig.from_json(config.to_json()) == config


@given(configs, st.data())
def test_every_key_can_be_set_to_what_it_is(config: RunConfig, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(keys(config))))
    value: object = config.to_dict()
    for part in key.split("."):
        if isinstance(value, list):
            value = next(stage for stage in value if stage["name"] == part)
        else:
            assert isinstance(value, dict)
            value = value[part]
    text = value if isinstance(value, str) else json.dumps(value)
    if text not in ("none", "null", "None") and text == text.strip():
        assert config.with_settings([f"{key}={text}"]) == config


def test_set_reaches_every_level() -> None:
    changed = demo().with_settings(
        ["seed=7", "adapter.rank=8", "stages.edit.lr=1e-5", "stages.0.steps=9",
         "data.samples=none", "adapter.noise=off", "optimizer.betas=[0.8, 0.9]", "base.path=a=b"]
    )  # fmt: skip
    assert changed.seed == 7
    assert changed.adapter.rank == 8
    assert (changed.stages[4].lr, changed.stages[0].steps) == (1e-5, 9)
    assert changed.data.samples is None
    assert changed.adapter.noise is False
    assert changed.optimizer.betas == (0.8, 0.9)
    assert changed.base.path == "a=b"
    every = demo().with_settings(["stages.*.batch_size=3"])
    assert {stage.batch_size for stage in every.stages} == {3}


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("adapter.rnk=8", "no setting 'adapter.rnk'; did you mean 'adapter.rank'"),
        ("rank=8", "did you mean 'adapter.rank'"),
        ("stages.edt.lr=1", "did you mean 'stages.edit.lr'"),
        ("adapter=3", "'adapter'"),
        ("adapter.rank=many", "adapter.rank must be a whole number, got 'many'"),
        ("adapter.rank=2.5", "adapter.rank must be a whole number, got 2.5"),
        ("adapter.rank=true", "adapter.rank must be a whole number, got True"),
        ("adapter.noise=7", "adapter.noise must be true or false, got 7"),
        ("caption_dropout=x", "caption_dropout must be a number, got 'x'"),
        ("caption_dropout=2", "caption_dropout must lie in [0, 1], got 2"),
        ("source_dropout=-1", "source_dropout must lie in [0, 1], got -1"),
        ("draws=0", "draws must be at least 1, got 0"),
        ("precision=fp8", "precision must be one of fp32, bf16; got 'fp8'"),
        ("optimizer.betas=[1]", "betas must be two numbers"),
        ("stages.edit.steps=0", "steps must be at least 1, got 0"),
        ("stages=1", "stages must be a list, got 1"),
        ("size=97", "size must be a positive multiple of 16, got 97"),
        ("seed", "key=value, got 'seed'"),
    ],
)
def test_a_bad_setting_is_one_clear_sentence(assignment: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        demo().with_settings([assignment])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_draws_need_a_source_with_a_time_of_its_own() -> None:
    assert demo().with_settings(["draws=4"]).draws == 4
    with pytest.raises(ConfigError, match="draws=4 needs adapter.source_timestep 'zero'.*draws=1"):
        demo().with_settings(["draws=4", "adapter.source_timestep=current"])


def test_newer_and_damaged_data_is_refused() -> None:
    data = demo().to_dict()
    with pytest.raises(ConfigError, match="newer prw"):
        RunConfig.from_dict({**data, "schema_version": 99})
    with pytest.raises(ConfigError, match="schema_version must be a whole number"):
        RunConfig.from_dict({**data, "schema_version": None})
    with pytest.raises(ConfigError, match="did you mean 'seed'"):
        RunConfig.from_dict({**data, "sed": 1})
    with pytest.raises(ConfigError, match="adapter must hold fields, got 4"):
        RunConfig.from_dict({**data, "adapter": 4})
    with pytest.raises(ConfigError, match="size"):
        RunConfig.from_dict({k: v for k, v in data.items() if k != "size"})
    with pytest.raises(ConfigError, match="not valid JSON"):
        RunConfig.from_json("{")
    with pytest.raises(ConfigError, match="JSON object"):
        RunConfig.from_json("[]")


def test_configs_are_immutable_and_stages_differ_in_name() -> None:
    config = demo()
    with pytest.raises(FrozenInstanceError):
        config.seed = 3  # type: ignore[misc]
    with pytest.raises(ConfigError, match="named differently"):
        replace(config, stages=(config.stages[0], config.stages[0]))
    with pytest.raises(ConfigError, match="one or more"):
        replace(config, stages=())
