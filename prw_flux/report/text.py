"""Numbers and names as a reader wants them."""

from __future__ import annotations

from prw_flux.report.facts import StageFacts


def named(stage: StageFacts) -> str:
    """A stage's name, with its task where they differ."""
    return stage.name if stage.name == stage.task else f"{stage.name} ({stage.task})"


def duration(seconds: float | None) -> str:
    """42 s, 3 min 20 s, 2 h 05 min; nothing for None."""
    if seconds is None:
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def count(number: int | None) -> str:
    """123, 45.6 k, 7.8 M or 11.9 B; nothing for None."""
    if number is None:
        return ""
    for limit, unit in ((1_000_000_000, "B"), (1_000_000, "M"), (10_000, "k")):
        if number >= limit:
            return f"{number / (1000 if unit == 'k' else limit):.3g} {unit}"
    return f"{number:,}"


def share(part: float, whole: float) -> str:
    """A percentage with two digits that matter."""
    return f"{100 * part / whole:.2g} %" if whole > 0 else ""
