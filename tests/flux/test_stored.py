"""Eight bits with a scale per token and head."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from prw_flux.stored import FLOAT8, Stored, quantised

CPU = torch.device("cpu")


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    exponent=st.integers(-60, 60),
    shape=st.tuples(*[st.integers(1, 5)] * 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_float8_keeps_a_sixteenth(
    seed: int, exponent: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """3 bits of mantissa: half a step is 1 / 16 of a value; below 2^-6 (of 448) steps are even."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * torch.randn(*shape[:3], 1, generator=generator)
    x = (x * 2.0**exponent).to(dtype).float()
    stored = quantised(x)
    found = stored.tensor(CPU, torch.float32)
    largest = x.abs().amax(dim=-1, keepdim=True)
    # 1.001: the division and the product round, too
    bound = 1.001 * (x.abs() / 16).maximum(largest / 448 * 2.0**-10)
    assert ((found - x).abs() <= bound + torch.finfo(torch.float32).tiny).all()
    assert stored.nbytes == x.numel() + 4 * x.numel() // shape[-1]


def test_rows_of_zeros_and_of_unequal_size_survive() -> None:
    x = torch.zeros(1, 3, 1, 4)
    x[0, 1], x[0, 2] = 1e-20, 448e20
    found = quantised(x).tensor(CPU, torch.float32)
    assert_close(found, x, rtol=1 / 16, atol=0.0)


def test_to_keeps_what_is_not_named() -> None:
    x = torch.randn(1, 2, 2, 4, dtype=torch.bfloat16)
    same = Stored(x).to(None, None)
    assert same.scale is None and torch.equal(same.values, x)
    eight = Stored(x).to(None, FLOAT8)
    assert eight.values.dtype == FLOAT8 and eight.to(CPU, None).scale is not None
    assert eight.to(None, FLOAT8).values is eight.values
    wide = eight.to(None, torch.bfloat16)
    assert wide.scale is None and wide.values.dtype == torch.bfloat16
    assert_close(wide.values, x, rtol=1 / 15, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_rounded_without_float8(dtype: torch.dtype) -> None:
    x = torch.randn(1, 2, 2, 4, dtype=dtype)
    assert torch.equal(Stored(x).tensor(CPU, torch.float32), x.float())
