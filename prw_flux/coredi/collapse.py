"""Noticing that the projected features collapse, and saying what helps."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import final

import torch

from prw_flux.coredi.config import CoReDiConfig
from prw_flux.coredi.model import CoReDi, Noised
from prw_flux.coredi.statistics import effective_rank

logger = logging.getLogger(__name__)


def facts(coredi: CoReDi, batch: Noised) -> dict[str, float]:
    """For the log of a step: effective rank, and scale before the normalisation.

    ``feature_rank`` lies between 0 and `channels`; ``feature_scale`` is the mean standard deviation
    of the projected channels, which shrinks where nothing holds it.
    """
    with torch.no_grad():
        raw = coredi.projection.linear(batch.features_BRCD).flatten(0, -2)
    return {
        "feature_rank": float(effective_rank(batch.projected_BRCK)),
        "feature_scale": float(raw.std(dim=0, correction=0).mean()),
    }


FAINT = 0.5
"""Scale below which features that nothing normalises drown in their noise, which has scale 1."""


@final
class Watch:
    """Warns once per stage when channels become copies of each other, or vanish.

    Channels that become copies lower the effective rank; without normalisation they can also shrink
    until there is nothing left to predict, at any rank.

    Args:
        config: whose `warn_rank`, `channels` and safeguards are meant.
    """

    def __init__(self, config: CoReDiConfig) -> None:
        self.config = config
        self._told = False

    def look(self, found: Mapping[str, float], step: int) -> bool:
        """Warn where the `facts` of a step are too low; whether it was this call that warned."""
        config, threshold = self.config, self.config.warn_rank * self.config.channels
        narrow = not found["feature_rank"] >= threshold
        faint = config.normalise == "none" and not found["feature_scale"] >= FAINT
        if self._told or not (narrow or faint):
            return False
        self._told = True
        problem = (
            f"effective rank {found['feature_rank']:.1f} of {config.channels} channels at step "
            f"{step}, below {threshold:.1f}"
            if narrow
            else f"scale {found['feature_scale']:.2f} at step {step}, beside noise of scale 1"
        )
        logger.warning("the projected features collapse: %s; %s", problem, remedy(config, narrow))
        return True


def remedy(config: CoReDiConfig, narrow: bool) -> str:
    """What to change first, given what is on, where features are too narrow or else too faint."""
    if not config.learn_projection:
        return "set coredi.channels lower, or coredi.normalise=batch"
    if narrow and config.orthogonality + config.covariance == 0.0:
        return "set coredi.covariance=0.1 or coredi.orthogonality=0.1"
    if not config.stop_gradient:
        return "set coredi.stop_gradient=true"
    if config.normalise == "none":
        return "set coredi.normalise=batch"
    return "raise coredi.covariance or coredi.orthogonality, or lower coredi.lr"
