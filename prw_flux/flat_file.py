"""An adapter as one safetensors file, for sharing and for other front ends.

The folder of an adapter and the file hold the same: each tensor is named after its file in the
folder and its key there, ``router/<key>`` or ``experts/<index>-<name>/adapter_model/<key>``, and
the JSON files are entries of the header, by their relative path. Unpacking gives the files of the
folder byte for byte, so that the hashes in prw.json hold.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from prw import CheckpointError
from prw.atomic import replace_file, replace_folder
from prw.checkpoint import INDEX, Stored, read, verified
from prw_flux.adapter import PRWAdapter

FORMAT: Final = "prw_flux.adapter"
VERSION: Final = 1
TENSORS: Final = ".safetensors"


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
    found = Packed.open(path)
    found.verified()
    with replace_folder(folder.resolve()) as new:
        found.write(new)


def load_flat(path: str | os.PathLike[str]) -> PRWAdapter:
    """The adapter in a file of `save_flat`; nothing in it is executed, nothing is written.

    Raises:
        CheckpointError: If the file is damaged or of a newer version.
    """
    found = Packed.open(path)
    adapter: PRWAdapter = PRWAdapter.restored(
        found.settings(), found.place("config.json"), found.verified()
    )
    return adapter


class Packed:
    """The files in a flat file, as `prw.checkpoint.Files`.

    Args:
        path: of the flat file, for messages.
        texts: content of the JSON files, by name.
        content: tensors of the safetensors files, by name and key.
    """

    def __init__(
        self, path: Path, texts: Mapping[str, str], content: Mapping[str, dict[str, Tensor]]
    ) -> None:
        self.path, self.texts, self.content = path, texts, content

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Packed:
        """Tensors stay on disk until they are used.

        Raises:
            CheckpointError: If the file is damaged or of a newer version.
        """
        try:
            with safe_open(path, "pt") as file:
                header, names = file.metadata() or {}, list(file.keys())
                _require_version(header)
                texts = {name: text for name, text in header.items() if name.endswith(".json")}
                content: dict[str, dict[str, Tensor]] = {n: {} for n in _hashed(texts)}
                for name in names:
                    owner = next((n for n in content if name.startswith(_prefix(n))), None)
                    if owner is None:
                        raise CheckpointError(
                            f"The tensor {name} belongs to no file of an adapter."
                        )
                    content[owner][name.removeprefix(_prefix(owner))] = file.get_tensor(name)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as problem:
            if isinstance(problem, CheckpointError):
                raise
            raise CheckpointError(f"{path} is damaged ({problem}): fetch the file again.") from None
        if any(".." in Path(n).parts or Path(n).is_absolute() for n in (*texts, *content)):
            raise CheckpointError(
                "The adapter file names a path outside its folder: it is damaged."
            )
        return cls(Path(path), texts, content)

    def verified(self) -> Stored:
        """The checkpoint; raises CheckpointError where a hash does not fit."""
        return verified(self.path, self, json.loads(self.texts[INDEX]))

    def settings(self) -> dict[str, Any]:
        """What config.json says."""
        try:
            found = json.loads(self.texts["config.json"])
        except (KeyError, ValueError) as problem:
            raise CheckpointError(
                f"{self.path} is damaged ({problem}): fetch the file again."
            ) from None
        return dict(found) if isinstance(found, dict) else {}

    def place(self, name: str) -> str:
        """File in file."""
        return f"{self.path}:{name}"

    def sha256(self, name: str) -> str | None:
        """Of the bytes that the file has in the folder."""
        if name in self.texts:
            return hashlib.sha256(self.texts[name].encode()).hexdigest()
        if name not in self.content:
            return None
        return hashlib.sha256(save(self.content[name])).hexdigest()

    def text(self, name: str) -> str:
        """An entry of the header."""
        return self.texts[name]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Those of one file of the folder."""
        return self.content[name]

    def write(self, folder: Path) -> None:
        """The files of the folder, byte for byte."""
        for name in (*self.texts, *self.content):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        for name, tensors in self.content.items():
            save_file(tensors, folder / name)
        for name, text in self.texts.items():
            (folder / name).write_text(text, "utf-8")


def _hashed(texts: Mapping[str, str]) -> list[str]:
    """The safetensors files that prw.json knows."""
    return [name for name in json.loads(texts[INDEX])["sha256"] if name.endswith(TENSORS)]


def _prefix(name: str) -> str:
    """Of the tensors of one file of the folder."""
    return f"{name.removesuffix(TENSORS)}/"


def _require_version(header: Mapping[str, str]) -> None:
    if int(header.get("version", "0")) > VERSION:
        raise CheckpointError(
            f"The adapter file has version {header['version']}, this library reads {VERSION}: "
            "upgrade prw."
        )
