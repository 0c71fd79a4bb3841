"""What a recorded source or a picture depends on, as digests that mean the same everywhere."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from prw_flux.adapter import PRWAdapter
from prw_flux.coredi.model import SETTINGS, CoReDi
from prw_flux.locate import base_fingerprint

SAMPLES = 16
_PROCESS = f"{os.getpid()}-{uuid4().hex}"


def tensor_digest(tensor: Tensor) -> str:
    """Of a tensor's shape and values, equal for equal values of any device and float type."""
    values = tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()
    return hashlib.sha256(str(list(values.shape)).encode() + values.numpy().tobytes()).hexdigest()


def adapter_digest(adapter: PRWAdapter) -> str:
    """Of every expert, router, stage and setting; a second per GB, once per state."""
    state = adapter.state_id
    if adapter.known_digest[0] == state:
        return adapter.known_digest[1]
    settings = {k: v for k, v in adapter.config.items() if not k.startswith("_")}
    stages = [stage.name for stage in adapter.weave.stages]
    adapter.known_digest = (state, _weights_digest([settings, stages], adapter.state_dict()))
    return adapter.known_digest[1]


def stream_digest(coredi: CoReDi) -> str:
    """Of a feature stream: what it is now, and what it was at the end of every stage."""
    tensors = coredi.state_dict()
    for stage, kept in coredi.snapshots.items():
        tensors |= {f"{stage}/{name}": tensor for name, tensor in kept.items()}
    return _weights_digest([getattr(coredi.config, name) for name in SETTINGS], tensors)


def _weights_digest(settings: Any, tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        raw = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        found.update(raw.numpy().data)
    return found.hexdigest()


def base_digest(transformer: nn.Module, vae: nn.Module) -> str:
    """Of what else a source goes through: transformer, its LoRAs and their weights, autoencoder.

    Class, configuration, name and shape of every tensor and 16 of its values at even distances. A
    tensor that is on the meta device between calls (sequential offloading) cannot be read: such a
    base is only equal to itself, in this process.
    """
    facts: list[Any] = [base_fingerprint(transformer), list(_loras(transformer))]
    for module in (transformer, vae):
        facts.append(type(module).__name__)
        tensors = [*module.named_parameters(), *module.named_buffers()]
        facts.append([(name, list(tensor.shape)) for name, tensor in tensors])
        facts.append(_samples([tensor for _, tensor in tensors]))
        if any(tensor.is_meta for _, tensor in tensors):
            facts.append(f"{_PROCESS} {id(module)}")
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _samples(tensors: list[Tensor]) -> list[float]:
    """Values at even distances, with one transfer per device; other than plain tensors are left."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        plain = tensor.data
        if type(plain) is not Tensor or plain.is_meta or not plain.numel():
            continue
        flat = plain.detach().reshape(-1)
        taken = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].to(torch.float32)
        by_device.setdefault(plain.device, []).append(taken)
    return [value for parts in by_device.values() for value in torch.cat(parts).tolist()]


def _loras(transformer: nn.Module) -> Iterator[tuple[Any, ...]]:
    """How strong each LoRA of diffusers' loader is now; its weights are among the parameters."""
    if not getattr(transformer, "_hf_peft_config_loaded", False):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in transformer.named_modules():
        if isinstance(module, BaseTunerLayer):
            scaling = dict(vars(module).get("scaling", {}))
            yield (name, list(module.active_adapters), module.disable_adapters, scaling)
