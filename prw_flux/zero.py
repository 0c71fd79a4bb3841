"""A frozen base whose weights are spread over ranks by DeepSpeed's ZeRO-3.

``accelerate launch --use_deepspeed --zero_stage 3`` asks for it, or a DeepSpeed configuration file
given to it. As under FSDP2, experts and routers are no part of what is sharded. ZeRO-1 and ZeRO-2
shard the moments and gradients of what trains, which is one small expert: they train as DDP does.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import FluxTransformer2DModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from prw import ConfigError
from prw_flux.config import RunConfig

logger = logging.getLogger(__name__)

Settings = Mapping[str, Any]

USED: Final = ("zero_optimization", "aio", "comms_logger")
"""Sections of a DeepSpeed configuration that reach DeepSpeed."""
SILENT: Final = (
    "steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)  # fmt: skip
"""Those that say nothing about the base or the step."""


def is_launched() -> bool:
    """Whether the launcher was told to use DeepSpeed: ``accelerate launch --use_deepspeed``."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def require_installed() -> None:
    """Refuse to go on without DeepSpeed.

    Raises:
        ConfigError: names the command that installs it.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "--use_deepspeed needs deepspeed: pip install '.[deepspeed]', or shard the base with "
            "--use_fsdp --fsdp_version 2"
        )


def is_asked_for() -> bool:
    """Whether the launcher asks for a sharded base: DeepSpeed, and stage 3 of ZeRO."""
    return is_launched() and _stage(asked()) == 3


def asked() -> dict[str, Any]:
    """What the launcher says: the file of ``--deepspeed_config_file``, else its own flags.

    Of the flags ``--zero_stage``, ``--offload_param_device`` and ``--offload_param_nvme_path``
    count, as accelerate passes them on; without any it is stage 2.

    Raises:
        ConfigError: the file cannot be read.
    """
    told = {
        name: os.environ.get(f"ACCELERATE_DEEPSPEED_{name}", "none")
        for name in ("CONFIG_FILE", "OFFLOAD_PARAM_DEVICE", "OFFLOAD_PARAM_NVME_PATH",
                     "OFFLOAD_OPTIMIZER_DEVICE")
    }  # fmt: skip
    if told["CONFIG_FILE"] != "none":
        return _read(Path(told["CONFIG_FILE"]))
    zero: dict[str, Any] = {"stage": int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))}
    for part in ("param", "optimizer"):
        device = told[f"OFFLOAD_{part.upper()}_DEVICE"]
        if device != "none":
            zero[f"offload_{part}"] = {"device": device}
    if told["OFFLOAD_PARAM_NVME_PATH"] != "none" and "offload_param" in zero:
        zero["offload_param"]["nvme_path"] = told["OFFLOAD_PARAM_NVME_PATH"]
    return {"zero_optimization": zero}


def require_fits(config: RunConfig) -> None:
    """Refuse a DeepSpeed configuration that says something else than the run's, or cannot be had.

    A value of ``"auto"`` is the run's.

    Raises:
        ConfigError: names the section or the setting.
    """
    settings = asked()
    _require_agrees(settings, config)
    zero = settings["zero_optimization"]
    if _on(zero.get("offload_optimizer")):
        raise ConfigError(
            "DeepSpeed's offload_optimizer cannot be had: the optimizer is this trainer's, and "
            "holds one small expert; take it out of zero_optimization"
        )
    if _stage(settings) < 3:
        if _on(zero.get("offload_param")):
            raise ConfigError(
                f"DeepSpeed's offload_param needs stage 3, this is stage {_stage(settings)}: "
                "launch with --zero_stage 3"
            )
        if os.environ.get("RANK", "0") == "0":
            logger.warning(
                "ZeRO stage %d would shard the optimizer and gradients of one expert only: every "
                "rank keeps them, as with --multi_gpu; --zero_stage 3 shards the base",
                _stage(settings),
            )
        return
    if config.base.quantisation != "none":
        raise ConfigError(
            f"base.quantisation={config.base.quantisation} cannot be sharded: leave out "
            "--zero_stage 3 (a quantised base fits on every rank), or set base.quantisation=none"
        )
    if not config.checkpointing:
        raise ConfigError(
            "a base sharded by ZeRO-3 needs --set checkpointing=true: its two forwards share one "
            "backward, in which DeepSpeed would gather one block after the other and keep them all"
        )


def shard(transformer: FluxTransformer2DModel) -> None:
    """Spread all weights over all ranks; DeepSpeed gathers them where a layer needs them.

    What a launcher says under ``zero_optimization`` counts: offloading, thresholds, prefetching.
    """
    with redirect_stdout(sys.stderr):  # what it tells is not the answer that a script reads
        import deepspeed
        from deepspeed.utils import logger as told

    told.setLevel(logging.WARNING)
    settings = {name: value for name, value in asked().items() if name in USED}
    # else torch.nn.functional.linear is another one in the whole process from here on; what it is
    # for, weights that wait in the graph, recomputed blocks do not have
    linear = {"memory_efficient_linear": False}
    settings["zero_optimization"] = linear | _without_auto(settings["zero_optimization"])
    settings["train_micro_batch_size_per_gpu"] = 1  # it asks, and nothing here reads it
    settings["bf16"] = {"enabled": transformer.dtype == torch.bfloat16}
    with redirect_stdout(sys.stderr):
        engine = deepspeed.initialize(model=transformer, config=settings)[0]
    # one that stops early leaves a layer whose end DeepSpeed waits for
    recomputed = partial(checkpoint, use_reentrant=False, early_stop=False)
    transformer.enable_gradient_checkpointing(recomputed)

    def release(_module: nn.Module, _arguments: Any) -> None:
        engine.optimizer.release_backward_leftovers()  # a first block, whose input has no gradient

    transformer.register_forward_pre_hook(release, prepend=True)  # and it keeps the engine


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ConfigError(
            f"the DeepSpeed configuration {path} cannot be read as JSON: {problem}"
        ) from problem
    if not isinstance(found, dict) or not isinstance(found.get("zero_optimization"), dict):
        raise ConfigError(
            f"the DeepSpeed configuration {path} has no section zero_optimization; add "
            '{"zero_optimization": {"stage": 3}}'
        )
    return found


def _stage(settings: Settings) -> int:
    stage = settings["zero_optimization"].get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"ZeRO has the stages 0 to 3, zero_optimization.stage is {stage!r}")
    return int(stage)


def _require_agrees(settings: Settings, config: RunConfig) -> None:
    """Refuse what contradicts the run's configuration, and what nothing here would do."""
    parts = int(os.environ.get("WORLD_SIZE", "1")) * config.accumulate
    batches = {stage.batch_size for stage in config.stages}
    ours: dict[str, tuple[set[Any], str]] = {
        "train_batch_size": (batches, "stages.*.batch_size"),
        "train_micro_batch_size_per_gpu": (
            {size // parts for size in batches},
            "stages.*.batch_size / (ranks x accumulate)",
        ),
        "gradient_accumulation_steps": ({config.accumulate}, "accumulate"),
        "gradient_clipping": ({config.optimizer.clip}, "optimizer.clip"),
        "bf16": ({config.precision == "bf16"}, "precision=bf16"),
    }
    for name, value in settings.items():
        if name in USED or name in SILENT or not _on(value):
            continue
        if name not in ours:
            raise ConfigError(
                f"DeepSpeed's {name} would do nothing here, where --set decides everything but how "
                f"the base is sharded: take {name} out of its configuration"
            )
        wanted, setting = ours[name]
        given = True if isinstance(value, Mapping) else value
        if wanted != {given}:
            told = ", ".join(str(x) for x in sorted(wanted))
            raise ConfigError(
                f'DeepSpeed\'s {name} is {given}, but {setting} is {told}: write "auto" for it'
            )


def _on(value: Any) -> bool:
    """Whether a section or a value asks for something."""
    if isinstance(value, Mapping):
        if "enabled" in value:
            return value["enabled"] is True
        if "device" in value:
            return value["device"] not in (None, "none")
        return bool(value)
    return value not in (None, False, "auto")


def _without_auto(section: Settings) -> dict[str, Any]:
    """A section with DeepSpeed's defaults for what is left to the trainer."""
    return {
        name: _without_auto(value) if isinstance(value, Mapping) else value
        for name, value in section.items()
        if value != "auto"
    }
