"""An adapter as one safetensors file, for sharing and for other front ends.

The folder of an adapter and the file hold the same: each tensor is named after its file in the
folder and its key there, ``router/<key>`` or ``experts/<index>-<name>/adapter_model/<key>``, and
the JSON files are entries of the header, by their relative path. Unpacking gives the files of the
folder byte for byte, so that the hashes in prw.json hold.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from prw import CheckpointError
from prw.atomic import replace_file, replace_folder
from prw.checkpoint import INDEX, read
from prw_flux.adapter import PRWAdapter

FORMAT: Final = "prw_flux.adapter"
VERSION: Final = 1


def save_flat(adapter: PRWAdapter, path: str | os.PathLike[str]) -> None:
    """Write `adapter` to one file, all or nothing.

    Raises:
        CheckpointError: If it cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="prw-") as place:
        folder = Path(place) / "adapter"
        adapter.save_pretrained(folder)
        pack(folder, path)


def pack(folder: Path, path: str | os.PathLike[str]) -> None:
    """Write the adapter in `folder`, whose hashes are verified first, to one file, all or nothing.

    Raises:
        CheckpointError: If the folder is damaged, or the file cannot be written.
    """
    index = json.loads((read(folder).folder / INDEX).read_text("utf-8"))
    names = sorted({INDEX, *index["sha256"], *index.get("extra", ())})
    tensors: dict[str, Tensor] = {}
    header = {"format": FORMAT, "version": str(VERSION)}
    try:
        for name in names:
            if name.endswith(".safetensors"):
                stem = name.removesuffix(".safetensors")
                found = load_file(folder / name)
                tensors |= {f"{stem}/{key}": tensor for key, tensor in found.items()}
            else:
                header[name] = (folder / name).read_text("utf-8")
        with replace_file(Path(path)) as new:
            save_file(tensors, new, metadata=header)
    except (OSError, SafetensorError) as problem:
        raise CheckpointError(f"The adapter cannot be written to {path}: {problem}.") from None


def unpack(path: str | os.PathLike[str], folder: Path) -> None:
    """Write the adapter in a file to a new folder, byte for byte what was packed; all or nothing.

    Raises:
        CheckpointError: If the file is damaged or of a newer version, or the folder is not new.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists: choose the name of a new folder.")
    with unpacked(path) as made:
        read(made)
        with replace_folder(folder.resolve()) as new:
            shutil.copytree(made, new, dirs_exist_ok=True)


def load_flat(path: str | os.PathLike[str]) -> PRWAdapter:
    """The adapter in a file of `save_flat`; nothing in it is executed.

    Raises:
        CheckpointError: If the file is damaged or of a newer version.
    """
    with unpacked(path) as folder:
        adapter: PRWAdapter = PRWAdapter.from_pretrained(folder)
    return adapter


@contextmanager
def unpacked(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The folder of the adapter in a file, while open.

    Raises:
        CheckpointError: If the file is damaged or of a newer version.
    """
    with tempfile.TemporaryDirectory(prefix="prw-") as place:
        folder = Path(place) / "adapter"
        try:
            with safe_open(path, "pt") as file:
                _write(folder, file.metadata() or {}, {k: file.get_tensor(k) for k in file.keys()})
        except (SafetensorError, OSError, KeyError, ValueError) as problem:
            if isinstance(problem, CheckpointError):
                raise
            raise CheckpointError(f"{path} is damaged ({problem}): fetch the file again.") from None
        yield folder


def _write(folder: Path, header: dict[str, str], tensors: dict[str, Tensor]) -> None:
    if int(header.get("version", "0")) > VERSION:
        raise CheckpointError(
            f"The adapter file has version {header['version']}, this library reads {VERSION}: "
            "upgrade prw."
        )
    index: dict[str, Any] = json.loads(header["prw.json"])
    hashed = [name for name in index["sha256"] if name.endswith(".safetensors")]
    files: dict[str, dict[str, Tensor]] = {name: {} for name in hashed}
    for name, tensor in tensors.items():
        stems = (file.removesuffix(".safetensors") for file in files)
        stem = next((stem for stem in stems if name.startswith(f"{stem}/")), None)
        if stem is None:
            raise CheckpointError(f"The tensor {name} belongs to no file of an adapter.")
        files[f"{stem}.safetensors"][name.removeprefix(f"{stem}/")] = tensor
    known = {*files, *(name for name in header if name.endswith(".json"))}
    if any(".." in Path(name).parts or Path(name).is_absolute() for name in known):
        raise CheckpointError("The adapter file names a path outside its folder: it is damaged.")
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(content, folder / name)
    for name, text in header.items():
        if name.endswith(".json"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, "utf-8")
