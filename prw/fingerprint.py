"""What identifies a base model: its class, its configuration, the shapes and a few weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from prw.linear import linear_size, plain_weight

SAMPLES = 2048
TOLERANCE = 0.02
"""Relative RMS difference of the sampled weights above which a base counts as another one.

A cast to bfloat16 differs by about 0.002, another initialisation by about 1.4.
"""

# What a configuration says about how a base is stored or run, not about which base it is.
_VOLATILE = frozenset(
    """transformers_version torch_dtype dtype use_cache quantization_config architectures
    problem_type output_attentions output_hidden_states return_dict bos_token_id eos_token_id
    pad_token_id decoder_start_token_id sep_token_id id2label label2id""".split()
)


def fingerprint(model: nn.Module, linears: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Describe a base as plain JSON data.

    Args:
        model: the base, before anything is injected.
        linears: the layers that are adapted, by dotted name.

    Returns:
        ``class``, ``config``, ``modules`` (name and shape of each layer) and ``samples``, up to
        2048 weights taken at even distances.
    """
    layers = sorted(linears.items())
    sizes = [[name, linear_size(layer) or (0, 0)] for name, layer in layers]
    weights = [weight for _, layer in layers if (weight := plain_weight(layer)) is not None]
    return {
        "class": type(model).__qualname__,
        "config": _config(model),
        "modules": [[name, [output, width]] for name, (width, output) in sizes],
        "samples": sample_weights(weights),
    }


def sample_weights(weights: Sequence[Tensor]) -> list[float]:
    """Up to 2048 values at even distances; quantised and meta tensors are skipped."""
    usable = [w for w in weights if w.is_floating_point() and not w.is_meta and w.numel()]
    samples: list[float] = []
    for weight in usable:
        flat = weight.detach().reshape(-1)
        step = max(1, flat.numel() * len(usable) // SAMPLES)
        samples += flat[::step].float().tolist()
    return samples[: 2 * SAMPLES]


def difference(stored: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """The first mismatch that makes a base another one, in words; None when it fits."""
    for key in sorted((set(stored) | set(found)) - {"samples"}):
        ours, theirs = (json.loads(json.dumps(side.get(key))) for side in (found, stored))
        if key == "config" and isinstance(ours, dict) and isinstance(theirs, dict):
            ours, theirs = _lasting(ours), _lasting(theirs)  # files of earlier versions hold more
        if ours != theirs:
            return f"its {key} is {_shorten(theirs, ours)}, this base has {_shorten(ours, theirs)}"
    return None


def drift(stored: Mapping[str, Any], found: Mapping[str, Any]) -> float:
    """Relative RMS difference of the sampled weights; 0 when they cannot be compared."""
    old, new = list(stored.get("samples") or ()), list(found.get("samples") or ())
    if not old or len(old) != len(new):
        return 0.0
    scale = math.fsum(value * value for value in old)
    error = math.fsum((a - b) ** 2 for a, b in zip(old, new, strict=True))
    return math.sqrt(error / scale) if scale else math.sqrt(error)


def _config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    to_dict = getattr(config, "to_dict", None)
    data = to_dict() if callable(to_dict) else config
    if not isinstance(data, Mapping):
        return {}
    return _lasting(json.loads(json.dumps(dict(data), default=str, sort_keys=True)))


def _lasting(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that says which base it is."""
    return {k: v for k, v in config.items() if not k.startswith("_") and k not in _VOLATILE}


def _shorten(value: Any, other: Any) -> str:
    """The part of `value` that differs from `other`."""
    if isinstance(value, dict) and isinstance(other, dict):
        value = {k: v for k, v in value.items() if k not in other or other[k] != v}
    elif isinstance(value, list) and isinstance(other, list):
        value = [item for item in value if item not in other]
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
