"""Find what is on disk or on the Hub: adapters, runs, the base of a run and what identifies it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from huggingface_hub import snapshot_download

from prw import CheckpointError
from prw.fingerprint import fingerprint
from prw.hub import explained

EMBEDDED = "tiny-flux"


def is_hub_id(text: str) -> bool:
    """Whether a text can be "owner/name" on the Hub; a folder of that name comes first."""
    return text.count("/") == 1 and not text.startswith((".", "/", "~"))


def require_place(text: str) -> None:
    """Raise FileNotFoundError for what is no folder or file here, and no name of a repository.

    A name without an owner is left to the Hub, which has old ones.
    """
    if not Path(text).exists() and "/" in text and not is_hub_id(text):
        raise FileNotFoundError(
            f"There is no folder {text}, and a repository has the form 'owner/name': check the "
            "name."
        )


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
    if Path(text).is_dir() or is_hub_id(text):
        return text
    raise FileNotFoundError(f"The base {text} does not exist: name its new place with base=.")


def adapter_folder(source: str | os.PathLike[str], kwargs: Mapping[str, Any]) -> Path:
    """The folder of an adapter, fetched from the Hub if `source` is not a local one.

    Raises:
        FileNotFoundError: If there is none, or it holds no adapter.
    """
    folder = fetched_folder(source, kwargs)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a PRW adapter (it has no config.json).")
    return folder


def fetched_folder(source: str | os.PathLike[str], kwargs: Mapping[str, Any]) -> Path:
    """A folder here, or of a repository and then fetched, whatever it holds.

    Args:
        source: Folder or Hub id.
        kwargs: `subfolder`, `revision`, `token`, `cache_dir` and `local_files_only` count.

    Raises:
        FileNotFoundError: If there is none.
        CheckpointError: If a repository cannot be fetched.
    """
    subfolder = kwargs.get("subfolder") or ""
    folder = Path(source)
    if not folder.exists() and is_hub_id(str(source)):
        names = ("revision", "token", "cache_dir", "local_files_only")
        with explained(str(source), kwargs.get("revision")):
            folder = Path(
                snapshot_download(
                    str(source),
                    allow_patterns=[f"{subfolder}/**" if subfolder else "**"],
                    **{k: kwargs[k] for k in names if kwargs.get(k)},
                )
            )
    if not (folder / subfolder).is_dir():
        raise FileNotFoundError(f"There is no folder {folder / subfolder}: check the name.")
    return folder / subfolder


def base_fingerprint(transformer: FluxTransformer2DModel) -> dict[str, Any]:
    """What identifies the base: class, configuration, shapes and a sample of to_k and to_v."""
    blocks = {
        f"{kind}.{i}.attn": block.attn
        for kind in ("transformer_blocks", "single_transformer_blocks")
        for i, block in enumerate(getattr(transformer, kind))
    }
    linears = {f"{n}.{p}": getattr(a, p) for n, a in blocks.items() for p in ("to_k", "to_v")}
    found = fingerprint(transformer, linears)
    found["config"].pop("quantization_config", None)  # the same base, stored in fewer bits
    return found


def stored_settings(folder: Path) -> dict[str, Any]:
    """What config.json of an adapter's folder says.

    Raises:
        CheckpointError: If it is missing or damaged.
    """
    try:
        stored = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as problem:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {problem}") from None
    if not isinstance(stored, dict):
        raise CheckpointError(f"{folder / 'config.json'} is damaged: it holds no settings")
    return stored
