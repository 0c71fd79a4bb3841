"""Decoders that generate: which layers routing can follow, and where a sequence goes on."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from prw.errors import ConfigError
from prw.pool import Pool


def generates(model: nn.Module) -> bool:
    """Whether the model is a decoder that generates token by token, as transformers says."""
    can_generate = getattr(model, "can_generate", None)
    return bool(callable(can_generate) and can_generate())


def check_decoder(model: nn.Module, linears: Mapping[str, nn.Module]) -> None:
    """Refuse layers of a decoder that cannot be routed per sample.

    Raises:
        ConfigError: the output head, which `generate()` gives the last token only.
    """
    give_head = getattr(model, "get_output_embeddings", None)
    head = give_head() if callable(give_head) else None
    for name, module in linears.items():
        if module is head:
            raise ConfigError(
                f"granularity='sample' cannot adapt the output head {name!r} of a decoder: "
                "generate() gives it the last token instead of the prompt; exclude it"
            )


def needs_prompt(model: nn.Module, linears: Mapping[str, nn.Module]) -> bool:
    """Whether samples of these layers must be routed by their prompt: in a causal decoder.

    Of an encoder and decoder only the encoder's layers can be routed per sample, where every token
    is known from the start and no prompt is needed.

    Raises:
        ConfigError: a layer of the decoder beside an encoder.
    """
    if not generates(model):
        return False
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        check_decoder(model, linears)
        return True
    give_encoder = getattr(model, "get_encoder", None)
    encoder = give_encoder() if callable(give_encoder) else None
    inside = set(encoder.modules()) if isinstance(encoder, nn.Module) else set()
    for name, module in linears.items():
        if module not in inside:
            raise ConfigError(
                f"granularity='sample' cannot adapt {name!r}: beside an encoder the decoder has no "
                "prompt to be routed by; adapt the encoder only, or route per token"
            )
    return False


def follow(model: nn.Module, pools: Iterable[Pool]) -> Following:
    """Let calls know where a sequence begins and where its cache goes on.

    The model's own forward is watched, because only there the cache is seen.
    """
    return Following(model, next(iter(pools)))


class Following:
    """Forward hooks of a decoder that tell the bound call where a sequence begins and goes on.

    Args:
        model: to watch.
        pool: any pool of the weave, which knows the bound call.
    """

    def __init__(self, model: nn.Module, pool: Pool) -> None:
        self.pool = pool
        self._handles = (
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after, with_kwargs=True, always_call=True),
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
