"""PRWAdapter: the experts and routers of all blocks of one FLUX.1 transformer.

A component of its own, beside the transformer: the stock model keeps its state dict, can be
quantised, offloaded and fused, and an adapter saves, loads and travels without it.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self
from uuid import uuid4

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor, nn

import prw
from prw import Pool
from prw.checkpoint import Stored, read
from prw_flux.locate import (
    adapter_folder,
    base_fingerprint,
    stored_settings,
)
from prw_flux.tasks import TASKS

CHOICES: Mapping[str, tuple[str, ...]] = {
    "source_timestep": ("zero", "current"),
    "source_pooled": ("task", "prompt", "empty"),
}


@dataclass(frozen=True)
class TaskSpec:
    """What sampling needs to know of a task.

    Attributes:
        name: Its name.
        sentence: Fixed text, whose pooled embedding modulates the source.
        aligned: Whether source and result share their places.
    """

    name: str
    sentence: str
    aligned: bool


class PRWAdapter(ModelMixin, ConfigMixin):
    """One pool of K/V experts per block; stages are opened and closed through `weave`.

    Args:
        num_layers, num_single_layers, inner_dim: Of the transformer.
        rank, alpha: Of every expert; alpha None is 2 rank.
        granularity: "sample" (one expert per image and block) or "token".
        gate: "softmax" or "one".
        router_train: "all" columns of the router learn in a stage, or only the "new" one.
        noise: Whether routers explore in training.
        source_timestep: "zero" (the source is recorded once) or "current" (once per step).
        source_pooled: Whose pooled text modulates the source: "task", "prompt" or "empty".
        tasks: name -> {"sentence": str, "aligned": bool}; None takes the five of `prw_flux.tasks`.
        resolution: Side in pixels of a square with the area of the training images, if known.
        trained: Names of the tasks that a stage has trained; None where that is not known.
    """

    _no_split_modules = ["Pool"]

    @register_to_config
    def __init__(
        self,
        num_layers: int,
        num_single_layers: int,
        inner_dim: int,
        rank: int = 128,
        alpha: float | None = None,
        granularity: Literal["sample", "token"] = "sample",
        gate: Literal["softmax", "one"] = "softmax",
        router_train: Literal["all", "new"] = "all",
        noise: bool = True,
        source_timestep: Literal["zero", "current"] = "zero",
        source_pooled: Literal["task", "prompt", "empty"] = "task",
        tasks: Mapping[str, Mapping[str, Any]] | None = None,
        resolution: int | None = None,
        trained: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        _require_choice("source_timestep", source_timestep)
        _require_choice("source_pooled", source_pooled)
        settings = prw.Config(
            rank=rank,
            alpha=alpha,
            granularity=granularity,
            gate=gate,
            router_train=router_train,
            noise=noise,
        )
        names = [f"transformer_blocks.{i}.attn" for i in range(num_layers)]
        names += [f"single_transformer_blocks.{i}.attn" for i in range(num_single_layers)]
        projections = {"to_k": inner_dim, "to_v": inner_dim}
        pools = {name: Pool(name, inner_dim, projections, settings) for name in names}
        self.blocks = nn.ModuleList(pools.values())
        self.weave = prw.Weave(pools, settings, fingerprint={})
        self._identity = uuid4().hex
        self.known_digest = ("", "")  # (state_id, digest), see prw_flux.digests

    @classmethod
    def for_transformer(cls, transformer: FluxTransformer2DModel, **settings: Any) -> Self:
        """An adapter without experts that fits `transformer`, where that runs, in float32."""
        adapter: Self = cls(
            num_layers=len(transformer.transformer_blocks),
            num_single_layers=len(transformer.single_transformer_blocks),
            inner_dim=transformer.inner_dim,
            **settings,
        )
        adapter.weave.fingerprint = base_fingerprint(transformer)
        adapter.to(get_module_execution_device(transformer))
        return adapter

    # Tasks and routes -------------------------------------------------------------------------

    @property
    def tasks(self) -> dict[str, TaskSpec]:
        """The tasks this adapter knows, by name."""
        known = self.config.tasks
        if known is None:
            return {t.name: TaskSpec(t.name, t.sentence, t.aligned) for t in TASKS.values()}
        return {
            name: TaskSpec(name, str(spec["sentence"]), bool(spec["aligned"]))
            for name, spec in known.items()
        }

    def add_task(self, name: str, sentence: str, aligned: bool) -> None:
        """Record a task in the configuration, so that a saved adapter knows it."""
        specs = [*self.tasks.values(), TaskSpec(name, sentence, aligned)]
        known = {t.name: {"sentence": t.sentence, "aligned": t.aligned} for t in specs}
        self.register_to_config(tasks=known)

    def note_trained(self, name: str) -> None:
        """Record that a stage trains this task; where earlier ones are not known, so it stays."""
        known = self.config.trained
        if known is not None and name not in known:
            self.register_to_config(trained=[*known, name])

    def require_trained(self, name: str) -> None:
        """Raise ValueError for a task that no stage has trained, as far as that is known."""
        known = self.config.trained
        if known is not None and name not in known:
            raise ValueError(
                f"This adapter was not trained for {name!r}, only for {', '.join(known) or 'none'}:"
                " choose one of those, or train a stage for it."
            )

    def task(self, name: str | None) -> TaskSpec:
        """A task by name, or for None the only one (that was trained, as far as that is known).

        Raises:
            ValueError: Listing the known tasks.
        """
        known, trained = self.tasks, self.config.trained
        if name is None and trained:
            known = {one: known[one] for one in trained if one in known}
        if name is None and len(known) == 1:
            return next(iter(known.values()))
        if name is None or name not in known:
            asked = "Choose a task" if name is None else f"There is no task {name!r}"
            raise ValueError(f"{asked}: this adapter knows {', '.join(known) or 'none'}.")
        return known[name]

    def route(self, route: str) -> prw.Call:
        """The deterministic routing call of "free", "stage:NAME" or "expert:NAME".

        Raises:
            ValueError: For another form, or a stage that does not exist.
        """
        kind, _, name = route.partition(":")
        if route == "free":
            return self.weave.pinned()
        if kind not in ("stage", "expert") or not name:
            raise ValueError(f'A route is "free", "stage:NAME" or "expert:NAME", got {route!r}.')
        stages = [stage.name for stage in self.weave.stages]
        if name not in stages:
            near = difflib.get_close_matches(name, stages, n=1)
            hint = (
                f"did you mean {near[0]!r}?" if near else f"known: {', '.join(stages) or 'none'}."
            )
            raise ValueError(f"Route {route!r} names no stage of this adapter; {hint}")
        if kind == "stage":
            return self.weave.pinned(stage=name)
        return self.weave.pinned(force=name)

    @property
    def pools(self) -> tuple[Pool, ...]:
        """One pool per block, in the order in which the blocks run."""
        return tuple(self.weave.pools.values())

    def resolve(self, call: prw.Call | None) -> prw.Call:
        """The call of a pass, fixed when the pass begins, for recomputation to see the same.

        None is the call that is bound to the weave.
        """
        return call if call is not None else self.pools[0].slot.call

    # Modulation of the source -----------------------------------------------------------------

    def source_time(self, timestep_B: Tensor) -> Tensor:
        """Time that modulates the source beside a noisy latent at `timestep_B`."""
        zero = self.config.source_timestep == "zero"
        return torch.zeros_like(timestep_B) if zero else timestep_B

    def source_guidance(self, guidance_B: Tensor | None) -> Tensor | None:
        """Guidance that modulates the source; None is 1, the value in training.

        Under source_timestep "zero" it never follows the call, or a cache would depend on it.
        """
        return None if self.config.source_timestep == "zero" else guidance_B

    def source_text(self, sentence: str) -> str | None:
        """The text whose pooled embedding modulates the source of a task with this sentence.

        None is the prompt, whatever it is.
        """
        texts = {"task": sentence, "prompt": None, "empty": ""}
        return texts[self.config.source_pooled]

    # Identity ---------------------------------------------------------------------------------

    @property
    def state_id(self) -> str:
        """Changes whenever a cache of this adapter may have become stale.

        Covers the object, its stages, and every write to its parameters that autograd sees. Moving
        the adapter between devices, as offloading does, is no change.
        """
        stages = ",".join(f"{s.name}{'*' if s.open else ''}" for s in self.weave.stages)
        writes = tuple((id(p), p._version) for p in self.parameters())
        return f"{self._identity}/{stages}/{hash(writes):x}"

    # Files ------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | os.PathLike[str], **_: Any) -> None:
        """Write the folder of `Weave.save` with a `config.json` beside it, all or nothing."""
        self.weave.save(Path(save_directory), extra={"config.json": self.to_json_string()})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> Self:
        """Load a folder or Hub id that `save_pretrained` wrote; hashes are verified.

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            kwargs: `subfolder`, `revision`, `token` and `cache_dir` as in diffusers; `torch_dtype`
                casts the experts, while routers stay in float32. Others are ignored.

        Raises:
            FileNotFoundError: If there is no such adapter.
            prw.CheckpointError: If it is damaged, or was written by a newer version.
        """
        folder = adapter_folder(pretrained_model_name_or_path, kwargs)
        settings = stored_settings(folder)
        adapter = cls.restored(settings, str(folder / "config.json"), read(folder))
        dtype = kwargs.get("torch_dtype", kwargs.get("dtype"))
        if isinstance(dtype, torch.dtype):
            adapter.to(dtype)
        return adapter

    @classmethod
    def restored(cls, settings: Mapping[str, Any], place: str, stored: Stored) -> Self:
        """The adapter of these settings and this checkpoint, for inference.

        Args:
            settings: what config.json says.
            place: of config.json, for messages.
            stored: read and verified.

        Raises:
            prw.CheckpointError: If they do not go together.
        """
        try:
            adapter: Self = cls.from_config(settings)
        except (TypeError, ValueError) as problem:
            raise prw.CheckpointError(f"{place} is damaged: {problem}") from None
        adapter.weave.fingerprint = dict(stored.fingerprint)
        adapter.weave.adopt(stored)
        adapter.eval()
        return adapter

    # Devices ----------------------------------------------------------------------------------

    def enable_group_offload(self, onload_device: torch.device, **_: Any) -> None:
        """Move to `onload_device` and stay: 3.8 % of FLUX.1 with five experts of rank 128.

        Group offloading waits for a layer to be called; experts are reached from the attention.
        """
        self.to(onload_device)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As `torch.nn.Module.to`; routers never go below float32.

        ModelMixin's warns at every cast that an empty list of modules should be kept in float32.
        """
        nn.Module.to(self, *args, **kwargs)
        return self


# diffusers records this name with a pipeline's components: the class may move, the name may not
PRWAdapter.__module__ = "prw_flux"


def _require_choice(name: str, value: str) -> None:
    if value not in CHOICES[name]:
        raise ValueError(f"{name} must be one of {', '.join(CHOICES[name])}, got {value!r}.")
