"""Noticing that the projected features collapse, and saying what helps."""

from __future__ import annotations

import logging
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


@final
class Watch:
    """Warns once per stage when the effective rank falls below its threshold.

    Args:
        config: whose `warn_rank`, `channels` and safeguards are meant.
    """

    def __init__(self, config: CoReDiConfig) -> None:
        self.config = config
        self._told = False

    def look(self, rank: float, step: int) -> bool:
        """Warn where `rank` at `step` is too low; whether it was this call that warned."""
        threshold = self.config.warn_rank * self.config.channels
        if self._told or rank >= threshold:
            return False
        self._told = True
        logger.warning(
            "the projected features collapse: effective rank %.1f of %d channels at step %d, below "
            "%.1f; %s",
            rank, self.config.channels, step, threshold, remedy(self.config),
        )  # fmt: skip
        return True


def remedy(config: CoReDiConfig) -> str:
    """What to change first, given what is on."""
    if not config.learn_projection:
        return "the encoder's features are narrow for this data: set coredi.channels lower"
    if not config.stop_gradient:
        return "set coredi.stop_gradient=true"
    if config.normalise == "none":
        return "set coredi.normalise=batch"
    if config.orthogonality + config.covariance == 0.0:
        return "set coredi.orthogonality=0.1 or coredi.covariance=0.01"
    return "raise coredi.orthogonality or coredi.covariance, or lower coredi.lr"
