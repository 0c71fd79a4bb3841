"""Whether an adapter and a transformer, or a recorded source, go together."""

from __future__ import annotations

import logging

from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.utils.torch_utils import get_module_execution_device

from prw.fingerprint import TOLERANCE, difference, drift
from prw_flux.adapter import PRWAdapter
from prw_flux.locate import base_fingerprint
from prw_flux.source_cache import Recorded

logger = logging.getLogger(__name__)


def require_fit(adapter: PRWAdapter, transformer: FluxTransformer2DModel) -> None:
    """Raise unless the adapter was made for `transformer`; warn where only weights differ."""
    config = adapter.config
    here = (config.num_layers, config.num_single_layers, config.inner_dim)
    there = (
        len(transformer.transformer_blocks),
        len(transformer.single_transformer_blocks),
        transformer.inner_dim,
    )
    if here != there:
        raise ValueError(
            f"This adapter was made for {here[0]} + {here[1]} blocks of width {here[2]}, the "
            f"transformer has {there[0]} + {there[1]} of width {there[2]}: load the base it "
            "was trained on, or an adapter of this one."
        )
    if transformer.config.in_channels != transformer.out_channels:
        raise ValueError(
            f"The transformer reads {transformer.config.in_channels} channels and writes "
            f"{transformer.out_channels}: a source needs a FLUX.1 without channel conditioning "
            "(dev, schnell, Kontext), not Fill, Canny or Depth."
        )
    _require_base(adapter, transformer)


def require_device(adapter: PRWAdapter, transformer: FluxTransformer2DModel) -> None:
    """Raise unless the adapter lies where `transformer` computes.

    Offloading moves the layers of a transformer to a device as they run. It leaves the adapter
    alone, whose experts no layer calls, so the adapter has to be there already.
    """
    here = next((p.device for p in adapter.parameters()), None)
    there = get_module_execution_device(transformer)
    if here is None or (here.type, here.index or 0) == (there.type, there.index or 0):
        return
    if here.type == "meta":
        raise ValueError(
            "The weights of this adapter are on the meta device (offloading was enabled with "
            "the adapter among the offloaded models, or it was never loaded): load it again "
            "and leave it out of offloading, as CoLoGenPipeline does."
        )
    raise ValueError(
        f"The adapter is on {here}, but the transformer computes on {there}: call "
        f"adapter.to({str(there)!r}). Offloading never moves an adapter that joined after it "
        "was enabled."
    )


def require_layers(adapter: PRWAdapter, cache: Recorded) -> None:
    """Raise unless `cache` has one slot per block."""
    if len(cache) != len(adapter.blocks):
        raise ValueError(
            f"A source cache of {len(cache)} blocks does not fit {len(adapter.blocks)} blocks."
        )


def _require_base(adapter: PRWAdapter, transformer: FluxTransformer2DModel) -> None:
    if not adapter.weave.fingerprint:  # built by hand, from shapes alone
        return
    found = base_fingerprint(transformer)
    problem = difference(adapter.weave.fingerprint, found)
    if problem is not None:
        raise ValueError(
            f"This adapter was made for another base: {problem}; load the base it was trained "
            "on, or an adapter of this one."
        )
    distance = drift(adapter.weave.fingerprint, found)
    if distance > TOLERANCE:
        logger.warning(
            "The weights of this transformer differ by %.1f%% from those the adapter was "
            "trained on; expected for a quantised base, else check which base it was.",
            100.0 * distance,
        )
