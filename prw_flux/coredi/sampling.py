"""Sampling image and features together: guidance, and features carried through any pipeline loop.

Shapes: B samples, T image tokens, F channels of a feature token, ``...`` any shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, TypeAlias, final

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from prw import ConfigError
from prw_flux.coredi.model import CoReDi
from prw_flux.coredi.stream import Joint, joined

Guided = Literal["image", "all"]
Generators: TypeAlias = torch.Generator | list[torch.Generator] | None


def representation_guidance(with_features: Tensor, without: Tensor, weight: float) -> Tensor:
    """v = v(x, 0) + w_r (v(x, z) - v(x, 0)) (ReDi, Eq. 13); weight 1 is no guidance."""
    return without + weight * (with_features - without)


def latent_only_guidance(
    conditional: tuple[Tensor, Tensor], unconditional: tuple[Tensor, Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """Classifier-free guidance of the image alone: the features follow the conditional velocity.

    ReDi measured FID 2.39 with it and 2.86 with both streams guided.

    Args:
        conditional, unconditional: (image, feature) velocities with and without the condition.
        scale: 1 is no guidance.

    Returns:
        (image, feature) velocities.
    """
    image = unconditional[0] + scale * (conditional[0] - unconditional[0])
    return image, conditional[1]


@final
class Carried:
    """Features that are denoised beside an image; made by `carrying`.

    Attributes:
        features_BTF: z at the time reached; z_0 once the context is closed.
        calls: how many times the transformer was asked.
    """

    def __init__(
        self, joint: Joint, width: int, generator: Generators, weight: float, on: Guided
    ) -> None:
        self.features_BTF: Tensor | None = None
        self.calls = 0
        self._joint, self._width, self._generator = joint, width, generator
        self._weight, self._on = weight, on
        self._time: float | None = None
        self._velocity_BTF: Tensor | None = None
        self._without = False

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook: bring the features to the time of this call, and let it read them."""
        if self._passes_by(kwargs):
            return
        noisy_BTC, time = kwargs["hidden_states"], float(kwargs["timestep"].flatten()[0])
        if self.features_BTF is None:
            shape = (*noisy_BTC.shape[:2], self._width)
            self.features_BTF = randn_tensor(
                shape, generator=self._generator, device=noisy_BTC.device, dtype=torch.float32
            )
        self._advance(time)
        self._joint.features_BTF = self.features_BTF

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Hook: keep the features' velocity, and guide the image's where that was asked for."""
        if self._passes_by(kwargs):
            return None
        self.calls += 1
        velocity_BTF, image = self._joint.velocity_BTF, output[0]
        if self._weight != 1.0:
            image_0, velocity_0 = self._unread(module, kwargs)
            image = representation_guidance(image, image_0, self._weight)
            if self._on == "all":
                velocity_BTF = representation_guidance(velocity_BTF, velocity_0, self._weight)
        if self._velocity_BTF is None:  # a second call at one time is unconditional
            self._velocity_BTF = velocity_BTF.to(torch.float32)
        return (image, *output[1:])

    def finish(self) -> None:
        """The last step, to the data."""
        if self._time is not None:
            self._advance(0.0)

    def _passes_by(self, kwargs: dict[str, Any]) -> bool:
        call = (kwargs.get("joint_attention_kwargs") or {}).get("prw")
        return self._without or (call is not None and call.mode == "source")

    def _advance(self, time: float) -> None:
        """Euler's step to `time` along the velocity of the first call at the time before it."""
        if self._time is not None and time != self._time:
            assert self.features_BTF is not None and self._velocity_BTF is not None
            self.features_BTF = self.features_BTF + (time - self._time) * self._velocity_BTF
            self._velocity_BTF = None
        self._time = time

    def _unread(self, module: nn.Module, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Velocities with features of zero, as dropped samples trained."""
        kept, self._without = self._joint.features_BTF, True
        assert kept is not None
        self._joint.features_BTF = torch.zeros_like(kept)
        try:
            image: Tensor = module(**kwargs)[0]
            return image, self._joint.velocity_BTF
        finally:
            self._joint.features_BTF, self._without = kept, False


@contextmanager
def carrying(
    transformer: FluxTransformer2DModel,
    coredi: CoReDi,
    *,
    generator: Generators = None,
    representation: float = 1.0,
    guide: Guided = "image",
) -> Iterator[Carried]:
    """While open, one sampling loop over `transformer` denoises features beside its image.

    Any pipeline that calls the transformer once per time with ``return_dict=False`` will do:
    FluxPipeline, or CoLoGenPipeline with a source. The features take Euler's step between the times
    of the calls. With true CFG (two calls per time) the image alone is guided, as ReDi found best:
    the features follow the first, conditional call. In a narrow dtype two times may round to one;
    the features then take both steps together.

    Args:
        transformer: of the pipeline.
        coredi: trained with it.
        generator: of the features' noise; as in diffusers one, or one per sample.
        representation: w_r of representation guidance; other than 1 it doubles the calls. Not
            together with an `image_guidance_scale` of the pipeline.
        guide: what representation guidance acts on. "all" is ReDi's code; with features of zero
            the feature head has never been trained, so "image" is the default here.

    Raises:
        ConfigError: a transformer of another width, or a projection that was never fitted.
    """
    if not bool(coredi.projection.fitted):
        raise ConfigError("this feature stream has not been trained: fit and train it first")
    with joined(transformer, coredi.stream) as joint:
        carried = Carried(joint, coredi.token_width, generator, representation, guide)
        # before joined()'s own hooks: they see the call as the pipeline made it
        handles = [
            transformer.register_forward_pre_hook(carried.before, with_kwargs=True, prepend=True),
            transformer.register_forward_hook(carried.after, with_kwargs=True),
        ]
        try:
            yield carried
            carried.finish()
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def beside(
    coredi: CoReDi | None,
    transformer: FluxTransformer2DModel,
    *,
    route: str = "free",
    generator: Generators = None,
    representation: float = 1.0,
) -> Iterator[Carried | None]:
    """`carrying` as a route asks for it: with the stream as it was when those experts trained.

    Nothing is carried without a stream, for a `representation` of 0, which is the image path alone,
    and under ``stage:NAME`` for a stage that was trained before there was a stream.

    Args:
        coredi: of the pipeline's run, on the transformer's device.
        transformer: of the pipeline.
        route: of the pipeline's call.
        generator, representation: as in `carrying`.
    """
    kind, _, name = route.partition(":")
    pinned = name if kind == "stage" else None
    if coredi is None or representation == 0.0 or (pinned and pinned not in coredi.snapshots):
        yield None
        return
    then = nullcontext() if pinned is None else coredi.at_stage(pinned)
    with (
        then,
        carrying(
            transformer, coredi, generator=generator, representation=representation
        ) as carried,
    ):
        yield carried
