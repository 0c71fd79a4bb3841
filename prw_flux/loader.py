"""Loading an adapter into a pipeline, and telling adapters and LoRAs apart.

An adapter is a folder (config.json and prw.json), the folder of a training run, which has one, or
one safetensors file. A LoRA is an adapter_config.json of PEFT, or a safetensors file with lora_A or
lora_down in its keys.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from safetensors import SafetensorError, safe_open

from prw import CheckpointError
from prw.hub import explained
from prw_flux.adapter import PRWAdapter
from prw_flux.attach import attach, detach
from prw_flux.flat_file import FORMAT, load_flat
from prw_flux.locate import is_run

WORKING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LORA_WORDS = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.")


class PRWLoaderMixin:
    """`load_prw_weights` and its opposite, for a pipeline with components `transformer`, `prw`."""

    transformer: FluxTransformer2DModel
    prw: Any

    def load_prw_weights(
        self,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Load an adapter and attach it, in place of the one that is there.

        Args:
            pretrained_model_name_or_path: Folder of an adapter or of a run, a safetensors file, or
                a Hub id.
            weight_name: A safetensors file in that folder or repository.
            subfolder, revision, token, cache_dir: As in diffusers.
            dtype: Of the experts; the transformer's where None. Routers stay in float32.

        Raises:
            FileNotFoundError: If there is no adapter.
            prw.CheckpointError: If it is damaged, a LoRA, or something else.
            ValueError: If it was made for another base. The pipeline is then as it was.
        """
        options = {
            "subfolder": subfolder,
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
        }
        adapter = open_adapter(pretrained_model_name_or_path, weight_name, options)
        own = self.transformer.dtype
        adapter.to(dtype or (own if own in WORKING else torch.bfloat16))
        adapter.to(self._execution_device)  # type: ignore[attr-defined]
        attach(self.transformer, adapter)
        self.register_modules(prw=adapter)  # type: ignore[attr-defined]

    def unload_prw_weights(self) -> None:
        """Stock processors again; nothing is left of the adapter. Without one, nothing happens."""
        detach(self.transformer)
        self.register_modules(prw=None)  # type: ignore[attr-defined]

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict: Any, *args: Any, **kwargs: Any
    ) -> None:
        """As in FluxPipeline: a LoRA of the base, beside the adapter.

        Raises:
            prw.CheckpointError: If it is an adapter.
        """
        given = pretrained_model_name_or_path_or_dict
        if isinstance(given, (str, os.PathLike)) and is_adapter(Path(given)):
            raise CheckpointError(
                f"{given} is a PRW adapter, not a LoRA: use pipe.load_prw_weights(...)."
            )
        super().load_lora_weights(given, *args, **kwargs)  # type: ignore[misc]


def open_adapter(
    location: str | os.PathLike[str], weight_name: str | None, options: dict[str, Any]
) -> PRWAdapter:
    """The adapter at a folder, in a file or on the Hub; arguments as in `load_prw_weights`."""
    path = Path(location)
    if path.is_dir() and weight_name is None:
        inner = adapter_place(path / (options.get("subfolder") or ""))
        adapter: PRWAdapter = PRWAdapter.from_pretrained(inner)
        return adapter
    if path.is_file() or path.suffix == ".safetensors" or weight_name is not None:
        return _of_file(_local_file(path, weight_name, options))
    adapter = PRWAdapter.from_pretrained(location, **options)
    return adapter


def is_adapter(path: Path) -> bool:
    """Whether a local path is a PRW adapter: a folder, a run or a file."""
    if path.is_dir():
        return is_run(path) or ((path / "prw.json").is_file() and (path / "config.json").is_file())
    return path.is_file() and _kind(path) == "adapter"


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


def _of_file(path: Path) -> PRWAdapter:
    return load_flat(adapter_file(path))


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
