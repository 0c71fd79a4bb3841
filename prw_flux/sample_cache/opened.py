"""The tables of a cache that a run trains from: all of them complete, or none."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final

from prw_flux.config import RunConfig
from prw_flux.data.choose import open_run_data
from prw_flux.sample_cache.errors import CacheError
from prw_flux.sample_cache.identity import Identity, encoder_digests, identity
from prw_flux.sample_cache.table import Table, tables
from prw_flux.sample_cache.wanted import Wanted, wanted
from prw_flux.tasks import Task

DRAWING: Final = {"task", "seed", "size", "count"}
"""What decides which samples of the same data the digest of an identity has."""
TOLD: Final = {"encoder": "coredi.encoder", "features": "a coredi.encoder whose files are"}
"""What users call a field, where it is not its name."""


def open_tables(
    config: RunConfig, tasks: Sequence[Task], finished: Collection[str] = ()
) -> dict[str, Table]:
    """The encoded samples of every stage that is to be trained, by its name.

    Those that it holds out are there as well, under `draws.held_out_stage`.

    Args:
        config: with `data.cache`.
        tasks: of its stages.
        finished: stages that need none.

    Raises:
        CacheError: samples are missing; says how many, what the cache has instead, and how to make
            them.
        ConfigError: nothing of its data is held out.
    """
    assert config.data.cache is not None
    cache = Path(config.data.cache)
    data = open_run_data(config)
    encoders, there = encoder_digests(config), tables(cache)
    found: dict[str, Table] = {}
    lacking: list[tuple[Wanted, str]] = []
    for one in wanted(config, data, tasks, finished):
        asked, _ = identity(config, one, encoders)
        same = [table for table in there if not asked.differences(table.identity)]
        if not same:
            lacking.append((one, _absent(asked, one.told, there)))
            continue
        best = min(same, key=Table.missing)
        if missing := best.missing():
            lacking.append((one, f"{missing:,} of {one.count:,} {one.told}"))
            continue
        found[one.draws.stage] = Table(
            cache, best.identity, one.draws.task.sentence, features=config.coredi.enabled
        )
    if lacking:
        held_out = all(one.held_out for one, _ in lacking)
        without = ", or go without (held_out.samples=0 and sample_every=0)" if held_out else ""
        raise CacheError(
            f"{cache} lacks {', '.join(told for _, told in lacking)}; make them with `prw-flux "
            f"cache build {config.recipe or 'RECIPE'} --set data.cache={cache}` and every other "
            f"--set, --photos and --only of this run{without}"
        )
    return found


def _absent(asked: Identity, what: str, there: Sequence[Table]) -> str:
    """How many samples are missing, and in what the most similar ones that are there differ."""
    told = f"all {asked.count:,} {what}"
    other = [asked.differences(t.identity) for t in there if t.identity.stage == asked.stage]
    if not other:
        return told
    nearest = min(other, key=len)
    if nearest.keys() & DRAWING:  # then other samples are looked at, and the data look different
        nearest.pop("data", None)
    parts = (
        f"{TOLD.get(name, name)} {_short(theirs, name)}, not {_short(ours, name)}"
        for name, (ours, theirs) in nearest.items()
    )
    return f"{told} (it has some with {'; '.join(parts)})"


def _short(value: Any, name: str) -> str:
    text = str(value) or ("none" if name == "encoder" else "unknown")
    return text[:12] if len(text) == 32 else text
