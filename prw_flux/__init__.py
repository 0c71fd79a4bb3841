"""prw_flux: CoLoGen on FLUX.1, built on prw."""

try:
    from diffusers import ModelMixin as ModelMixin  # diffusers looks for it beside PRWAdapter
except ModuleNotFoundError as error:
    if error.name != "diffusers":
        raise
    raise ModuleNotFoundError(
        'prw_flux needs the extra flux: pip install "prw[flux]" (in a checkout: ".[flux]")',
        name="diffusers",
    ) from None

from prw_flux import _imports as _imports  # before anything imports diffusers' FLUX
from prw_flux import recipes, tiny
from prw_flux.adapter import PRWAdapter, TaskSpec
from prw_flux.attach import attach, attached, detach
from prw_flux.output import CoLoGenPipelineOutput
from prw_flux.passes import TwoPass, main_pass, source_pass
from prw_flux.pipeline import CoLoGenPipeline
from prw_flux.source_cache import FluxCall, SourceCache, SourceMeta

__all__ = [
    "CoLoGenPipeline",
    "CoLoGenPipelineOutput",
    "FluxCall",
    "PRWAdapter",
    "SourceCache",
    "SourceMeta",
    "TaskSpec",
    "TwoPass",
    "attach",
    "attached",
    "detach",
    "main_pass",
    "recipes",
    "source_pass",
    "tiny",
]
