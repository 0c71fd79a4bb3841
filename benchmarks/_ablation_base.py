"""A base that has learnt less: tiny-flux with a share of its pretraining, for the diagnosis of H1.

The autoencoder is the shipped one, so that the latents, the samples and the ceiling stay the same.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from prw_flux import tiny
from prw_flux.tiny.base import BaseRecipe
from prw_flux.tiny.build import CARD, build

logger = logging.getLogger(__name__)


def base_folder(share: float) -> Path:
    """tiny-flux after a share of its pretraining; built at the first call, kept for the next.

    Args:
        share: of the steps of both phases, in (0, 1]; 1 is the shipped base.
    """
    if share == 1.0:
        return tiny.path()
    name = f"prw-ablation-{os.getuid()}/tiny-flux-{share:g}"
    folder = Path(tempfile.gettempdir()) / name
    if not (folder / CARD).is_file():
        logger.warning("building a base with %g of its pretraining in %s", share, folder)
        shutil.copytree(tiny.path() / "vae", folder / "vae", dirs_exist_ok=True)
        build(folder, recipe=shortened(share))
    return folder


def shortened(share: float) -> BaseRecipe:
    """The recipe of the shipped base, all phases at a share of their length."""
    whole = BaseRecipe()
    phases = tuple(replace(p, steps=max(1, round(p.steps * share))) for p in whole.phases)
    return replace(whole, phases=phases)
