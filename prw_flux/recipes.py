"""Recipes: functions that return a complete `RunConfig`.

``demo``: five stages on the embedded base in minutes · ``shapes``: the same, long enough for real
quality · ``photos``: the tasks that plain photos can feed · ``photos_24gb``: the same on FLUX.1-dev
and a card of 24 GB · ``one_h200``: the paper's curriculum, a fiftieth of it · ``paper``: CoLoGen,
Table 1 · ``package.module:function``: the user's own.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final, TypeAlias

from prw import ConfigError
from prw.named_object import named_object
from prw_flux.config import (
    AdapterConfig,
    BaseConfig,
    DataConfig,
    EvaluationConfig,
    HeldOutConfig,
    OptimizerConfig,
    RunConfig,
)
from prw_flux.curriculum import PAPER, Stage, scaled

Recipe: TypeAlias = Callable[[], RunConfig]

_TINY_OPTIMIZER = OptimizerConfig(betas=(0.9, 0.98), weight_decay=0.0, warmup=30, decay="cosine")


def _steps(counts: Mapping[str, int], batch_size: int, lr: float) -> tuple[Stage, ...]:
    """The paper's stages, with densities and weights as they are, at another length."""
    stages = scaled(PAPER, batch_size=batch_size, lr=lr)
    return tuple(replace(s, steps=counts[s.name]) for s in stages if s.name in counts)


def demo() -> RunConfig:
    """Five stages on tiny-flux and ShapeWeave, less than ten minutes on two CPU cores."""
    counts = {"inpaint": 260, "ground": 260, "control": 300, "customise": 260, "edit": 320}
    return RunConfig(
        recipe="demo",
        stages=_steps(counts, batch_size=32, lr=1e-2),
        size=96,
        time_shift=3.0,
        data=DataConfig(samples=1200),
        adapter=AdapterConfig(rank=32, alpha=64),
        remember=128,
        optimizer=_TINY_OPTIMIZER,
        evaluation=EvaluationConfig(per_task=32, history=12, steps=12),
        held_out=HeldOutConfig(samples=16, every=50),
        log_every=10,
        save_every=100,
    )


def shapes() -> RunConfig:
    """The demo's curriculum, long enough for real quality on ShapeWeave."""
    counts = {"inpaint": 1200, "ground": 1500, "control": 1500, "customise": 1800, "edit": 4500}
    return replace(
        demo(),
        recipe="shapes",
        stages=_steps(counts, batch_size=32, lr=4e-3),
        data=DataConfig(samples=10_000),
        adapter=AdapterConfig(rank=64, alpha=128),
        evaluation=EvaluationConfig(per_task=128, history=64, steps=28),
        held_out=HeldOutConfig(samples=32, every=100),
        log_every=20,
        save_every=200,
    )


def photos() -> RunConfig:
    """What photos without annotations can feed, on tiny-flux: a start for one's own pictures."""
    counts = {"inpaint": 600, "control": 600, "edit": 600}
    return replace(
        demo(),
        recipe="photos",
        stages=_steps(counts, batch_size=32, lr=1e-2),
        data=DataConfig(source="photos", samples=1500),
        held_out=HeldOutConfig(),  # a single photo has no other to be held out
    )


def photos_24gb() -> RunConfig:
    """Photos without annotations on FLUX.1-dev, on one card of 24 GB: an nf4 base, one at a time.

    Samples are encoded before their stage, and the encoders then leave the card.
    """
    return RunConfig(
        recipe="photos_24gb",
        stages=tuple(
            replace(stage, steps=2000, batch_size=8)
            for stage in PAPER
            if stage.name in ("inpaint", "control", "edit")
        ),
        size=512,
        base=BaseConfig(path="black-forest-labs/FLUX.1-dev", quantisation="nf4"),
        data=DataConfig(source="photos", samples=2000),
        adapter=AdapterConfig(rank=32, alpha=64),
        optimizer=OptimizerConfig(warmup=100),
        accumulate=8,
        checkpointing=True,
        remember=64,
        evaluation=EvaluationConfig(per_task=16, history=0, steps=28),
        log_every=20,
        save_every=200,
    )


def one_h200() -> RunConfig:
    """The paper's five steps on FLUX.1-dev and one card of 141 GB: a fiftieth of its steps.

    With ``--set data.source=disk:DIR`` for all five tasks; photos alone feed three of them.
    """
    return RunConfig(
        recipe="one_h200",
        stages=scaled(PAPER, 0.02, batch_size=32),
        size=512,
        base=BaseConfig(path="black-forest-labs/FLUX.1-dev"),
        data=DataConfig(source="photos", samples=8000),
        adapter=AdapterConfig(rank=128, alpha=256),
        optimizer=OptimizerConfig(warmup=100),
        accumulate=2,
        checkpointing=True,
        remember=128,
        evaluation=EvaluationConfig(per_task=64, history=32, steps=28),
        log_every=20,
        save_every=500,
    )


def paper() -> RunConfig:
    """CoLoGen as published (arXiv 2602.22150): FLUX.1-dev, rank 128, 512 pixels, Table 1."""
    return RunConfig(
        recipe="paper",
        stages=PAPER,
        size=512,
        base=BaseConfig(path="black-forest-labs/FLUX.1-dev"),
        data=DataConfig(source="photos", samples=None),
        adapter=AdapterConfig(
            rank=128, alpha=256, source_timestep="current", source_pooled="prompt"
        ),
        evaluation=EvaluationConfig(per_task=64, history=32, steps=28),
        held_out=HeldOutConfig(samples=64, every=1000),
        log_every=50,
        save_every=1000,
    )


RECIPES: Final[Mapping[str, Recipe]] = MappingProxyType(
    {recipe.__name__: recipe for recipe in (demo, shapes, photos, photos_24gb, one_h200, paper)}
)


def load_recipe(spec: str) -> RunConfig:
    """The configuration of "demo", or of the user's "package.module:function".

    Raises:
        ConfigError: in one sentence, what is wrong with the name and what is near it.
    """
    if ":" not in spec:
        if spec in RECIPES:
            return RECIPES[spec]()
        near = difflib.get_close_matches(spec, RECIPES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(RECIPES)}"
        raise ConfigError(
            f"there is no recipe {spec!r}; {hint} One of your own is package.module:function"
        )
    recipe = named_object(spec, "recipe")
    if not callable(recipe):
        raise ConfigError(f"recipe {spec!r} is a {type(recipe).__name__}, not a function")
    config = recipe()
    if not isinstance(config, RunConfig):
        raise ConfigError(f"recipe {spec!r} returned a {type(config).__name__}, not a RunConfig")
    return config if config.recipe else replace(config, recipe=spec)
