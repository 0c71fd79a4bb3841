"""Decoders that generate: which layers routing can follow, and where a sequence goes on."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from prw.errors import ConfigError
from prw.pool import Pool


@dataclass(frozen=True)
class Decoder:
    """The part of a model that decodes token by token, and the layers whose samples it routes.

    Attributes:
        module: transformers' own, whose forward is given the key-value cache.
        layers: names, in the whole model, of the layers that are routed by their prompt.
    """

    module: nn.Module
    layers: frozenset[str]


def find_decoder(model: nn.Module, linears: Mapping[str, nn.Module]) -> Decoder | None:
    """The causal decoder that these layers are part of, wherever it sits in the model.

    Of an encoder and decoder only the encoder's layers can be routed per sample, where every token
    is known from the start and no prompt is needed.

    Raises:
        ConfigError: a layer of the decoder beside an encoder, the output head, or layers of several
            decoders.
    """
    found = []
    for module in dict.fromkeys(_decoders(model)):
        inside = set(module.modules())
        layers = {name: linear for name, linear in linears.items() if linear in inside}
        if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
            _check_encoder(module, layers)
        elif layers:
            _check_head(module, layers)
            found.append(Decoder(module, frozenset(layers)))
    if len(found) > 1:
        names = [min(decoder.layers) for decoder in found]
        raise ConfigError(
            f"granularity='sample' follows the prompt of one decoder, but {names[0]!r} and "
            f"{names[1]!r} are in two; weave them one after the other"
        )
    return found[0] if found else None


def _decoders(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost parts that are given a cache and attend causally, as transformers says."""
    can_generate = getattr(module, "can_generate", None)
    if callable(can_generate) and can_generate():
        yield module
    elif "past_key_values" in inspect.signature(module.forward).parameters and any(
        getattr(part, "is_causal", None) is True for part in module.modules()
    ):
        yield module
    else:
        for child in module.children():
            yield from _decoders(child)


def _check_head(module: nn.Module, linears: Mapping[str, nn.Module]) -> None:
    """Refuse the output head, which `generate()` gives the last token only."""
    give_head = getattr(module, "get_output_embeddings", None)
    head = give_head() if callable(give_head) else None
    for name, linear in linears.items():
        if linear is head:
            raise ConfigError(
                f"granularity='sample' cannot adapt the output head {name!r} of a decoder: "
                "generate() gives it the last token instead of the prompt; exclude it"
            )


def _check_encoder(module: nn.Module, linears: Mapping[str, nn.Module]) -> None:
    """Refuse layers that are not the encoder's."""
    give_encoder = getattr(module, "get_encoder", None)
    encoder = give_encoder() if callable(give_encoder) else None
    inside = set(encoder.modules()) if isinstance(encoder, nn.Module) else set()
    for name, linear in linears.items():
        if linear not in inside:
            raise ConfigError(
                f"granularity='sample' cannot adapt {name!r}: beside an encoder the decoder has no "
                "prompt to be routed by; adapt the encoder only, or route per token"
            )


class Following:
    """Forward hooks of a decoder that tell the bound call where a sequence begins and goes on.

    The decoder's own forward is watched, because only there the cache is seen.

    Args:
        decoder: to watch.
        pool: any pool of the weave, which knows the bound call.
    """

    def __init__(self, decoder: Decoder, pool: Pool) -> None:
        self.pool = pool
        self._handles = (
            decoder.module.register_forward_pre_hook(self.before, with_kwargs=True),
            decoder.module.register_forward_hook(self.after, with_kwargs=True, always_call=True),
        )

    def stop(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Runs before the model's forward; raises like `Prompt.begin`."""
        cache = _given_cache(model, args, kwargs)
        past = 0 if cache is None else int(cache.get_seq_length())
        call = self.pool.slot.call
        if call.force is None:
            call.prompt.begin(cache, past, call.mask)

    def after(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """Runs after it, also when it failed."""
        cache = _given_cache(model, args, kwargs)
        if cache is None or output is None:
            cache = getattr(output, "past_key_values", None)
        self.pool.slot.call.prompt.end(cache)


def _given_cache(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    return given.get("past_key_values", given.get("kwargs", {}).get("past_key_values"))
