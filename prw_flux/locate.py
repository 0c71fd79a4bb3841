"""Find the base of a training run: the pipeline that its adapter was trained on."""

from __future__ import annotations

import json
import os
from pathlib import Path

EMBEDDED = "tiny-flux"


def is_run(folder: Path) -> bool:
    """Whether a folder was written by training."""
    return (folder / "run.json").is_file()


def resolve_run(folder: Path, base: str | os.PathLike[str] | None = None) -> tuple[str, str | None]:
    """Location (folder or Hub id) and revision of the base of the run in `folder`.

    Args:
        folder: The run.
        base: Another location, which wins over the run's own.

    Raises:
        ValueError: If run.json is damaged or names no base.
        FileNotFoundError: If the base is a folder that is gone.
    """
    if base is not None:
        return resolve_base(base), None
    try:
        spec = json.loads((folder / "run.json").read_text("utf-8"))["base"]
        path, revision = str(spec["path"]), spec.get("revision")
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / 'run.json'} does not say which base the run used ({error!r}): name it with "
            "base=."
        ) from None
    return resolve_base(path), revision


def resolve_base(base: str | os.PathLike[str]) -> str:
    """A pipeline folder or Hub id; "tiny-flux" is the pipeline inside this package.

    Raises:
        FileNotFoundError: If it can only be a folder, and there is none.
    """
    text = os.fspath(base)
    if text == EMBEDDED:
        from prw_flux import tiny

        return str(tiny.path())
    is_hub_id = text.count("/") == 1 and not text.startswith((".", "/", "~"))
    if Path(text).is_dir() or is_hub_id:
        return text
    raise FileNotFoundError(f"The base {text} does not exist: name its new place with base=.")
