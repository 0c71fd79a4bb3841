"""The shards of a cache: contents by the hash of what they were made of.

A shard holds latents or semantic features, of any number of grids, or texts. Tensors of a shard of
latents: ``keys.RxC`` uint8 [n, 16] and ``latents.RxC`` bf16 [n, R C, C'] for a grid of R x C
tokens; of one of features: the same keys, and ``features.RxC`` bf16 [n, R, C, D]; of one of texts:
``keys`` uint8 [n, 16], ``text`` bf16 [n, L, E] and ``pooled`` bf16 [n, P].
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, cast, final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prw.atomic import replace_file, sweep
from prw_flux.encoded import Grid
from prw_flux.sample_cache.errors import CacheError

KEY: Final = 16
"""Bytes of a key."""
OPEN: Final = 128
"""Shards that a reader keeps open."""
SHARDS: Final = "shards"

Kind: TypeAlias = Literal["latents", "texts", "features"]
"""What a shard holds."""
Picture: TypeAlias = NDArray[np.uint8]
Content: TypeAlias = tuple[Any, Tensor]
"""Grid and latents, grid and features, or the two embeddings of a text."""


def picture_key(vae: str, picture: Picture) -> bytes:
    """Of the latents of a picture, its size included.

    Args:
        vae: digest of the autoencoder.
        picture: uint8 [H, W, 3].
    """
    found = hashlib.blake2b(f"{vae} {picture.shape}".encode(), digest_size=KEY)
    found.update(np.ascontiguousarray(picture).data)
    return found.digest()


def features_key(encoder: str, grid: Grid, picture: Picture) -> bytes:
    """Of the semantic features of a picture at a grid; `encoder` is the digest of their encoder."""
    return picture_key(f"features {encoder} {grid}", picture)


def text_key(texts: str, text: str) -> bytes:
    """Of the embeddings of a text; `texts` is the digest of the text encoders."""
    return hashlib.blake2b(f"{texts} {text}".encode(), digest_size=KEY).digest()


def key_rows(keys: list[bytes]) -> Tensor:
    """uint8 [n, 16]."""
    return torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(len(keys), KEY)


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """Of tensors by name: names, shapes and bytes."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Put a safetensors file in place, whole or not at all, with the hash of what it has.

    Raises:
        CacheError: it cannot be written, as where the disk is full; nothing is left of it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        with replace_file(path) as new:
            save_file(dict(tensors), new, metadata={**header, "blake2b": content_hash(tensors)})
    except (OSError, SafetensorError) as problem:
        raise CacheError(
            f"{path} cannot be written ({problem}): make room, then run the same command again; "
            "what is there stays"
        ) from None


def write_shard(path: Path, kind: Kind, contents: Mapping[bytes, Content]) -> None:
    """A shard of one kind of contents by key. Raises as `write`.

    Args:
        path: of its file.
        kind: of all contents.
        contents: (R x C, latents [R C, C']), (R x C, features [R, C, D]), or (text [L, E],
            pooled [P]).
    """
    tensors: dict[str, Tensor] = {}
    if kind == "texts":
        tensors["keys"] = key_rows(list(contents))
        for i, name in enumerate(("text", "pooled")):
            tensors[name] = torch.stack([pair[i] for pair in contents.values()])
    else:
        for grid in dict.fromkeys(grid for grid, _ in contents.values()):
            here = {key: tensor for key, (own, tensor) in contents.items() if own == grid}
            name = f"{grid[0]}x{grid[1]}"
            tensors[f"keys.{name}"] = key_rows(list(here))
            tensors[f"{kind}.{name}"] = torch.stack(list(here.values()))
    write(path, tensors, {"kind": kind})


@final
class Shard:
    """One open shard; tensors are read where they lie in the file.

    Raises:
        CacheError: it is absent or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = cast(Any, safe_open(path, "pt"))
            names = [name for name in self._file.keys() if name.startswith("keys")]
            self._place: dict[bytes, tuple[str, int]] = {}
            for name in names:
                rows = self._file.get_tensor(name).numpy()
                grid = name.removeprefix("keys").removeprefix(".")
                self._place |= {row.tobytes(): (grid, i) for i, row in enumerate(rows)}
        except (OSError, SafetensorError) as problem:
            raise CacheError(
                f"{path} cannot be read ({problem}): run prw-flux cache check --repair, then "
                "prw-flux cache build"
            ) from None

    def __contains__(self, key: bytes) -> bool:
        return key in self._place

    def latents(self, key: bytes) -> Tensor:
        """Packed latents [R C, C'] in bf16."""
        grid, row = self._find(key)
        return cast(Tensor, self._file.get_slice(f"latents.{grid}")[row])

    def features(self, key: bytes) -> Tensor:
        """Semantic features [R, C, D] in bf16."""
        grid, row = self._find(key)
        return cast(Tensor, self._file.get_slice(f"features.{grid}")[row])

    def text(self, key: bytes) -> tuple[Tensor, Tensor]:
        """Embeddings [L, E] and [P] in bf16."""
        _, row = self._find(key)
        return self._file.get_slice("text")[row], self._file.get_slice("pooled")[row]

    def _find(self, key: bytes) -> tuple[str, int]:
        if key not in self._place:
            raise CacheError(
                f"{self.path} lacks the content {key.hex()}: run prw-flux cache check --repair, "
                "then prw-flux cache build"
            )
        return self._place[key]


@final
class Shards:
    """The shards of a cache; the `OPEN` last used are kept open."""

    def __init__(self, cache: Path) -> None:
        self.folder = cache / SHARDS
        self._open: OrderedDict[str, Shard] = OrderedDict()

    def __getitem__(self, name: str) -> Shard:
        if name not in self._open:
            self._open[name] = Shard(self.folder / name)
            if len(self._open) > OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(name)
        return self._open[name]
