"""A frozen base in fewer bits: diffusers' casting to fp8, or its quantisers for int8 and nf4.

Experts and routers are not touched: they are fp32 whatever the base is stored in.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel

from prw import ConfigError

logger = logging.getLogger(__name__)

PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}


def loading(kind: str, compute: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` is told so that the transformer is quantised while it is loaded.

    Args:
        kind: ``base.quantisation``.
        compute: dtype that the layers compute in.

    Raises:
        ConfigError: what it needs is not here.
    """
    if kind not in PACKAGES:
        return {}
    if importlib.util.find_spec(PACKAGES[kind]) is None:
        raise ConfigError(
            f"base.quantisation={kind} needs {PACKAGES[kind]}: pip install '.[quantised]', or set "
            "base.quantisation=fp8, which needs nothing"
        )
    if kind == "nf4" and not torch.cuda.is_available():
        raise ConfigError(
            "base.quantisation=nf4 needs a GPU, which diffusers' quantiser asks for: set "
            "base.quantisation=fp8 or int8"
        )
    import diffusers

    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        config: Any = diffusers.TorchAoConfig(Int8WeightOnlyConfig())
    else:
        config = diffusers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
        )
    return {
        "quantization_config": diffusers.PipelineQuantizationConfig(
            quant_mapping={"transformer": config}
        )
    }


def narrow(transformer: FluxTransformer2DModel, kind: str, compute: torch.dtype) -> None:
    """Store the weights of the layers in fp8 where that is asked for; they compute in `compute`.

    Call it after an adapter has taken its sample of the base.
    """
    if kind == "fp8":
        transformer.enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn, compute_dtype=compute
        )


def usable(kind: str) -> str:
    """How the base of a trained run can be stored here: as it was, but for nf4 without a GPU."""
    if kind == "nf4" and not torch.cuda.is_available():
        logger.warning("Without a GPU the nf4 base of this run is loaded whole, in float32.")
        return "none"
    return kind


def place(
    pipe: DiffusionPipeline, kind: str, compute: torch.dtype, device: torch.device | str
) -> None:
    """Bring a loaded pipeline to where it generates.

    A quantised base is one for a small card: there each model is on it only while it runs.

    Args:
        pipe: loaded with the options of `loading`, its adapter attached.
        kind: as `usable` says.
        compute: dtype that the layers compute in.
        device: where it generates.
    """
    narrow(pipe.transformer, kind, compute)
    if kind == "none" or torch.device(device).type == "cpu":
        pipe.to(device)
    else:
        pipe.enable_model_cpu_offload(device=device)
