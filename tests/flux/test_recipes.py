"""Recipes by name and by module, and what they promise."""

from __future__ import annotations

from pathlib import Path

import pytest

from prw import ConfigError
from prw_flux.config import RunConfig
from prw_flux.curriculum import PAPER
from prw_flux.recipes import RECIPES, demo, load_recipe, paper, shapes


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_is_complete(name: str) -> None:
    config = load_recipe(name)
    assert config.recipe == name
    assert RunConfig.from_json(config.to_json()) == config


def test_the_paper_recipe_is_the_paper() -> None:
    config = paper()
    assert config.stages == PAPER
    assert config.base.path == "black-forest-labs/FLUX.1-dev"
    assert (config.adapter.rank, config.adapter.alpha, config.size) == (128, 256.0, 512)
    assert (config.adapter.source_timestep, config.adapter.source_pooled) == ("current", "prompt")
    assert config.adapter.granularity == "sample"


@pytest.mark.parametrize("config", [demo(), shapes()], ids=["demo", "shapes"])
def test_short_recipes_keep_the_paper_order_and_losses(config: RunConfig) -> None:
    assert [(s.name, s.density, s.weight) for s in config.stages] == [
        (s.name, s.density, s.weight) for s in PAPER
    ]
    assert config.base.path == "tiny-flux"
    assert config.adapter.alpha == 2 * config.adapter.rank


def test_a_recipe_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_recipes.py").write_text(
        "from dataclasses import replace\nfrom prw_flux.recipes import demo\n"
        "def short():\n    return replace(demo(), recipe='')\n"
        "def wrong():\n    return 3\nvalue = 4\n"
    )
    assert load_recipe("own_recipes:short").recipe == "own_recipes:short"
    for spec, said in [
        ("own_recipes:wrong", "returned a int, not a RunConfig"),
        ("own_recipes:value", "is a int, not a function"),
        ("own_recipes:gone", "own_recipes has no 'gone'"),
        ("no_such_module:x", "cannot import 'no_such_module'"),
    ]:
        with pytest.raises(ConfigError, match=said):
            load_recipe(spec)


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'shapes'"):
        load_recipe("shaps")
    with pytest.raises(ConfigError, match="there are: demo, .*one_h200, paper"):
        load_recipe("zzz")
