"""AdamW over what may learn, and its learning rate as a function of the step."""

from __future__ import annotations

import math

import torch

from prw_flux.adapter import PRWAdapter
from prw_flux.config import OptimizerConfig
from prw_flux.coredi.model import CoReDi
from prw_flux.curriculum import Stage


def new_optimizer(
    adapter: PRWAdapter, config: OptimizerConfig, coredi: CoReDi | None = None
) -> torch.optim.AdamW:
    """AdamW over what learns now; experts, routers and a feature stream in groups of their own."""
    kinds: dict[str, list[torch.nn.Parameter]] = {"experts": [], "columns": []}
    for pool in adapter.weave.pools.values():
        for name, parameter in pool.learners():
            kinds[name.split(".")[0]].append(parameter)
    groups = [
        {"params": kinds["experts"], "weight_decay": config.weight_decay, "factor": 1.0},
        {"params": kinds["columns"], "weight_decay": 0.0, "factor": config.router_lr},
    ]
    if coredi is not None:
        groups.append(
            {"params": coredi.learners(), "weight_decay": 0.0, "factor": coredi.config.lr}
        )
    beta1, beta2 = config.betas
    return torch.optim.AdamW(groups, lr=1e-4, betas=(beta1, beta2), eps=config.eps, fused=True)


def learning_rate(config: OptimizerConfig, stage: Stage, step: int) -> float:
    """Linear warm-up, then constant, or half a cosine down to a twentieth."""
    if step < config.warmup:
        return stage.lr * (step + 1) / config.warmup
    if config.decay == "constant":
        return stage.lr
    done = (step - config.warmup) / max(1, stage.steps - config.warmup)
    return stage.lr * (0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * done)))
