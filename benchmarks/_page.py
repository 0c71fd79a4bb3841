"""What a benchmark writes into a page of the documentation: Markdown between two comments."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from prw_flux.rundir import write_atomically


def table(head: Sequence[str], body: Iterable[Sequence[str]], right: int = 1) -> list[str]:
    """Lines of a Markdown table; columns from `right` on are aligned to the right."""
    rule = ["---"] * right + ["---:"] * (len(head) - right)
    return [f"| {' | '.join(line)} |" for line in (head, rule, *body)]


def between(page: Path, name: str) -> str:
    """What stands between the comments ``name: begin`` and ``name: end`` of a page.

    Raises:
        ValueError: the page has no such comments.
    """
    return _parts(page, name)[1]


def require_marks(parser: argparse.ArgumentParser, page: Path | None, name: str) -> None:
    """End with argparse's message, before the run, where a page that was asked for cannot be."""
    if page is not None:
        try:
            between(page, name)
        except (OSError, ValueError) as problem:
            parser.error(f"--page: {problem}")


def write_between(page: Path, name: str, text: str) -> None:
    """Put `text` there instead.

    Raises:
        ValueError: the page has no such comments.
    """
    before, _, after = _parts(page, name)
    write_atomically(page, f"{before}\n{text}\n{after}")


def _parts(page: Path, name: str) -> tuple[str, str, str]:
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, mark, rest = page.read_text("utf-8").partition(begin)
    inside, close, after = rest.partition(end)
    if not mark or not close:
        raise ValueError(f"{page} has no {begin} ... {end} to write between")
    return before + begin, inside, end + after
