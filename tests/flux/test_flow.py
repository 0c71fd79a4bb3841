"""Flow matching: the path, its target, its times."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from prw_flux.flow import flow_loss, interpolate, resolution_shift, sample_times, velocity_target


@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_the_target_carries_one_time_to_another(t: float, s: float) -> None:
    x0, noise = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    a, b = (interpolate(x0, noise, torch.full((2,), u, dtype=torch.float64)) for u in (t, s))
    assert_close(a + (s - t) * velocity_target(x0, noise), b, rtol=0.0, atol=1e-14)


def test_the_ends_of_the_path() -> None:
    x0, noise = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(interpolate(x0, noise, torch.zeros(2)), x0)
    assert torch.equal(interpolate(x0, noise, torch.ones(2)), noise)


def test_each_sample_has_its_own_time() -> None:
    x0, noise = torch.zeros(2, 3), torch.ones(2, 3)
    assert_close(
        interpolate(x0, noise, torch.tensor([0.25, 0.75])),
        torch.tensor([[0.25] * 3, [0.75] * 3]),
    )
    with pytest.raises(ValueError, match="one time per sample"):
        interpolate(x0, noise, torch.zeros(3))


@given(st.integers(1, 8192))
def test_the_shift_is_the_schedulers(tokens: int) -> None:
    """Shifted times are the sigmas that FlowMatchEulerDiscreteScheduler makes of them."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    shift = resolution_shift(tokens)
    times = torch.rand(5, dtype=torch.float64) * 0.9 + 0.05
    ours = shift * times / (1 + (shift - 1) * times)
    assert_close(scheduler.time_shift(math.log(shift), 1.0, times), ours)


def test_times_are_seeded_shifted_and_inside() -> None:
    plain = sample_times(4096, torch.Generator().manual_seed(1))
    assert torch.equal(plain, sample_times(4096, torch.Generator().manual_seed(1)))
    shifted = sample_times(4096, torch.Generator().manual_seed(1), shift=3.0)
    assert (shifted > plain).all() and plain.dtype == torch.float32
    extreme = sample_times(4096, std=100.0)
    assert extreme.min() > 0.0 and extreme.max() < 1.0
    # the median of sigmoid(N(0, 1)) is 1/2; 4096 draws put it within 0.03 at four sigma
    assert abs(float(plain.median()) - 0.5) < 0.03
    for wrong in ({"shift": 0.0}, {"std": -1.0}, {"shift": math.nan}):
        with pytest.raises(ValueError, match="must be positive"):
            sample_times(1, **wrong)
    with pytest.raises(ValueError, match="at least 1"):
        resolution_shift(0)


def test_the_loss_is_the_mean_over_samples() -> None:
    x0, noise = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    velocity = velocity_target(x0, noise) + torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    assert_close(flow_loss(velocity, x0, noise), torch.tensor(14.0 / 3.0))
    weight = torch.tensor([1.0, 0.0, 0.0])
    assert_close(flow_loss(velocity, x0, noise, weight), torch.tensor(1.0 / 3.0))
    half = flow_loss(velocity.bfloat16(), x0.bfloat16(), noise.bfloat16())
    assert half.dtype == torch.float32
