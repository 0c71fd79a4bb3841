"""The feature stream of a FLUX.1 transformer: what it reads and writes beside the image.

Merged tokens (ReDi's default): ``h = x W_x + z W_z`` and two linear heads. That is an x_embedder of
more input columns and a proj_out of more output rows; kept as two layers of their own, so that the
base's products stay what they are, bit for bit, at initialisation and for features of zero.

Shapes: B samples, T image tokens, L tokens of the transformer (T, or 2 T for separate tokens),
F channels of a packed feature token, O width of the transformer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import ismethod
from typing import Any, Literal, final

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor, nn

from prw import ConfigError

Tokens = Literal["merged", "separate"]


@final
class FeatureStream(nn.Module):
    """W_z of the input (without bias) and the feature head, both zero at the beginning.

    Args:
        width: O.
        token_width: F.
        tokens: "merged" or "separate".
    """

    def __init__(self, width: int, token_width: int, tokens: Tokens = "merged") -> None:
        super().__init__()
        self.tokens = tokens
        self.embed = nn.Linear(token_width, width, bias=False)
        self.head = nn.Linear(width, token_width)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


@final
class Joint:
    """One use of the stream; made by `joined`.

    Attributes:
        features_BTF: what the next forward reads, z_t.
        velocity_BTF: what the last forward predicted for it.
    """

    def __init__(self, stream: FeatureStream, features_BTF: Tensor | None) -> None:
        self.stream, self.features_BTF = stream, features_BTF
        self._velocity: Tensor | None = None
        self._calls: list[bool] = []

    @property
    def velocity_BTF(self) -> Tensor:
        """Predicted by the last forward.

        Raises:
            ConfigError: there has been none.
        """
        if self._velocity is None:
            raise ConfigError("there is no feature velocity: call the transformer inside joined()")
        return self._velocity

    def begin(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hook before the transformer: a source pass has no features, any other call has."""
        joint = kwargs.get("joint_attention_kwargs") or {}
        call = joint.get("prw")
        self._calls.append(call is None or call.mode != "source")
        if self._calls[-1] and self.stream.tokens == "separate":
            # a hook that calls the transformer again hands on ids that are doubled already
            ids = kwargs["img_ids"][: kwargs["hidden_states"].shape[1]]
            beside = ids + ids.new_tensor([1.0, 0.0, 0.0])
            kwargs = {**kwargs, "img_ids": torch.cat([ids, beside])}
        return args, kwargs

    def end(self, *_: Any) -> None:
        """Hook after the transformer, also when it raises."""
        self._calls.pop()

    def embed(self, module: nn.Module, args: tuple[Any, ...], image_BTO: Tensor) -> Tensor:
        """Hook after x_embedder: the features join."""
        if not self._calls[-1]:
            return image_BTO
        z = self.features_BTF
        if z is None or z.shape[:2] != image_BTO.shape[:2]:
            found = None if z is None else tuple(z.shape)
            raise ConfigError(
                f"{image_BTO.shape[0]} samples of {image_BTO.shape[1]} image tokens need as many "
                f"feature tokens, got {found}"
            )
        embedded: Tensor = self.stream.embed(z.to(self.stream.embed.weight.dtype))
        features_BTO = embedded.to(image_BTO.dtype)
        if self.stream.tokens == "merged":
            return image_BTO + features_BTO
        return torch.cat([image_BTO, features_BTO], dim=1)

    def head(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor, ...] | None:
        """Hook before proj_out: the feature head reads what it reads."""
        if not self._calls[-1]:
            return None
        hidden_BLO: Tensor = args[0]
        image_BTO, features_BTO = hidden_BLO, hidden_BLO
        if self.stream.tokens == "separate":
            image_BTO, features_BTO = hidden_BLO.chunk(2, dim=1)
        self._velocity = self.stream.head(features_BTO.to(self.stream.head.weight.dtype))
        return (image_BTO,)


@contextmanager
def joined(
    transformer: FluxTransformer2DModel, stream: FeatureStream, features_BTF: Tensor | None = None
) -> Iterator[Joint]:
    """While open, calls of `transformer` also read noisy features and predict their velocity.

    The calls return what they always return; the velocity of the features is in the object that is
    yielded, whose `features_BTF` may be changed between calls. Source passes of PRW are left alone.

    Raises:
        ConfigError: a stream of another width, or a transformer that reads one already; within a
            call, for features of another batch or number of tokens.
    """
    reading = transformer.x_embedder._forward_hooks.values()
    if any(isinstance(hook.__self__, Joint) for hook in reading if ismethod(hook)):
        raise ConfigError(
            "this transformer reads a feature stream already: leave out one of the two, as a "
            "pipeline that was loaded from a run carries the run's own (pipe.coredi)"
        )
    if stream.embed.out_features != transformer.inner_dim:
        raise ConfigError(
            f"this feature stream was made for a transformer of width {stream.embed.out_features}, "
            f"not {transformer.inner_dim}"
        )
    joint = Joint(stream, features_BTF)
    handles = [
        transformer.register_forward_pre_hook(joint.begin, with_kwargs=True),
        transformer.register_forward_hook(joint.end, always_call=True),
        transformer.x_embedder.register_forward_hook(joint.embed),
        transformer.proj_out.register_forward_pre_hook(joint.head),
    ]
    try:
        yield joint
    finally:
        for handle in handles:
            handle.remove()
