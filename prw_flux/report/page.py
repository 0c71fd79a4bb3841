"""One HTML file from a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from pathlib import Path

from prw_flux.report import sections
from prw_flux.report.benchmarks import benchmarks
from prw_flux.report.comparison import comparison
from prw_flux.report.facts import Facts, read_facts
from prw_flux.report.pictures import failures, samples
from prw_flux.report.text import count, duration
from prw_flux.rundir import write_atomically

NAME = "report.html"
SECTIONS = (
    ("Comparison", "comparison", comparison),
    ("Samples", "samples", samples),
    ("Failures", "failures", failures),
    ("Benchmarks", "benchmarks", benchmarks),
    ("Training", "training", sections.training),
    ("What was drawn", "drawn", sections.drawn),
    ("Routing", "routing", sections.routing),
    ("Forgetting", "forgetting", sections.forgetting),
    ("Cost", "cost", sections.cost),
    ("Configuration", "configuration", sections.configuration),
)
OPTIONAL = ("Failures", "Benchmarks")
"""Sections that a complete run may lack."""


def write_report(run: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a run, finished or not: text, style and pictures in one file.

    Args:
        run: the run folder.
        out: the file; None is report.html in the run folder.

    Returns:
        The file's path.

    Raises:
        RunError: the folder is not a run.
    """
    facts = read_facts(run)
    path = facts.path / NAME if out is None else Path(out)
    write_atomically(path, render(facts))
    return path


def render(facts: Facts) -> str:
    """The whole page."""
    made = [(title, anchor, make(facts)) for title, anchor, make in SECTIONS]
    absent = [title for title, _, body in made if not body and title not in OPTIONAL]
    links = "".join(f'<a href="#{anchor}">{title}</a>' for title, anchor, body in made if body)
    style = files("prw_flux.report").joinpath("style.css").read_text("utf-8")
    name = escape(facts.path.resolve().name)
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>PRW run {name}</title><style>{style}</style></head>\n<body><main>"
        f"{header(facts)}<nav>{links}</nav>{notice(facts, absent)}"
        + "\n".join(body for _, _, body in made)
        + f"<footer>Written {written} from {escape(str(facts.path))}.</footer></main>"
        + "</body></html>\n"
    )


def header(facts: Facts) -> str:
    """What was run, when, and how far it got."""
    config, done = facts.config, facts.done
    recipe = f"recipe {config.recipe}" if config.recipe else "own configuration"
    tasks = ", ".join(stage.name for stage in facts.stages)
    experts = [stage.parameters for stage in facts.stages if stage.parameters is not None]
    n = ""
    if facts.evaluation:
        n = str(max(task["n"] for task in facts.evaluation["tasks"].values()))
    entries = (
        ("stages finished", f"{len(done)} of {len(facts.stages)}"),
        ("training time", duration(sum(stage.seconds or 0.0 for stage in facts.stages)) or "0 s"),
        ("pictures", f"{config.size} × {config.size} px"),
        ("expert rank", f"{config.adapter.rank}"),
        ("expert parameters", count(sum(experts)) if experts else "none yet"),
        ("held-out samples", f"{n} per task" if n else "not yet"),
    )
    cells = "".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in entries)
    base = facts.index["base"]
    revision = f" at {base['revision']}" if base.get("revision") else ""
    versions = ", ".join(f"{k} {v}" for k, v in facts.index.get("versions", {}).items())
    return (
        f"<header><h1>{escape(facts.path.resolve().name)}</h1>"
        f'<p class="lead">Progressive Representation Weaving, {escape(recipe)}: {escape(tasks)}. '
        f"Base {escape(str(base['path']))}{escape(revision)}, data {escape(config.data.source)}, "
        f"seed {config.seed}. Last change {facts.changed:%Y-%m-%d %H:%M} UTC, "
        f'{escape(versions)}.</p><dl class="facts">{cells}</dl></header>'
    )


def notice(facts: Facts, absent: Sequence[str]) -> str:
    """What the run has not reached yet; "" for a complete one."""
    told = []
    waiting = [stage.name for stage in facts.stages if not stage.done]
    if waiting:
        told.append(
            f"This run is not finished: {len(facts.done)} of {len(facts.stages)} stages are done, "
            f"{', '.join(waiting)} {'is' if len(waiting) == 1 else 'are'} still to come."
        )
    if absent:
        told.append(f"Not there yet: {', '.join(absent).lower()}.")
    if facts.evaluation and facts.evaluation["stages"] != [stage.name for stage in facts.done]:
        told.append("The evaluation is older than the last finished stage.")
    return f'<p class="note">{escape(" ".join(told))}</p>' if told else ""
