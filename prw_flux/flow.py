"""Flow matching as FLUX.1 defines it: straight paths from data (t = 0) to noise (t = 1).

Shapes: B samples, S tokens, C channels of a packed token. A velocity is d x_t / d t.
"""

from __future__ import annotations

import math

import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor


def resolution_shift(tokens: int) -> float:
    """Shift of the sampling grid of FLUX.1 for `tokens` noisy tokens: exp(mu), mu linear in tokens.

    The source tokens do not count: FLUX.1 shifts by the length of what is being denoised.
    """
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}.")
    return math.exp(calculate_shift(tokens))


def sample_times(
    count: int,
    generator: torch.Generator | None = None,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw training times t = s z / (1 + (s - 1) z), z = sigmoid(mean + std n), n ~ N(0, 1).

    Args:
        count: Number of samples B.
        generator: Source of n; it draws on its own device, so a CPU generator gives the same times
            wherever the model is.
        mean, std: Of the normal variable.
        shift: s > 0; above 1 the times move towards the noise (`resolution_shift`).
        device: Where the times are wanted.

    Returns:
        [B] float32 in (0, 1).
    """
    if not shift > 0.0 or not std > 0.0:
        raise ValueError(f"shift and std must be positive, got shift={shift} and std={std}.")
    source = generator.device if generator is not None else torch.device("cpu")
    n_B = torch.randn(count, generator=generator, device=source, dtype=torch.float32)
    z_B = torch.sigmoid(mean + std * n_B)
    # the last representable step before either end: at exactly 0 or 1 the path has no direction
    t_B = (shift * z_B / (1.0 + (shift - 1.0) * z_B)).clamp(1e-6, 1.0 - 1e-6)
    return t_B.to(device) if device is not None else t_B


def interpolate(x0: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
    """x_t = (1 - t) x_0 + t eps.

    Args:
        x0: [B, ...] clean latents.
        noise: [B, ...] standard normal.
        t_B: [B] in [0, 1].

    Returns:
        [B, ...] in the dtype of `x0`, computed in the wider of the two dtypes.
    """
    if x0.shape != noise.shape or t_B.shape != x0.shape[:1]:
        raise ValueError(
            f"x0 {tuple(x0.shape)} and noise {tuple(noise.shape)} must agree, with one time per "
            f"sample, got times {tuple(t_B.shape)}."
        )
    t = t_B.view(-1, *[1] * (x0.ndim - 1))
    return ((1.0 - t) * x0 + t * noise).to(x0.dtype)


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """v = eps - x_0, the derivative of `interpolate` in t; shapes as there."""
    return noise - x0


def flow_loss(
    velocity: Tensor, x0: Tensor, noise: Tensor, weight_B: Tensor | None = None
) -> Tensor:
    """mean_B w_B mean |v - (eps - x_0)|^2, in fp32.

    Args:
        velocity: [B, S, C] the model's output, any float dtype.
        x0, noise: [B, S, C].
        weight_B: [B] weights of the samples, or None for 1.

    Returns:
        Scalar, float32 (float64 for float64 inputs).
    """
    wide = torch.promote_types(velocity.dtype, torch.float32)
    error = velocity.to(wide) - velocity_target(x0.to(wide), noise.to(wide))
    loss_B = error.square().flatten(1).mean(dim=1)
    return loss_B.mean() if weight_B is None else (weight_B * loss_B).mean()
