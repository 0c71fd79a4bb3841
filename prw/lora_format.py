"""One expert as PEFT writes a LoRA: the tensor names and the configuration that stock tools read.

Shape suffixes: D input width, O output width, R rank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor

from prw.errors import CheckpointError
from prw.experts import Expert
from prw.pool import Pool

WEIGHTS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"


def keys(target: str) -> tuple[str, str]:
    """The names of ``A`` and ``B`` of the layer `target`."""
    return f"base_model.model.{target}.lora_A.weight", f"base_model.model.{target}.lora_B.weight"


def _layers(
    pools: Mapping[str, Pool], index: int, only: Collection[str] | None = None
) -> Iterator[tuple[str, str, Expert]]:
    """Target, projection and expert of each adapted layer, or of those in `only`."""
    for pool in pools.values():
        for projection, target in pool.targets.items():
            if only is None or target in only:
                yield target, projection, pool.expert(index)


def live_targets(pools: Mapping[str, Pool], index: int) -> set[str]:
    """The layers where the experts with this index are not all zero; all of them if none is."""
    everything, live = set(), set()
    for target, projection, expert in _layers(pools, index):
        everything.add(target)
        if any(bool(factor.any()) for factor in expert.frozen_pair(projection)):
            live.add(target)
    return live or everything


def tensors(
    pools: Mapping[str, Pool], index: int, only: Collection[str] | None = None
) -> dict[str, Tensor]:
    """The factors of the experts with this index (those in `only`), by their names in the file."""
    found: dict[str, Tensor] = {}
    for target, projection, expert in _layers(pools, index, only):
        for key, factor in zip(keys(target), expert.pair(projection), strict=True):
            found[key] = factor.detach().contiguous()
    return found


def settings(pools: Mapping[str, Pool], index: int, only: Collection[str] | None = None) -> str:
    """The text of ``adapter_config.json``; the first layer gives ``r`` and ``lora_alpha``.

    Layers that differ from it stand in ``rank_pattern`` and ``alpha_pattern``, by full name.

    ``target_modules`` is one expression, because PEFT matches expressions with whole names and the
    names of a list with endings: ``["0"]`` would adapt ``layers.0`` as well, with a random A.
    """
    ranks, alphas = {}, {}
    for target, projection, expert in _layers(pools, index, only):
        ranks[target] = expert.rank(projection)
        alphas[target] = expert.alpha(projection)
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return json.dumps(
        {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": None,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {_exactly(t): r for t, r in ranks.items() if r != rank},
            "alpha_pattern": {_exactly(t): a for t, a in alphas.items() if a != alpha},
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "target_modules": "|".join(re.escape(target) for target in sorted(ranks)),
        },
        indent=2,
    )


def alphas_of(text: str, pools: Mapping[str, Pool], source: str) -> dict[tuple[str, str], float]:
    """The alpha of each pool and projection, from the text of an ``adapter_config.json``.

    Raises:
        CheckpointError: the text is no such configuration.
    """
    try:
        data: Any = json.loads(text)
        alpha, pattern = float(data["lora_alpha"]), dict(data.get("alpha_pattern") or {})
        return {
            (name, projection): float(pattern.get(_exactly(target), alpha))
            for name, pool in pools.items()
            for projection, target in pool.targets.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{source} is damaged: {error}") from None


def _exactly(target: str) -> str:
    """PEFT's patterns are expressions that match at the end of a name; this one matches one."""
    return f"^{re.escape(target)}"


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
