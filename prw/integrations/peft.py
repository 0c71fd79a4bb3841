"""PEFT speaks PRW: ``get_peft_model(model, PRWPeftConfig(...))``. Needs the extra ``peft``.

Importing this module registers the method; do so before a saved adapter is loaded, or PEFT raises
``KeyError: 'PRW'``. The engine is the library's own: every adapter has a `prw.Weave` over ordinary
pools, which `weave_of` returns and which unlocks, records, pins, saves and loads as ever. What PEFT
adds is several adapters on one model, its files, and the tools that know only PEFT.

How it is registered. `peft.PeftType` is a closed enum, so a method from outside has two ways in:
extend the enum at run time, which takes eight of its private fields, or write a `str` with
``.name`` and ``.value`` into the three tables that PEFT looks methods up in. We do the latter:
every look-up compares strings, transformers and diffusers ask only for ``.value``, and nothing of
PEFT's is changed. ``LoraConfig._register_custom_module`` and ``LoraVariant`` look more official,
but their files reload as plain LoRA without a word.

Files. PEFT saves one tensor per expert and projection, the router columns and their snapshots
(``prw_pool.experts.0.A.0``, ``prw_pool.columns.signal.0``, ...) and in ``adapter_config.json`` the
state of the stages: their names, which is open, what was frozen or thawed, and the rank and alpha
of imported experts. So ``at_stage`` has the same bits after a reload. Remembered inputs, base
fingerprint and hashes are only in the folder that ``Weave.save`` writes.

Not possible from outside PEFT: ``mixed=True`` and diffusers' ``load_lora_adapter``; for its files
there is `load_adapter`.
"""

from __future__ import annotations

import copy
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from peft.functional import delete_adapter
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.integrations import skip_init_on_device
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from prw.decoding import Following, find_decoder
from prw.errors import CheckpointError, ConfigError
from prw.fingerprint import fingerprint
from prw.injection import build_pools, check_imported, leave_fast_path
from prw.integrations.peft_config import PRW, PRWPeftConfig
from prw.integrations.peft_layer import PeftWeave, PRWLinear, Seat
from prw.ledger import Ledger
from prw.linear import linear_size

__all__ = ["PRWLinear", "PRWModel", "PRWPeftConfig", "load_adapter", "weave_of"]


# PEFT drops keys with a part that is another adapter's name, so ours must not be adapter names.
_RESERVED = {"A", "B", "columns", "experts", "noise", "prw_pool", "signal", "snapshots"}


