"""Consolidation: a router learns to route what it remembers as every finished stage routed it.

Shape suffixes: M remembered inputs, D input width, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prw.columns import Columns
from prw.errors import StageError
from prw.pool import Pool
from prw.router import Router


def consolidate(pools: Mapping[str, Pool], stages: int, iterations: int) -> float:
    """Fit the live columns of all pools, or of none; see `Weave.consolidate`.

    Args:
        pools: the routed groups, between stages.
        stages: how many there are; the snapshot of the last one is renewed.
        iterations: of L-BFGS, at most.

    Returns:
        The share of the remembered inputs that go where their stage sent them, mean over groups.

    Raises:
        StageError: a group remembers nothing, or a fit is not finite; nothing is changed then.
    """
    found = {}
    for group, pool in pools.items():
        known = remembered(pool.router, pool.columns, stages)
        if known is None:
            raise StageError(f"{group!r} remembers nothing yet; run the model in remember()")
        fitted_ED = fit(pool.router, known, pool.columns.state()[0], iterations)
        found[group] = known, centred(pool.router, known, fitted_ED)
        if not found[group][1].isfinite().all():
            raise StageError(f"the fit for {group!r} is not finite; nothing was changed")
    for group, (_, columns_ED) in found.items():
        pools[group].columns.set_signal(columns_ED)
        pools[group].columns.renew_snapshot(stages - 1)
    shares = [agreement(pools[group].router, *fitted) for group, fitted in found.items()]
    return sum(shares) / len(shares)


@dataclass(frozen=True)
class Remembered:
    """Inputs of finished stages and how each was routed at the end of its own.

    Attributes:
        h_MD: inputs, fp64.
        p_ME: probabilities under the snapshot of the input's stage, 0 for later experts, fp64.
    """

    h_MD: Tensor
    p_ME: Tensor


def remembered(router: Router, columns: Columns, stages: int) -> Remembered | None:
    """What the columns remember of its first `stages` stages; None where that is nothing."""
    inputs: list[Tensor] = []
    routings: list[Tensor] = []
    for stage in range(stages):
        h_MD, kept = columns.memory(stage).double(), columns.snapshot(stage)
        if kept is None or not len(h_MD):
            continue
        probs = log_probabilities(router, h_MD, kept[0].double()).exp()
        inputs.append(h_MD)
        routings.append(F.pad(probs, (0, stages - 1 - stage)))
    return Remembered(torch.cat(inputs), torch.cat(routings)) if inputs else None


def fit(router: Router, known: Remembered, start_ED: Tensor, iterations: int) -> Tensor:
    """The columns that route the remembered inputs as their stages did, found from `start_ED`.

    ``min_W  mean_M KL(p || softmax(h W))`` by L-BFGS: for the routers of `prw.router` multinomial
    logistic regression with soft targets, so convex.

    Returns:
        ``[E, D]`` in fp64.
    """
    with torch.enable_grad(), torch.autocast(start_ED.device.type, enabled=False):
        columns_ED = start_ED.detach().to(torch.float64, copy=True).requires_grad_()
        solver = torch.optim.LBFGS([columns_ED], max_iter=iterations, line_search_fn="strong_wolfe")

        def objective() -> Tensor:
            solver.zero_grad()
            log_q_ME = log_probabilities(router, known.h_MD, columns_ED)
            loss = F.kl_div(log_q_ME, known.p_ME, reduction="batchmean")
            loss.backward()
            return loss

        solver.step(objective)
    return columns_ED.detach()


def log_probabilities(router: Router, h_MD: Tensor, columns_ED: Tensor) -> Tensor:
    """``log softmax`` of the logits without noise, ``[M, E]``."""
    signal = columns_ED.unbind()
    logits_MC = router.locked(h_MD, signal, [torch.zeros_like(c) for c in signal])
    return logits_MC.log_softmax(-1)[:, : len(signal)]


def centred(router: Router, known: Remembered, columns_ED: Tensor) -> Tensor:
    """The columns plus one common vector, so that the largest logits lie around 0.

    A common vector changes no probability. But the column of the next expert begins at 0, and
    beside logits that have grown it would be as good as locked: its probability, and with it every
    gradient that could raise it, would vanish. Ridge regression, so that any M and D will do. For a
    router of another form a common vector may mean something, and nothing is added.
    """
    if not router.linear:
        return columns_ED
    h_MD = known.h_MD
    top_M = (h_MD @ columns_ED.T).amax(-1)
    gram_DD = h_MD.T @ h_MD
    ridge = 1e-3 * gram_DD.diagonal().mean().clamp(min=1e-30)
    gram_DD.diagonal().add_(ridge)
    shift_D: Tensor = torch.linalg.solve(gram_DD, h_MD.T @ top_M)
    moved_ED: Tensor = columns_ED - shift_D
    return moved_ED


def agreement(router: Router, known: Remembered, columns_ED: Tensor) -> float:
    """Share of the remembered inputs that go where they went at the end of their stage."""
    chosen_M = log_probabilities(router, known.h_MD, columns_ED.double()).argmax(-1)
    return float((chosen_M == known.p_ME.argmax(-1)).double().mean())
