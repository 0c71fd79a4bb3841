"""MagicBrush (arXiv 2306.10012): edits with a true after-image, one turn or several.

Layout of the results, which the public evaluation/image_eval.py reads too: `<id>/<id>_1.png` the
first edit, `<id>/<id>_inde_<k>.png` turn k from the true picture of turn k - 1,
`<id>/<id>_iter_<k>.png` turn k from the own output of turn k - 1. The benchmark's folder holds
`<id>/<id>-input.png` and `<id>/<id>-output<k>.png` (or `images/` with them) and
`local_captions.json` or `local_descriptions.json`: {id: {file of the target: caption}}. Generation
needs its `edit_sessions.json` as well: {id: [{"instruction": ...}, ... one per turn]}.

Two settings, each against the target (as the public script) and against the source (as CoLoGen's
text): "single", every turn from the true picture before it; "multi", the last turn of the own
chain. Outputs are resized to the reference for L1 and L2; means over pairs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from prw_flux.data.images import open_image
from prw_flux.evaluation.benchmarks.base import (
    Ask,
    Benchmark,
    BenchmarkError,
    Encoders,
    Item,
    Line,
    means,
    read_json,
)
from prw_flux.evaluation.metrics import l1, l2
from prw_flux.tasks.base import Image

CAPTIONS: Final = ("local_captions.json", "local_descriptions.json")
SESSIONS: Final = "edit_sessions.json"
TEST_SIZE: Final = (535, 1053)
"""Sessions and turns of the test split."""
SETTINGS: Final = ("single", "multi")


@final
@dataclass(frozen=True, kw_only=True)
class Turn(Item):
    """One output of a session: its setting, true after-image, source picture and caption."""

    setting: str
    session: str
    turn: int
    target: Path
    given: Path
    caption: str | None


@final
class MagicBrush(Benchmark[Turn]):
    """The benchmark's folder.

    Args:
        folder: as above.
        captions: whether captions are needed, that is, whether there is a CLIP.

    Raises:
        BenchmarkError: the folder or the captions are not there, or hold something else.
    """

    name = "magicbrush"

    def __init__(self, folder: Path, *, captions: bool = True) -> None:
        root = folder / "images" if (folder / "images").is_dir() else folder
        if not root.is_dir():
            raise BenchmarkError(f"There is no folder of MagicBrush at {folder}.")
        texts = _captions(folder) if captions else {}
        sessions = {p.name: _targets(p) for p in sorted(root.iterdir()) if p.is_dir()}
        turns = sum(len(targets) for targets in sessions.values())
        if not turns:
            raise BenchmarkError(
                f"{folder} is no MagicBrush folder: it holds no <id>/<id>-output1.png."
            )
        asked, items = _instructions(folder), []
        for name, targets in sessions.items():
            words = dict(enumerate(asked.get(name, ()), start=1))
            known = texts.get(name) if captions else {}
            items += _session(root / name, name, targets, known, words)
        self.items = tuple(items)
        self.allowed = frozenset(
            f"{name}/{name}_iter_{k}.png"
            for name, targets in sessions.items()
            for k in range(1, len(targets))
        )
        self.notes = () if (len(sessions), turns) == TEST_SIZE else (
            f"{folder} holds {len(sessions)} sessions with {turns} turns, the published test split "
            f"{TEST_SIZE[0]} with {TEST_SIZE[1]}: not the same set",
        )  # fmt: skip

    def asks(self) -> tuple[Ask, ...]:
        """Every turn from the true picture before it, and every later turn from the own output.

        Raises:
            BenchmarkError: edit_sessions.json does not tell the instruction of a turn.
        """
        out = []
        for item in self.items:
            if not item.text:
                raise BenchmarkError(
                    f"{SESSIONS} tells no instruction for {item.output!r}: without it nothing can "
                    "be generated."
                )
            if item.setting == "single":
                session, k = item.session, item.turn
                out.append(Ask(output=item.output, task=self.task, prompt=item.text,
                               source=item.given, chain=session))  # fmt: skip
                if k > 1:
                    before = f"{session}_1.png" if k == 2 else f"{session}_iter_{k - 1}.png"
                    out.append(Ask(output=f"{session}/{session}_iter_{k}.png", task=self.task,
                                   prompt=item.text, after=f"{session}/{before}",
                                   chain=session))  # fmt: skip
        return tuple(out)

    def target(self, item: Turn, results: Path) -> Path:
        """The true after-image."""
        return item.target

    def score(self, item: Turn, output: Image, encoders: Encoders) -> dict[str, Any]:
        """L1, L2 and similarities to target and source; CLIP-T of output and target."""
        target, source = open_image(item.target), open_image(item.given)
        row: dict[str, Any] = {"setting": item.setting}
        for against, reference in (("target", target), ("source", source)):
            row[f"L1 {against}"] = l1(output, reference)
            row[f"L2 {against}"] = l2(output, reference)
        for name, (to_target, to_source) in encoders.similarities([output, target, source]).items():
            row[f"{name} target"], row[f"{name} source"] = to_target, to_source
        if item.caption is not None and encoders.clip is not None:
            scored = encoders.caption_score([output, target], item.caption)
            row["CLIP-T"], row["CLIP-T of the target"] = scored
        return row

    def lines(self, rows: Sequence[Mapping[str, Any]], encoders: Encoders) -> list[Line]:
        """Four rows: single and multi turn, against target and source."""
        out = []
        for setting in SETTINGS:
            chosen = [row for row in rows if row["setting"] == setting]
            total = sum(item.setting == setting for item in self.items)
            for against in ("target", "source") if chosen else ():
                names = {f"{m} {against}": m for m in ("L1", "L2", *encoders.named())}
                names |= {"CLIP-T": "CLIP-T", "CLIP-T of the target": "CLIP-T of the target"}
                protocol = {"bench": self.name, "split": "test", "turns": setting,
                            "reference": against, "items": self.covered(chosen, total),
                            **encoders.protocol()}  # fmt: skip
                out.append(Line(label=f"{setting} turn, against the {against}",
                                metrics=means(chosen, names), protocol=protocol,
                                n=len(chosen)))  # fmt: skip
        return out


def _instructions(folder: Path) -> dict[str, list[str]]:
    """The instructions of each session by turn; empty where the file is not there."""
    path = folder / SESSIONS
    if not path.is_file():
        return {}
    sessions = read_json(path, "the instructions")
    try:
        return {
            str(name): [str(turn["instruction"]) for turn in turns]
            for name, turns in sessions.items()
        }
    except (AttributeError, KeyError, TypeError):
        raise BenchmarkError(
            f'{path} is of another version: expected {{id: [{{"instruction": ...}}, ...]}}.'
        ) from None


def _captions(folder: Path) -> Mapping[str, Any]:
    path = next((folder / name for name in CAPTIONS if (folder / name).is_file()), None)
    if path is None:
        raise BenchmarkError(
            f"There is no {' or '.join(CAPTIONS)} in {folder}, whose captions CLIP-T needs."
        )
    texts = read_json(path, "the captions")
    if not isinstance(texts, dict) or not all(isinstance(v, dict) for v in texts.values()):
        raise BenchmarkError(f"{path} is of another version: expected {{id: {{file: caption}}}}.")
    return texts


def _targets(session: Path) -> dict[int, Path]:
    """The true after-images by turn."""
    found = {}
    for path in session.iterdir():
        match = re.fullmatch(rf"{re.escape(session.name)}-output-?(\d+)\.(png|jpg)", path.name)
        if match:
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def _session(
    folder: Path,
    name: str,
    targets: Mapping[int, Path],
    captions: Mapping[str, Any] | None,
    words: Mapping[int, str],
) -> list[Turn]:
    inputs = [folder / f"{name}-input{suffix}" for suffix in (".png", ".jpg")]
    first = next((path for path in inputs if path.is_file()), None)
    if not targets or list(targets) != list(range(1, len(targets) + 1)) or first is None:
        raise BenchmarkError(
            f"{folder} is incomplete: expected {name}-input.png and {name}-output1.png to -output"
            f"N.png, got turns {list(targets)} and {'no' if first is None else 'an'} input."
        )
    if captions is None:
        raise BenchmarkError(f"The captions know no session {name!r}, which {folder} holds.")

    def turn(setting: str, k: int, output: str, source: Path) -> Turn:
        caption = captions.get(targets[k].name)
        if captions and not isinstance(caption, str):
            raise BenchmarkError(f"The captions of {name!r} know no {targets[k].name!r}.")
        return Turn(key=f"{setting}/{output}", output=f"{name}/{output}", setting=setting,
                    session=name, turn=k, target=targets[k], given=source, caption=caption,
                    text=words.get(k, ""))  # fmt: skip

    last = len(targets)
    turns = [
        turn("single", k, f"{name}_1.png" if k == 1 else f"{name}_inde_{k}.png",
             first if k == 1 else targets[k - 1])
        for k in targets
    ]  # fmt: skip
    chain = f"{name}_1.png" if last == 1 else f"{name}_iter_{last}.png"
    return [*turns, turn("multi", last, chain, first)]
