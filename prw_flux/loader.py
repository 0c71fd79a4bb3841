"""Where a pipeline and its adapter come from: folders, runs, files, the Hub, other pipelines."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from diffusers.utils.torch_utils import get_module_execution_device

from prw_flux.adapter import PRWAdapter
from prw_flux.adapter_files import is_adapter, open_adapter, require_lora
from prw_flux.attach import attach, detach
from prw_flux.coredi.model import CoReDi
from prw_flux.locate import (
    EMBEDDED,
    fetched_folder,
    is_run,
    require_place,
    resolve_base,
    resolve_run,
)

WORKING: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FOLDER: Final = "prw"
"""Of the adapter in the folder of a pipeline."""
MARK: Final = "_prw"
"""Says in model_index.json that there is one. Under the component's own name diffusers would look
for its code in the repository, and for weights of its own naming in the folder."""
STREAM: Final = "coredi"
"""Of the feature stream, in the folder of a pipeline or a run."""
STREAM_MARK: Final = "_coredi"
HUB: Final = ("revision", "token", "cache_dir", "local_files_only")


class PRWLoaderMixin:
    """Loading, for a pipeline whose components are FluxPipeline's and `prw`."""

    transformer: FluxTransformer2DModel
    prw: Any
    coredi: CoReDi | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        base: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a pipeline folder or Hub id, or the folder of a training run.

        Args:
            pretrained_model_name_or_path: A folder or repository that `save_pretrained` wrote, any
                FLUX.1 pipeline (then without adapter), "tiny-flux", or a run.
            base: Another place for the base of a run, when it is not where the run says.
            kwargs: As in `DiffusionPipeline.from_pretrained`. `dtype` (float32 by default) casts
                the experts too, routers stay in float32.

        Raises:
            FileNotFoundError: If a local folder is neither, or the base of a run is missing.
            ValueError: If `base` is given for something that is not a run.
            prw.CheckpointError: If the adapter is damaged or cannot be fetched.
        """
        folder = Path(pretrained_model_name_or_path)
        # without a dtype diffusers loads float32 and transformers what the file has
        kwargs.setdefault("dtype", kwargs.pop("torch_dtype", torch.float32))
        dtype = _adapter_dtype(kwargs["dtype"])
        stream = None
        if is_run(folder):
            location, revision = resolve_run(folder, base)
            if FOLDER not in kwargs:
                kwargs[FOLDER] = PRWAdapter.from_pretrained(folder / "adapter", dtype=dtype)
                if (folder / STREAM).is_dir():
                    stream = CoReDi.load(folder / STREAM)
            if revision is not None:
                kwargs.setdefault("revision", revision)
        else:
            if base is not None:
                raise ValueError(f"{folder} is not a run (it has no run.json): leave base out.")
            location = _pipeline(pretrained_model_name_or_path)
            hub: dict[str, Any] = {name: kwargs[name] for name in HUB if name in kwargs}
            index = cls.load_config(location, **hub)  # type: ignore[attr-defined]
            if MARK in index and FOLDER not in kwargs:
                kwargs[FOLDER] = PRWAdapter.from_pretrained(
                    location, subfolder=FOLDER, dtype=dtype, **hub
                )
                if STREAM_MARK in index:
                    stream = CoReDi.load(fetched_folder(location, {"subfolder": STREAM, **hub}))
        pipe: Self = super().from_pretrained(location, **kwargs)  # type: ignore[misc]
        if kwargs.get("device_map") is not None and pipe.prw is not None:
            pipe.prw.to(get_module_execution_device(pipe.transformer))
        pipe.coredi = stream
        return pipe

    @classmethod
    def from_pipe(
        cls, pipeline: DiffusionPipeline, prw: PRWAdapter | None = None, **components: Any
    ) -> Self:
        """Share the components of any FLUX.1 pipeline; nothing is copied.

        Args:
            pipeline: FluxPipeline, FluxKontextPipeline, a CoLoGenPipeline and so on.
            prw: The adapter; None keeps the one of a CoLoGenPipeline.
            components: Instead of the pipeline's own, as in diffusers. `dtype` casts all of them,
                in place; unlike in diffusers nothing is cast without it.

        Raises:
            TypeError: If it is not a FLUX.1 pipeline, `prw` is no adapter, or a component has no
                place in this pipeline.
            ValueError: If the adapter does not fit the transformer.
        """
        dtype = components.pop("dtype", components.pop("torch_dtype", None))
        wanted = set(cls._get_signature_keys(cls)[0])  # type: ignore[attr-defined]
        unknown = ", ".join(sorted(set(components) - wanted))
        if unknown:
            raise TypeError(
                f"from_pipe has no argument {unknown}: components are {', '.join(sorted(wanted))}."
            )
        if not isinstance(pipeline, DiffusionPipeline):
            raise TypeError(
                f"from_pipe shares the components of a loaded pipeline, got {pipeline!r}: load it "
                "first, or use from_pretrained."
            )
        shared = {k: v for k, v in pipeline.components.items() if k in wanted} | components
        if not isinstance(shared.get("transformer"), FluxTransformer2DModel):
            raise TypeError(
                f"{type(pipeline).__name__} has no FLUX.1 transformer: give a FluxPipeline, a "
                "FluxKontextPipeline or another pipeline of FLUX.1."
            )
        if prw is not None:
            shared["prw"] = prw
        pipe = cls(**shared)
        if isinstance(pipeline, PRWLoaderMixin) and pipe.prw is pipeline.prw:
            pipe.coredi = pipeline.coredi
        if dtype is not None:
            pipe.to(dtype)  # type: ignore[attr-defined]
        return pipe

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> None:
        """As in diffusers; a feature stream goes into a folder of its own."""
        if self.coredi is not None:
            self.coredi.save(Path(save_directory) / STREAM)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write model_index.json, in which an adapter is a mark, see `MARK`."""
        index = json.loads(self.to_json_string())  # type: ignore[attr-defined]
        if index.pop(FOLDER, (None, None))[0] is not None:
            index[MARK] = FOLDER
            if self.coredi is not None:
                index[STREAM_MARK] = STREAM
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        Path(json_file_path).write_text(text, encoding="utf-8")

    def load_prw_weights(
        self,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        dtype: torch.dtype | None = None,
        adapter_name: str | None = None,
    ) -> None:
        """Load an adapter and attach it, in place of the one that is there.

        Args:
            pretrained_model_name_or_path: Folder of an adapter or of a run, a safetensors file, or
                a Hub id.
            weight_name: A safetensors file in that folder or repository.
            subfolder, revision, token, cache_dir, local_files_only: As in diffusers.
            dtype: Of the experts; the transformer's where None. Routers stay in float32.
            adapter_name: Refused: a pipeline has one adapter, with any number of experts.

        Raises:
            FileNotFoundError: If there is no adapter.
            prw.CheckpointError: If it is damaged, a LoRA, or something else.
            TypeError: If no place is given.
            ValueError: If it was made for another base, or an argument cannot be. The pipeline is
                then as it was.
        """
        if adapter_name is not None:
            raise ValueError(
                f"A pipeline has one PRW adapter at a time, so it has no name {adapter_name!r}: "
                "leave adapter_name out, choose among its experts with route=, or give another "
                "adapter a pipeline of its own, CoLoGenPipeline.from_pipe(pipe, prw=other)."
            )
        if not isinstance(pretrained_model_name_or_path, (str, os.PathLike)):
            raise TypeError(
                "load_prw_weights takes a folder, a file or a Hub id, got "
                f"{type(pretrained_model_name_or_path).__name__}: an adapter that is loaded "
                "already joins with CoLoGenPipeline.from_pipe(pipe, prw=adapter)."
            )
        if dtype is not None and dtype not in WORKING:
            names = ", ".join(str(known).removeprefix("torch.") for known in WORKING)
            raise ValueError(f"Experts compute in one of {names}, not in {dtype}.")
        options = {
            "subfolder": subfolder,
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
        }
        adapter, stream = open_adapter(pretrained_model_name_or_path, weight_name, options)
        own = self.transformer.dtype
        adapter.to(dtype or (own if own in WORKING else torch.bfloat16))
        adapter.to(self._execution_device)  # type: ignore[attr-defined]
        attach(self.transformer, adapter)
        self.register_modules(prw=adapter)  # type: ignore[attr-defined]
        self.coredi = stream

    def unload_prw_weights(self) -> None:
        """Stock processors again; nothing is left of the adapter. Without one, nothing happens."""
        detach(self.transformer)
        self.register_modules(prw=None)  # type: ignore[attr-defined]
        self.coredi = None

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict: Any, *args: Any, **kwargs: Any
    ) -> None:
        """As in FluxPipeline: a LoRA of the base, beside the adapter.

        Raises:
            prw.CheckpointError: If it is an adapter, or an expert inside one.
        """
        given = pretrained_model_name_or_path_or_dict
        if isinstance(given, (str, os.PathLike)):
            inner = (kwargs.get("subfolder"), kwargs.get("weight_name"))
            require_lora(Path(given, *(name for name in inner if name)))
        super().load_lora_weights(given, *args, **kwargs)  # type: ignore[misc]


def _pipeline(given: str | os.PathLike[str]) -> str:
    """Folder or Hub id of a pipeline.

    Raises:
        FileNotFoundError: If it is a folder of something else, or can only be one that is missing.
    """
    text = os.fspath(given)
    folder = Path(text)
    if text == EMBEDDED:
        return resolve_base(EMBEDDED)
    require_place(text)
    if not folder.is_dir() or (folder / "model_index.json").is_file():
        return text
    if is_adapter(folder):
        raise FileNotFoundError(
            f"{folder} is an adapter without its base: load the base, then call "
            "pipe.load_prw_weights(...) with it."
        )
    raise FileNotFoundError(
        f"{folder} is neither a pipeline (no model_index.json) nor a run (no run.json)."
    )


def _adapter_dtype(dtype: Any) -> torch.dtype:
    """What diffusers' `dtype`, which may differ by component, says of the experts."""
    if isinstance(dtype, Mapping):
        dtype = dtype.get(FOLDER, dtype.get("default"))
    return dtype if isinstance(dtype, torch.dtype) and dtype in WORKING else torch.float32
