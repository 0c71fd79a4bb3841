"""The tables of a cache that a run trains from: all of them complete, or none."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from prw import ConfigError
from prw_flux.config import RunConfig
from prw_flux.curriculum import Stage
from prw_flux.data.choose import open_run_data
from prw_flux.draws import Draws
from prw_flux.sample_cache.build import require_no_features
from prw_flux.sample_cache.errors import CacheError
from prw_flux.sample_cache.identity import Identity, encoder_digests, identity
from prw_flux.sample_cache.table import Table, tables
from prw_flux.tasks import Task


def open_tables(
    config: RunConfig, tasks: Sequence[Task], finished: Collection[str] = ()
) -> dict[str, Table]:
    """The encoded samples of every stage that is to be trained, by its name.

    Args:
        config: with `data.cache`.
        tasks: of its stages.
        finished: stages that need none.

    Raises:
        CacheError: samples are missing; says how many, what the cache has instead, and how to make
            them.
        ConfigError: the run needs the pictures themselves.
    """
    require_no_features(config)
    if config.held_out.samples or config.sample_every:
        raise ConfigError(
            "held_out.samples and sample_every encode pictures, and a run with data.cache loads no "
            "encoders: set held_out.samples=0 and sample_every=0, or data.cache=none"
        )
    assert config.data.cache is not None
    cache = Path(config.data.cache)
    data = open_run_data(config)
    encoders, there = encoder_digests(config.base), tables(cache)
    found: dict[str, Table] = {}
    lacking: list[str] = []
    for stage, task in zip(config.stages, tasks, strict=True):
        if stage.name in finished:
            continue
        limit = config.data.max_rejected
        draws = Draws(data, task, stage=stage.name, seed=config.seed, max_rejected=limit)
        wanted, _ = identity(config, stage, draws, encoders)
        same = [table for table in there if not wanted.differences(table.identity)]
        if not same:
            lacking.append(_absent(wanted, stage, there))
        elif missing := same[0].missing():
            lacking.append(f"{missing:,} of {wanted.count:,} samples of stage {stage.name!r}")
        else:
            found[stage.name] = Table(cache, same[0].identity, task.sentence)
    if lacking:
        raise CacheError(
            f"{cache} lacks {', '.join(lacking)}; make them with the settings of this run: "
            f"prw-flux cache build {config.recipe or 'RECIPE'} --set data.cache={cache}"
        )
    return found


def _absent(wanted: Identity, stage: Stage, there: Sequence[Table]) -> str:
    """How many samples are missing, and in what the most similar ones that are there differ."""
    told = f"all {wanted.count:,} samples of stage {stage.name!r}"
    other = [wanted.differences(t.identity) for t in there if t.identity.stage == stage.name]
    if not other:
        return told
    nearest = min(other, key=len)
    parts = (
        f"{name} {_short(theirs)}, not {_short(ours)}" for name, (ours, theirs) in nearest.items()
    )
    return f"{told} (it has some with {'; '.join(parts)})"


def _short(value: Any) -> str:
    text = str(value) or "unknown"
    return text[:12] if len(text) == 32 else text
