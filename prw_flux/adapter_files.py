"""Telling apart what lies on disk: adapters, LoRAs and everything else.

An adapter is a folder (config.json and prw.json), the folder of a training run, which has one, or
one safetensors file. A LoRA is an adapter_config.json of PEFT, or a safetensors file with lora_A or
lora_down in its keys.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from prw import CheckpointError
from prw.hub import explained
from prw_flux.adapter import PRWAdapter
from prw_flux.coredi.model import CoReDi
from prw_flux.flat_file import FORMAT, load_flat
from prw_flux.locate import fetched_folder, is_run

LORA_WORDS = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.")


def open_adapter(
    location: str | os.PathLike[str], weight_name: str | None, options: dict[str, Any]
) -> tuple[PRWAdapter, CoReDi | None]:
    """The adapter at a folder, in a file or on the Hub; and the feature stream, if a run has one.

    Args:
        location, weight_name, options: as in `load_prw_weights`.
    """
    path = Path(location)
    loose = path.suffix == ".safetensors" and not path.is_dir()
    if weight_name is not None or path.is_file() or loose:
        return load_flat(adapter_file(_local_file(path, weight_name, options))), None
    folder = fetched_folder(location, options)
    adapter: PRWAdapter = PRWAdapter.from_pretrained(adapter_place(folder))
    stream = folder / "coredi"
    return adapter, CoReDi.load(stream) if is_run(folder) and stream.is_dir() else None


def is_adapter(path: Path) -> bool:
    """Whether a local path is a PRW adapter: a folder, a run or a file."""
    if path.is_dir():
        return is_run(path) or ((path / "prw.json").is_file() and (path / "config.json").is_file())
    return path.is_file() and _kind(path) == "adapter"


def require_lora(path: Path) -> None:
    """Raise CheckpointError if a folder or a file is an adapter, or an expert inside one."""
    if is_adapter(path):
        raise CheckpointError(
            f"{path} is a PRW adapter, not a LoRA: use pipe.load_prw_weights(...)."
        )
    expert = path.parent if path.is_file() else path
    whole = expert.parent.parent
    if expert.parent.name == "experts" and is_adapter(whole):
        raise CheckpointError(
            f"{path} is one expert of the PRW adapter {whole}, which acts on a source and on "
            "nothing else: load that with pipe.load_prw_weights(...) and choose the expert with "
            "route=."
        )


def adapter_place(folder: Path) -> Path:
    """The folder of an adapter: this one, or the one in this run.

    Raises:
        CheckpointError: If it holds a LoRA, or an adapter as one file.
        FileNotFoundError: If there is no adapter.
    """
    if is_run(folder) and not (folder / "config.json").is_file():
        folder = folder / "adapter"
    _require_adapter_folder(folder)
    return folder


def adapter_file(path: Path) -> Path:
    """`path`, if it is the file of an adapter.

    Raises:
        CheckpointError: If it is something else.
        FileNotFoundError: If there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}: check the name.")
    kind = _kind(path)
    if kind != "adapter":
        raise CheckpointError(_not_an_adapter(path, kind))
    return path


def _require_adapter_folder(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} is a PEFT LoRA (one expert of an adapter, or a LoRA of its own), not a PRW "
            "adapter: give the adapter's own folder, or use pipe.load_lora_weights(...)."
        )
    if (folder / "config.json").is_file() and (folder / "prw.json").is_file():
        return
    for file in sorted(folder.glob("*.safetensors")):
        kind = _kind(file)
        if kind == "lora":
            raise CheckpointError(_not_an_adapter(file, kind))
        if kind == "adapter":
            raise CheckpointError(
                f"{folder} holds an adapter as one file: add weight_name={file.name!r}."
            )
    raise FileNotFoundError(
        f"{folder} is not a PRW adapter (it has no config.json and prw.json): give a folder that "
        "save_pretrained wrote, or a run."
    )


def _local_file(path: Path, weight_name: str | None, options: dict[str, Any]) -> Path:
    """The file itself, fetched from the Hub where `path` is no place here."""
    if weight_name is not None and not path.exists():
        from huggingface_hub import hf_hub_download

        given = {k: v for k, v in options.items() if v}
        with explained(str(path), options.get("revision")):
            return Path(hf_hub_download(str(path), weight_name, **given))
    if weight_name is not None:
        path = path / (options.get("subfolder") or "") / weight_name
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}: check the name.")
    return path


def _kind(path: Path) -> str:
    """ "adapter", "lora" or what else a file is, in words."""
    if path.suffix != ".safetensors":
        return "no safetensors file"
    try:
        with safe_open(path, "pt") as file:
            header, names = file.metadata() or {}, list(file.keys())
    except (SafetensorError, OSError):
        return "damaged, or no safetensors file"
    if header.get("format") == FORMAT:
        return "adapter"
    lora = any(word in f".{name}." for name in names for word in LORA_WORDS)
    return "lora" if lora else "something else"


def _not_an_adapter(path: Path, kind: str) -> str:
    if kind == "lora":
        return f"{path} is a LoRA, not a PRW adapter: use pipe.load_lora_weights(...)."
    return f"{path} is not a PRW adapter ({kind}): give what save_pretrained or save_flat wrote."
