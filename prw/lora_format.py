"""One expert as PEFT writes a LoRA: the tensor names and the configuration that stock tools read.

Shape suffixes: D input width, O output width, R rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from prw.errors import CheckpointError
from prw.pool import Pool

WEIGHTS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"


def keys(target: str) -> tuple[str, str]:
    """The names of ``A`` and ``B`` of the layer `target`."""
    return f"base_model.model.{target}.lora_A.weight", f"base_model.model.{target}.lora_B.weight"


def tensors(pools: Mapping[str, Pool], index: int) -> dict[str, Tensor]:
    """All factors of the experts with this index, by their names in the file."""
    found: dict[str, Tensor] = {}
    for pool in pools.values():
        for projection, target in pool.targets.items():
            for key, factor in zip(keys(target), pool.expert(index).pair(projection), strict=True):
                found[key] = factor.detach().contiguous()
    return found


def settings(pools: Mapping[str, Pool], index: int) -> str:
    """The text of ``adapter_config.json``: one rank and one alpha, the same in every pool."""
    expert = next(iter(pools.values())).expert(index)
    return json.dumps(
        {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": None,
            "inference_mode": True,
            "r": expert.rank,
            "lora_alpha": expert.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "target_modules": sorted(t for pool in pools.values() for t in pool.targets.values()),
        },
        indent=2,
    )


def alpha_of(text: str, source: str) -> float:
    """The alpha in the text of an ``adapter_config.json``.

    Raises:
        CheckpointError: the text is no such configuration.
    """
    try:
        data: Any = json.loads(text)
        alpha = float(data["lora_alpha"])
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{source} is damaged: {error}") from None
    return alpha


def pairs(
    found: Mapping[str, Tensor], pools: Mapping[str, Pool], source: str
) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """``A [R, D]`` and ``B [O, R]`` for each pool and projection.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    result = {}
    for name, pool in pools.items():
        for projection, target in pool.targets.items():
            missing = [key for key in keys(target) if key not in found]
            if missing:
                raise CheckpointError(f"{source} holds no tensor {missing[0]!r}")
            A_RD, B_OR = (found[key] for key in keys(target))
            rank = A_RD.shape[0] if A_RD.dim() else 0
            sizes = ((rank, pool.in_features), (pool.projections[projection], rank))
            for key, factor, size in zip(keys(target), (A_RD, B_OR), sizes, strict=True):
                if factor.shape != size or not factor.is_floating_point():
                    raise CheckpointError(
                        f"{source}: tensor {key!r} is {factor.dtype} {list(factor.shape)}, "
                        f"but the layer needs floats {list(size)}"
                    )
            result[name, projection] = (A_RD, B_OR)
    return result