class PRWModel(BaseTuner):
    """The tuner that PEFT builds: it wraps linear layers and seats a weave's pools in them."""

    prefix = "prw_"
    tuner_layer_cls = PRWLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Wrap the targets and open the configuration's stages; a failure leaves no trace.

        Raises:
            ConfigError: an adapter name that PEFT would confuse with a key, a target that cannot be
                adapted (see `prw.linear.linear_size`), or a rank above a layer's size.
        """
        if adapter_name in _RESERVED or adapter_name.isdigit():
            raise ConfigError(
                f"adapter name {adapter_name!r} is part of the names of parameters, and PEFT would "
                "leave those out of files; choose another"
            )
        # A copy, because the stages of one adapter are not those of another with an equal config.
        self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapter_name])
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._joining: dict[str, PRWLinear] = {}
        self._undo: list[tuple[nn.Module, str, nn.Module]] = []
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._seat(model, adapter_name)
        except BaseException:
            for parent, name, target in self._undo:
                setattr(parent, name, target)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            raise
        finally:
            del self._joining, self._undo

    def _create_and_replace(
        self,
        peft_config: PRWPeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, PRWLinear):
            self._joining[current_key] = target
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if linear_size(base) is None:
            raise ConfigError(
                f"target {current_key!r} is a {type(base).__name__}; only linear layers "
                "(nn.Linear, Conv1D, quantised ones) can be adapted"
            )
        if isinstance(parent, nn.MultiheadAttention):
            raise ConfigError(
                f"target {current_key!r} is part of an nn.MultiheadAttention, which reads its "
                "weight without calling it, so experts there would do nothing; put it into "
                "exclude_modules"
            )
        layer = PRWLinear(target).train(target.training)
        self._undo.append((parent, target_name, target))
        self._replace_module(parent, target_name, layer, target)
        self._joining[current_key] = layer

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # PEFT also moves what is new to the device of the layer's weight, which a quantised layer
        # may not have; pools are built where they belong.
        setattr(parent, child_name, new_module)

    @skip_init_on_device  # pools are small, and stay real where PEFT puts new layers on meta
    def _seat(self, model: nn.Module, adapter_name: str) -> None:
        """Build the pools of an adapter, and its weave, and give every layer its seat."""
        config: PRWPeftConfig = self.peft_config[adapter_name]
        linears = {key: layer.get_base_layer() for key, layer in self._joining.items()}
        core = config.core(linears)
        check_imported(core.router, f"adapter {adapter_name!r}")  # it may come from a file
        decoder = find_decoder(model, linears) if core.granularity == "sample" else None
        pools = {pool.name: pool for pool in build_pools(model, linears, core, decoder)}
        for pool in pools.values():
            pool.columns.persistent = True
        identity = fingerprint(model, linears)
        weave = PeftWeave(pools, core, fingerprint=identity, adapter=config)
        weave.begin(config.ledger(), config.sizes)
        trains = adapter_name in self.active_adapters and not config.inference_mode
        for pool in pools.values():
            for index, (projection, target) in enumerate(pool.targets.items()):
                seat = Seat(weave, pool, projection)
                self._joining[target].place(adapter_name, seat, owner=index == 0)
            if not trains:
                pool.requires_grad_(False)
        if decoder is not None:
            weave.following = Following(decoder, next(iter(pools.values())))
        weave.nested = leave_fast_path(model, PRWLinear)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        weaves = [weave_of(self.model, name) for name in self.peft_config]
        found = super()._unload_and_optionally_merge(*args, **kwargs)
        for weave in reversed(weaves):
            weave.leave()
            for encoder, flag in weave.nested:
                encoder.use_nested_tensor = flag
        return found

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PRWPeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        weave_of(model, adapter_name).describe()
        found: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        return found

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        before, ours, after = key.rpartition(f".prw_pool.{adapter_name}.")
        if ours:
            return f"{before}.prw_pool.{after}"
        return str(super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PRWPeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        ledger = weave_of(model, adapter_name).ledger
        numbers = [k.partition(".prw_pool.experts.")[2].split(".")[0] for k in state_dict]
        held = 1 + max((int(number) for number in numbers if number), default=-1)
        if held > len(ledger):
            raise CheckpointError(
                f"the file holds {held} experts, but adapter {adapter_name!r} has {len(ledger)} "
                "stages; load it under another adapter name, or into a fresh model"
            )
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, _with_snapshots(state_dict, ledger)
        )
        own = dict(model.named_parameters())
        for key, tensor in remapped.items():
            if ".prw_pool." in key and key in own and own[key].shape != tensor.shape:
                raise CheckpointError(
                    f"the file's {key!r} is {list(tensor.shape)}, but that of adapter "
                    f"{adapter_name!r} is {list(own[key].shape)}; load it under another adapter "
                    "name, or into a fresh model"
                )
        return remapped


def _with_snapshots(state_dict: dict[str, Tensor], ledger: Ledger) -> dict[str, Tensor]:
    """Add the snapshots of stages that were open in the file and are closed in the ledger."""
    added = {}
    for key in state_dict:
        prefix, found, last = key.rpartition(".columns.signal.")
        stage = ledger.stages[int(last)] if found else None
        wanted = f"{prefix}.columns.snapshots.{last}"
        if stage is not None and not stage.open and f"{wanted}.signal" not in state_dict:
            for kind in ("signal", "noise"):
                keys = [f"{prefix}.columns.{kind}.{index}" for index in range(stage.index + 1)]
                rows = [state_dict[k] for k in keys if k in state_dict]
                empty = state_dict[key].new_zeros(0, len(state_dict[key]))
                added[f"{wanted}.{kind}"] = torch.stack(rows) if rows else empty
    return state_dict | added


def weave_of(model: nn.Module, adapter: str = "default") -> PeftWeave:
    """The weave of an adapter, wherever it was added: PEFT, transformers or diffusers.

    It drives ``unlock``, ``close``, ``record``, ``at_stage``, ``sync``, ``save`` and the rest, and
    keeps what PEFT saves up to date.

    Raises:
        ConfigError: the model has no PRW adapter of that name.
    """
    found: dict[str, PeftWeave] = {}
    for module in model.modules():
        if isinstance(module, PRWLinear):
            found |= {name: seat.weave for name, seat in module.seats.items()}
    if adapter not in found:
        there = (
            f"its PRW adapters are: {', '.join(found)}"
            if found
            else ("it has no PRW adapter: add one with get_peft_model(model, PRWPeftConfig(...))")
        )
        raise ConfigError(f"this model has no PRW adapter {adapter!r}; {there}")
    return found[adapter]


def load_adapter(model: nn.Module, file: str | Path, adapter: str = "default") -> PeftWeave:
    """Add the adapter of a file that diffusers' ``save_lora_adapter`` wrote, bit for bit.

    Args:
        model: a diffusers model (or any with ``add_adapter``).
        file: the safetensors file, whose metadata holds the configuration.
        adapter: a name that the model does not have yet.

    Returns:
        Its weave.

    Raises:
        CheckpointError: the file cannot be read or holds no PRW adapter, is damaged, or does not
            fit. The model then has no such adapter.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}
            settings = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if settings.get("peft_type") != PRW:
        raise CheckpointError(
            f"{file} holds no PRW adapter, its type is {settings.get('peft_type')!r}"
        )
    known = {f.name for f in fields(PRWPeftConfig)}
    config = PRWPeftConfig(**{name: value for name, value in settings.items() if name in known})
    model.add_adapter(config, adapter)  # type: ignore[operator]
    try:
        result = set_peft_model_state_dict(model, tensors, adapter_name=adapter)
        lost = [key for key in result.missing_keys if f".prw_pool.{adapter}." in key]
        if result.unexpected_keys:
            raise CheckpointError(
                f"{file} does not fit this model, which has no {result.unexpected_keys[0]!r}"
            )
        if lost:
            raise CheckpointError(f"{file} is damaged: it lacks {lost[0]!r}")
    except BaseException:
        delete_adapter(model, adapter, PRWModel.prefix)
        model.peft_config.pop(adapter)  # type: ignore[operator, union-attr]
        raise
    return weave_of(model, adapter)


def _register() -> None:
    """Let PEFT find the method by its name."""
    PEFT_TYPE_TO_CONFIG_MAPPING[PRW] = PRWPeftConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PRW] = PRWModel
    PEFT_TYPE_TO_PREFIX_MAPPING[PRW] = PRWModel.prefix


_register()
