"""What was generated, as grids of source, output and target."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any, Final

from PIL import Image

from prw_flux.report.facts import Facts
from prw_flux.report.layout import section, title_of

LARGEST: Final = 256
"""Side in pixels above which a picture is scaled down before it is inlined."""


def samples(facts: Facts) -> str:
    """What was generated: source, output and target, by task; photos apart."""
    if not facts.samples:
        return ""
    entries: list[Mapping[str, Any]] = list(facts.samples["samples"])
    folder = facts.path / "samples"
    parts = []
    for task in dict.fromkeys(entry["task"] for entry in entries):
        for domain in ("scenes", "photos"):
            chosen = [e for e in entries if e["task"] == task and e["domain"] == domain]
            if not chosen:
                continue
            told = escape(str(facts.samples["photos"]))
            note = f' on photos <span class="tag">{told}</span>' if told else " on photos"
            figures = "".join(_sample(folder, entry) for entry in chosen)
            heading = escape(title_of(task)) + (note if domain == "photos" else "")
            parts.append(f'<h3>{heading}</h3><div class="samples">{figures}</div>')
    return section(
        "Samples",
        "samples",
        "Samples in the order of the data source, none chosen. Scenes are held out; of photos the "
        "heading says where they come from. The output is framed; the target is the exact answer. "
        "The number is the sample's score.",
        "".join(parts),
    )


def failures(facts: Facts) -> str:
    """The worst samples of every task by its metric."""
    entries = list(facts.samples["samples"]) if facts.samples else []
    folder = facts.path / "samples"
    parts: list[str] = []
    for task in dict.fromkeys(entry["task"] for entry in entries):
        chosen = [e for e in entries if e["task"] == task and e["domain"] == "worst"]
        if chosen:
            figures = "".join(_sample(folder, entry) for entry in chosen)
            parts.append(
                f"<details{'' if parts else ' open'}><summary>{escape(title_of(task))}: the worst "
                f'{len(chosen)}</summary><div class="samples">{figures}</div></details>'
            )
    if not parts:
        return ""
    return section(
        "Failures",
        "failures",
        "The held-out samples with the lowest score, worst first, by the adapter pinned to the "
        "stage that trained the task.",
        "".join(parts),
    )


def _sample(folder: Path, entry: Mapping[str, Any]) -> str:
    pictures = "".join(
        f'<div class="{role}"><img alt="{role}" src="{data_uri(folder / str(entry[role]))}">'
        f"<span>{role}</span></div>"
        for role in ("source", "output", "target")
    )
    value = entry.get("headline")
    told = "" if value is None else f'<span class="score">{float(value):.2f}</span>'
    return (
        f'<figure class="sample"><div class="strip">{pictures}</div>'
        f"<figcaption><span>{escape(str(entry['prompt']))}</span>{told}</figcaption></figure>"
    )


def data_uri(path: Path) -> str:
    """A picture as a PNG data URI, at most `LARGEST` pixels high and wide; "" if unreadable."""
    try:
        with Image.open(path) as picture:
            if max(picture.size) <= LARGEST and picture.format == "PNG":
                raw = path.read_bytes()
            else:
                picture.thumbnail((LARGEST, LARGEST))
                buffer = io.BytesIO()
                picture.convert("RGB").save(buffer, "PNG", optimize=True)
                raw = buffer.getvalue()
    except OSError:
        return ""
    return "data:image/png;base64," + base64.b64encode(raw).decode("ascii")
