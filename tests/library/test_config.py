"""Config validates itself, cannot be changed, and survives JSON."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

import prw

names = st.sampled_from(["all-linear", r".*\.(to_k|to_v)", "to_q", "é[0-9]+"])
configs = st.builds(
    prw.Config,
    target_modules=st.lists(st.text(min_size=1), max_size=3) | names,
    exclude_modules=st.lists(st.text(min_size=1), max_size=3) | names,
    rank=st.integers(1, 512),
    rank_pattern=st.dictionaries(names, st.integers(1, 512), max_size=3),
    alpha=st.none() | st.floats(0.01, 1e6),
    granularity=st.sampled_from(["token", "sample"]),
    share_router=st.sampled_from(["module", "parent"]),
    router_train=st.sampled_from(["all", "new"]),
    gate=st.sampled_from(["softmax", "one"]),
    noise=st.booleans(),
    new_column=st.sampled_from(["zero", "mean"]),
    backend=st.sampled_from(["auto", "reference", "cpu", "triton"]),
)


@given(configs)
def test_json_round_trip(config: prw.Config) -> None:
    assert prw.Config.from_json(config.to_json()) == config
    assert prw.Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_it_is_frozen_keyword_only_and_hashable() -> None:
    config = prw.Config(target_modules=["k"], rank=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 8  # type: ignore[misc]
    with pytest.raises(TypeError):
        prw.Config(["k"])  # type: ignore[misc]
    assert {config: 1}[prw.Config(target_modules=("k",), rank=4)] == 1


def test_the_rank_pattern_is_a_value() -> None:
    given = {"k": 4, "v": 2}
    config = prw.Config(rank_pattern=given)
    given["k"] = 5
    assert config.rank_pattern == {"k": 4, "v": 2} and len(config.rank_pattern) == 2
    with pytest.raises(TypeError):
        config.rank_pattern["k"] = 5  # type: ignore[index]
    for same in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert same == config and hash(same) == hash(config)
    assert list(config.to_dict()["rank_pattern"]) == ["k", "v"], "the order says which key counts"
    assert "{'k': 4, 'v': 2}" in repr(config)


def test_a_set_of_names_has_one_order() -> None:
    assert prw.Config(target_modules={"v", "k"}).target_modules == ("k", "v")  # type: ignore[arg-type]


def test_a_folder_from_before_these_fields_still_loads() -> None:
    data = prw.Config(target_modules=["k"]).to_dict()
    del data["exclude_modules"], data["rank_pattern"]
    assert prw.Config.from_dict(data) == prw.Config(target_modules=["k"])


def test_alpha_is_twice_the_rank_unless_given() -> None:
    assert prw.Config(rank=8).scaling == 2.0
    assert prw.Config(rank=8, alpha=4).scaling == 0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": "to_k("}, r"'to_k\(', which is no regular expression: missing \)"),
        ({"target_modules": ""}, "must not be an empty string"),
        ({"target_modules": 3}, "a list of names or a regular expression, got 3"),
        ({"exclude_modules": "*.k"}, r"a list of names or \* patterns may be meant, \['\*.k'\]"),
        ({"exclude_modules": [""]}, "exclude_modules must be non-empty"),
        ({"rank_pattern": ["k"]}, r"must map patterns to ranks, got \['k'\]"),
        ({"rank_pattern": {3: 4}}, "got the key 3"),
        ({"rank_pattern": {"k": 0}}, "at least 1, got 0 for 'k'"),
        ({"rank_pattern": {"k": True}}, "got True for 'k'"),
        ({"rank_pattern": {"[": 4}}, "no regular expression"),
        ({"target_modules": [""]}, "non-empty"),
        ({"target_modules": [3]}, "non-empty strings, got"),
        ({"rank": 0}, "at least 1, got 0"),
        ({"rank": 2.0}, "whole number"),
        ({"rank": True}, "whole number"),
        ({"alpha": 0}, "positive number, got 0"),
        ({"alpha": float("nan")}, "positive number"),
        ({"alpha": "8"}, "positive number"),
        ({"granularity": "tokens"}, "one of token, sample; got 'tokens'"),
        ({"backend": "cuda"}, "one of auto, reference, cpu, triton; got 'cuda'"),
        ({"noise": 1}, "True or False"),
    ],
)
def test_mistakes_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(prw.ConfigError, match=message):
        prw.Config(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema version 2.*install a newer prw"),
        ({"schema_version": "1"}, "whole number"),
        ({"ranks": 4}, "unknown field 'ranks'; did you mean 'rank'"),
        ({"rank": -1}, "at least 1"),
    ],
)
def test_unreadable_data_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(prw.ConfigError, match=message):
        prw.Config.from_dict({**prw.Config().to_dict(), **change})


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_text_that_is_no_json_object(text: str) -> None:
    with pytest.raises(prw.ConfigError, match="JSON"):
        prw.Config.from_json(text)


def test_errors_are_what_python_programmers_catch() -> None:
    ours = {prw.ConfigError: ValueError, prw.CheckpointError: ValueError}
    for error, builtin in {**ours, prw.StageError: RuntimeError}.items():
        assert issubclass(error, prw.PRWError) and issubclass(error, builtin)
