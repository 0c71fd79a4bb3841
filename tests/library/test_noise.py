"""Router noise: a pure function, normal, and the same whatever else is drawn beside it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import prw
from prw.noise import gaussian_noise, group_id

CPU = torch.device("cpu")
words = st.integers(-(2**63), 2**64 - 1)


@given(words, words, st.integers(0, 9), st.integers(1, 20), st.integers(0, 3), st.integers(0, 3))
def test_a_value_does_not_depend_on_what_is_drawn_beside_it(
    key: int, group: int, tokens: int, columns: int, more_tokens: int, more_columns: int
) -> None:
    small = gaussian_noise(key, group, tokens, columns, CPU)
    large = gaussian_noise(key, group, tokens + more_tokens, columns + more_columns, CPU)
    assert small.shape == (tokens, columns)
    assert small.dtype == torch.float32
    assert torch.equal(small, large[:tokens, :columns])
    assert bool(small.isfinite().all())


@given(words, words, st.integers(0, 9), st.integers(0, 2**40))
def test_a_part_of_a_batch_has_the_noise_of_the_whole(
    key: int, group: int, tokens: int, first: int
) -> None:
    whole = gaussian_noise(key, group, tokens + 3, 4, CPU, first)
    assert torch.equal(gaussian_noise(key, group, tokens, 4, CPU, first + 3), whole[3:])


def test_no_generator_is_moved() -> None:
    before = torch.get_rng_state()
    gaussian_noise(1, 2, 3, 4, CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_known_values() -> None:
    # Pinned: another value would change every trained run's noise.
    found = gaussian_noise(7, group_id("blocks.0.attn"), 2, 2, CPU)
    wanted = [[-0.40082812309265137, 0.48358553647994995]]
    wanted += [[-0.46175289154052734, 0.23409754037857056]]
    # The arithmetic is fp64, the result fp32: platforms agree to the last place.
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-6, atol=0)


def test_it_is_standard_normal_and_uncorrelated() -> None:
    tokens, columns = 4096, 16
    eps = gaussian_noise(3, 5, tokens, columns, CPU).double()
    count = tokens * columns
    # Each statistic of `count` independent values, within five of its standard deviations.
    assert abs(eps.mean()) < 5 / math.sqrt(count)
    assert abs(eps.var() - 1) < 5 * math.sqrt(2 / count)
    assert abs((eps**4).mean() - 3) < 5 * math.sqrt(96 / count)
    correlation = torch.corrcoef(eps.T) - torch.eye(columns, dtype=torch.float64)
    assert float(correlation.abs().max()) < 5 / math.sqrt(tokens)
    assert abs((eps[1:] * eps[:-1]).mean()) < 5 / math.sqrt(count)


def test_keys_and_groups_are_independent() -> None:
    draws = [
        gaussian_noise(key, group_id(name), 512, 8, CPU).flatten()
        for key in (0, 1, 2**63)
        for name in ("", "a", "b")
    ]
    correlation = torch.corrcoef(torch.stack(draws).double()) - torch.eye(9, dtype=torch.float64)
    assert float(correlation.abs().max()) < 5 / math.sqrt(512 * 8)


@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_parts_of_a_batch_are_routed_like_the_whole(granularity: str) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 4))
    config = prw.Config(target_modules=["0"], rank=2, granularity=granularity)
    weave = prw.weave(net, config)
    for name in ("one", "two", "three"):
        weave.unlock(name)
    x = torch.randn(24, 5, 4)

    def chosen(part: torch.Tensor, first: int) -> torch.Tensor:
        with weave.record(key=9, first=first) as record:
            net(part)
        return record.tally.groups["0"].routings[0].expert

    whole = chosen(x, 0)
    assert torch.equal(torch.cat([chosen(x[:8], 0), chosen(x[8:], 8)]), whole)
    assert not torch.equal(chosen(x[8:], 0), whole[8:])
    with pytest.raises(prw.ConfigError, match="first counts samples, got -1"):
        weave.record(first=-1)
