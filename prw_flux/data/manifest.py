"""What a built data set says of itself: the file build.json."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

from prw import atomic
from prw_flux.data.remote import Place, below, read_text
from prw_flux.data.rows import CHOSEN, DataError, Reject

MANIFEST: Final = "build.json"
FORMAT: Final = 2
EXAMPLES: Final = 5


@final
@dataclass(kw_only=True)
class Manifest:
    """The content of build.json.

    Args:
        task: of all rows.
        made_from: kind of input, its files and options; a resumed build must agree.
        read, kept: records looked at, rows written.
        rejected: records left out, by reason.
        examples: the first few of every reason.
        converted: changes to pictures and rows, counted.
        sizes: rows by the size of their picture, in steps of 16 pixels.
        shards: file, rows, bytes and sha256 of each; "first" and "read": the records it came from.
        done: whether all records were read.
        stopped: the share that was left out where the build stopped for it.
    """

    task: str
    made_from: dict[str, Any]
    read: int = 0
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    converted: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    shards: list[dict[str, Any]] = field(default_factory=list)
    done: bool = False
    stopped: float | None = None

    @property
    def share(self) -> float:
        """Of the records that could be judged, those that cannot be used.

        What was left out by choice (`CHOSEN`) is no fault of the data and counts on neither side.
        """
        chosen = sum(self.rejected[reason] for reason in CHOSEN)
        return (sum(self.rejected.values()) - chosen) / max(1, self.read - chosen)

    def note(self, refusal: Reject) -> None:
        """Count a record that is left out, and keep the first few of a reason."""
        self.rejected[refusal.reason] += 1
        examples = self.examples.setdefault(refusal.reason, [])
        if len(examples) < EXAMPLES:
            examples.append(str(refusal))

    def save(self, out: Path) -> None:
        """Put it into the folder, in one step."""
        with atomic.replace_file(out / MANIFEST) as new:
            new.write_text(json.dumps({"format": FORMAT, **vars(self)}, indent=1))

    def told(self) -> str:
        """One sentence: rows, rejects by reason."""
        used = f"{self.read - sum(self.rejected.values()):,} of {self.read:,} records used"
        if not self.rejected:
            return used
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in self.rejected.most_common())
        first = next(iter(self.examples.values()))[0]
        return f"{used}; left out: {reasons} (first: {first})"


def read_manifest(out: Place) -> Manifest:
    """The manifest of a data set, which may be elsewhere.

    Raises:
        DataError: there is none, it cannot be reached, or it is damaged or of another format.
    """
    path = below(out, MANIFEST)
    if isinstance(path, Path) and not path.is_file():
        raise DataError(f"{out} has no {MANIFEST}: it was not made by `prw-flux data build`")
    try:
        raw = json.loads(read_text(path))
        if raw.pop("format") != FORMAT:
            raise DataError(f"{path} is of another format than {FORMAT}; build the data again")
        counters = {name: Counter(raw[name]) for name in ("rejected", "converted", "sizes")}
        return Manifest(**{**raw, **counters})
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        if isinstance(problem, DataError):
            raise
        raise DataError(f"{path} is damaged ({problem}); build the data again") from None


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
