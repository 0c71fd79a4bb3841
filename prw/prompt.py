"""Sample routing on a causal decoder: the prompt decides, and its continuation keeps that decision.

With a key-value cache a decoder sees the prompt once and then one token at a time. The routing of
a sample is the one of its prompt, so the call keeps it for the forwards that continue the very
cache that the prompt began.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from torch import Tensor

from prw.errors import ConfigError, StageError
from prw.router import Routing

Place: TypeAlias = tuple[str, str]
"""A pool and the projection that asks."""


@dataclass(eq=False)
class Prompt:
    """The mutable part of a call on a decoder: what its prompt decided, and for which cache.

    Attributes:
        state: ``"prompt"`` inside a forward that begins a sequence, ``"continuation"`` inside one
            that continues the kept cache, ``"outside"`` otherwise. Only the forward of the woven
            model itself says which it is.
        routings: what each place decided, detached, one for each time it was called.
        calls: how often each place was called in this forward.
        cache: the cache that the prompt began.
    """

    state: Literal["outside", "prompt", "continuation"] = "outside"
    routings: dict[Place, list[Routing]] = field(default_factory=dict)
    calls: dict[Place, int] = field(default_factory=dict)
    cache: weakref.ref[Any] | None = None

    def begin(self, cache: Any, past: int, mask: Tensor | None) -> None:
        """A forward of the model begins, with `past` tokens in its cache.

        Raises:
            ConfigError: the cache is not one that a prompt of this call began, or does not hold all
                of the prompt.
        """
        self.calls = {}
        if not past:
            self.routings, self.cache, self.state = {}, None, "prompt"
            return
        if mask is None:
            self.state = "outside"
            return
        if self.cache is None or self.cache() is not cache:
            raise ConfigError(
                "this call did not see the prompt of the given past_key_values, so it cannot know "
                "how its samples are routed; give call(mask=...) and run the prompt inside it first"
            )
        if past < mask.shape[1]:
            raise ConfigError(
                f"the cache holds {past} tokens, but the mask of the call is a prompt of "
                f"{mask.shape[1]}; run the whole prompt in one forward"
            )
        self.state = "continuation"

    def end(self, cache: Any) -> None:
        """The forward of the model ended; a prompt's cache is the one to continue."""
        if self.state == "prompt" and cache is not None:
            self.cache = weakref.ref(cache)
        self.state = "outside"

    def __getstate__(self) -> dict[str, Any]:
        return vars(Prompt())  # a copied or pickled call has seen no prompt

    @property
    def continues(self) -> bool:
        """Whether the forward that runs now has its routing from the prompt."""
        return self.state == "continuation"

    def keep(self, place: Place, routing: Routing) -> None:
        """Keep what a place decided on the prompt."""
        if self.state == "prompt":
            kept = Routing(routing.expert, routing.gate.detach(), routing.probs.detach())
            self.routings.setdefault(place, []).append(kept)

    def recall(self, place: Place, samples: int, experts: int) -> Routing:
        """What a place decided on the prompt.

        Raises:
            StageError: experts joined or left since the prompt.
            ConfigError: the place did not see the prompt, or other samples.
        """
        index = self.calls.get(place, 0)
        self.calls[place] = index + 1
        known = self.routings.get(place, [])
        if index >= len(known):
            raise ConfigError(
                f"{place[0]!r} was not called for the prompt, so it has no routing to continue"
            )
        routing = known[index]
        if routing.probs.shape[-1] != experts:
            raise StageError("the stages changed since the prompt; run the prompt again")
        if routing.expert.shape != (samples,):
            raise ConfigError(
                f"{place[0]!r} was given {samples} samples, its prompt had "
                f"{routing.expert.shape[0]}"
            )
        return routing
