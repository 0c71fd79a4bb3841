"""Where a pipeline and its adapter come from: folders, runs, files, the Hub, other pipelines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel

from prw import CheckpointError
from prw_flux.adapter import PRWAdapter
from prw_flux.adapter_files import is_adapter, open_adapter
from prw_flux.attach import attach, detach
from prw_flux.locate import EMBEDDED, is_run, resolve_base, resolve_run

WORKING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class PRWLoaderMixin:
    """Loading, for a pipeline whose components are FluxPipeline's and `prw`."""

    transformer: FluxTransformer2DModel
    prw: Any

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
            pretrained_model_name_or_path: A folder that `save_pretrained` wrote, any FLUX.1
                pipeline (then without adapter), "tiny-flux", or a run.
            base: Another place for the base of a run, when it is not where the run says.
            kwargs: As in `DiffusionPipeline.from_pretrained`. `dtype` (float32 by default) casts
                the experts too, routers stay in float32.

        Raises:
            FileNotFoundError: If a local folder is neither, or the base of a run is missing.
            ValueError: If `base` is given for something that is not a run.
        """
        folder = Path(pretrained_model_name_or_path)
        # without a dtype diffusers loads float32 and transformers what the file has
        kwargs.setdefault("dtype", kwargs.pop("torch_dtype", torch.float32))
        if is_run(folder):
            location, revision = resolve_run(folder, base)
            adapter = PRWAdapter.from_pretrained(folder / "adapter", dtype=kwargs["dtype"])
            if revision is not None:
                kwargs.setdefault("revision", revision)
            pipe: Self = super().from_pretrained(  # type: ignore[misc]
                location, prw=adapter, **kwargs
            )
            return pipe
        if base is not None:
            raise ValueError(f"{folder} is not a run (it has no run.json): leave base out.")
        if str(folder) == EMBEDDED:
            pretrained_model_name_or_path = resolve_base(EMBEDDED)
        elif folder.is_dir() and not (folder / "model_index.json").is_file():
            if is_adapter(folder):
                raise FileNotFoundError(
                    f"{folder} is an adapter without its base: load the base, then call "
                    "pipe.load_prw_weights(...) with it."
                )
            raise FileNotFoundError(
                f"{folder} is neither a pipeline (no model_index.json) nor a run (no run.json)."
            )
        pipe = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, **kwargs
        )
        return pipe

    @classmethod
    def from_pipe(
        cls, pipeline: DiffusionPipeline, prw: PRWAdapter | None = None, **components: Any
    ) -> Self:
        """Share the components of any FLUX.1 pipeline; nothing is copied or cast.

        Args:
            pipeline: FluxPipeline, FluxKontextPipeline, a CoLoGenPipeline and so on.
            prw: The adapter; None keeps the one of a CoLoGenPipeline.
            components: Instead of the pipeline's own, as in diffusers.

        Raises:
            TypeError: If it is not a FLUX.1 pipeline, `prw` is no adapter, or a component has no
                place in this pipeline.
            ValueError: If the adapter does not fit the transformer.
        """
        wanted = set(cls._get_signature_keys(cls)[0])  # type: ignore[attr-defined]
        unknown = ", ".join(sorted(set(components) - wanted))
        if unknown:
            raise TypeError(
                f"from_pipe has no argument {unknown}: components are {', '.join(sorted(wanted))}."
            )
        shared = {k: v for k, v in pipeline.components.items() if k in wanted} | components
        if not isinstance(shared.get("transformer"), FluxTransformer2DModel):
            raise TypeError(
                f"{type(pipeline).__name__} has no FLUX.1 transformer: give a FluxPipeline, a "
                "FluxKontextPipeline or another pipeline of FLUX.1."
            )
        if prw is not None:
            shared["prw"] = prw
        return cls(**shared)

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
