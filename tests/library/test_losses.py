"""The veteran gate: exact value, exact gradient, the same however the batch is split."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import prw
from prw.noise import gaussian_noise, group_id

WIDTH = 6
NAMES = ("a", "b", "c")


def build(stages: int = 3, **fields: Any) -> prw.Weave:
    """Three routed groups in fp64."""
    config = prw.Config(rank=2, **fields)
    pools = {name: prw.Pool(name, WIDTH, {"k": 4}, config).double() for name in NAMES}
    weave = prw.Weave(pools, config, fingerprint={})
    for stage in range(stages):
        weave.unlock(f"s{stage}")
    for parameter in weave.parameters():
        torch.nn.init.normal_(parameter)
    return weave


def forward(weave: prw.Weave, inputs: dict[str, Tensor]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for name, x in inputs.items():
        outputs, _ = weave.pools[name].add({"k": x.new_zeros(*x.shape[:-1], 4)}, x)
        total = total + outputs["k"].square().sum()
    return total


def inputs_of(*leading: int) -> dict[str, Tensor]:
    return {name: torch.randn(*leading, WIDTH, dtype=torch.float64) for name in NAMES}


def plain_autograd(
    weave: prw.Weave, inputs: dict[str, Tensor], key: int | None, density: float, weight: float
) -> tuple[Tensor, list[Tensor]]:
    """Equations 2, 3 and 8 to 10 written down, differentiated by autograd."""
    shares = []
    sample = weave.config.granularity == "sample"
    for name, x in inputs.items():
        router = weave.pools[name].columns
        h = x.detach().mean(1) if sample else x.detach().flatten(0, -2)
        logits = h @ torch.stack(list(router.signal)).T
        if key is not None:
            eps = gaussian_noise(key, group_id(name), *logits.shape, h.device)
            spread = torch.nn.functional.softplus(h @ torch.stack(list(router.noise)).T)
            logits = logits + eps * spread
        p = logits.softmax(-1)[:, -1]
        chosen = (logits.argmax(-1) == logits.shape[1] - 1).double()
        shares.append(chosen + (p - p.detach()))
    loss = weight * (torch.cat(shares).mean() - density).abs()
    columns = router_columns(weave)
    return loss.detach(), list(torch.autograd.grad(loss, columns, materialize_grads=True))


def router_columns(weave: prw.Weave) -> list[Tensor]:
    return [p for name, p in weave.named_parameters() if ".columns." in name]


@given(
    st.integers(0, 10_000),
    st.sampled_from(["token", "sample"]),
    st.floats(0, 1),
    st.floats(0, 4),
    st.booleans(),
)
def test_value_and_gradient_are_those_of_the_equations(
    seed: int, granularity: str, density: float, weight: float, noisy: bool
) -> None:
    torch.manual_seed(seed)
    weave = build(granularity=granularity)
    inputs = inputs_of(4, 5)
    key = seed if noisy else None
    for pool in weave.pools.values():
        pool.train(noisy)
    with weave.record(key=seed) as record:
        forward(weave, inputs)
    loss = prw.veteran_gate_loss(record, density, weight)
    wanted, wanted_gradients = plain_autograd(weave, inputs, key, density, weight)
    assert float(loss.detach()) == weight * abs(record.usage() - density)
    torch.testing.assert_close(loss.detach(), wanted, rtol=0, atol=1e-15)
    gradients = torch.autograd.grad(loss, router_columns(weave))
    # Both are fp64 sums of some twenty products; the bar of the design is 1e-8.
    torch.testing.assert_close(list(gradients), wanted_gradients, rtol=1e-10, atol=1e-12)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.booleans())
def test_the_split_into_micro_batches_does_not_matter(sizes: list[int], one_record: bool) -> None:
    torch.manual_seed(sum(sizes))
    weave = build(granularity="sample", noise=False)
    inputs = inputs_of(sum(sizes), 5)
    with weave.record() as whole:
        forward(weave, inputs)
    splits = {name: x.split(sizes) for name, x in inputs.items()}
    records = []
    shared = weave.record()
    for index in range(len(sizes)):
        record = shared if one_record else weave.record()
        forward(weave, {name: parts[index] for name, parts in splits.items()})
        records.append(record)
    parts = shared if one_record else records
    losses = [prw.veteran_gate_loss(r, 0.8, 0.5) for r in (whole, parts)]
    assert torch.equal(losses[0], losses[1])
    one, two = (torch.autograd.grad(loss, router_columns(weave)) for loss in losses)
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


def test_only_router_columns_receive_a_gradient() -> None:
    weave = build()
    inputs = {name: x.requires_grad_() for name, x in inputs_of(4, 5).items()}
    with weave.record() as record:
        forward(weave, inputs)
    prw.veteran_gate_loss(record, 0.9, 0.5).backward()
    touched = {name for name, p in weave.named_parameters() if p.grad is not None}
    assert touched == {name for name, _ in weave.named_parameters() if ".columns." in name}
    assert all(x.grad is None for x in inputs.values())


def test_the_gradient_is_zero_at_the_density_and_scales_with_the_incoming_one() -> None:
    weave = build()
    with weave.record() as record:
        forward(weave, inputs_of(4, 5))
    at_rest = prw.veteran_gate_loss(record, record.usage(), 0.5)
    assert float(at_rest.detach()) == 0.0
    assert not any(g.any() for g in torch.autograd.grad(at_rest, router_columns(weave)))
    once, thrice = (
        torch.autograd.grad(f * prw.veteran_gate_loss(record, 0.99, 0.5), router_columns(weave))
        for f in (1, 3)
    )
    torch.testing.assert_close([3 * g for g in once], list(thrice))


def test_masked_tokens_count_as_if_removed() -> None:
    for granularity in ("token", "sample"):
        weave = build(granularity=granularity, noise=False)
        inputs = inputs_of(3, 6)
        mask = torch.arange(6).expand(3, 6) < 4
        with weave.record() as short:
            forward(weave, {name: x[:, :4] for name, x in inputs.items()})
        with weave.record(mask=mask) as masked:
            forward(weave, inputs)
        assert short.usage() == masked.usage()
        gradients = [
            torch.autograd.grad(prw.veteran_gate_loss(r, 0.8, 0.5), router_columns(weave))
            for r in (short, masked)
        ]
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-14)


def test_a_sample_without_any_token_is_not_counted() -> None:
    weave = build(granularity="sample")
    mask = torch.tensor([[True, True], [False, False]])
    with weave.record(mask=mask) as record:
        forward(weave, inputs_of(2, 2))
    assert int(record.tally.groups["a"].count) == 1


def test_nothing_counted_is_no_loss() -> None:
    weave = build()
    with weave.record() as record:
        forward(weave, inputs_of(0))
    loss = prw.veteran_gate_loss(record, 0.8, 0.5)
    assert float(loss.detach()) == 0.0 == record.usage()
    assert not any(g.any() for g in torch.autograd.grad(loss, router_columns(weave)))


def test_the_first_stage_has_usage_one_and_no_gradient() -> None:
    weave = build(stages=1)
    with weave.record() as record:
        forward(weave, inputs_of(4, 5))
    assert record.usage() == 1.0
    loss = prw.veteran_gate_loss(record, 0.8, 0.5)
    assert float(loss.detach()) == 0.5 * abs(1.0 - 0.8)
    assert not any(g.any() for g in torch.autograd.grad(loss, router_columns(weave)))


def test_the_loss_has_the_dtype_of_the_router() -> None:
    weave = build()
    for pool in weave.pools.values():
        pool.float()
    with weave.record() as record:
        forward(weave, {name: x.float() for name, x in inputs_of(4, 5).items()})
    assert prw.veteran_gate_loss(record, 0.8, 0.5).dtype == torch.float32


def test_veteran_gate_alone_reaches_its_density() -> None:
    weave = build(stages=2, granularity="sample")
    for column in router_columns(weave):
        torch.nn.init.zeros_(column)
    optimizer = torch.optim.SGD(router_columns(weave), lr=2.0)
    # Without a bias, a router tells an input from its negative only: real inputs have a mean.
    inputs = {name: x + 1 for name, x in inputs_of(40, 3).items()}
    usages = []
    for step in range(150):
        with weave.record(key=step) as record:
            forward(weave, inputs)
        optimizer.zero_grad()
        prw.veteran_gate_loss(record, 0.8, 0.5).backward()
        optimizer.step()
        usages.append(record.usage())
    # 120 noisy decisions a step: their share spreads by about 0.04; the mean of 50 by less.
    assert abs(sum(usages[-50:]) / 50 - 0.8) < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.2, 0.5), r"density must be a finite number from 0 to 1, got 1.2"),
        ((0.8, -1), "at least 0, got -1"),
    ],
)
def test_values_out_of_range(arguments: tuple[float, float], message: str) -> None:
    with pytest.raises(prw.ConfigError, match=message):
        prw.veteran_gate_loss(build().record(), *arguments)


def test_records_that_cannot_give_a_loss() -> None:
    weave = build()
    with pytest.raises(prw.ConfigError, match="at least one record"):
        prw.veteran_gate_loss([], 0.8, 0.5)
    with weave.record() as record:
        pass
    with pytest.raises(prw.StageError, match="nothing was routed"):
        prw.veteran_gate_loss(record, 0.8, 0.5)
    weave.close()
    with weave.record() as record:
        forward(weave, inputs_of(2))
    assert 0 <= record.usage() <= 1
    with pytest.raises(prw.StageError, match="no router may learn now"):
        prw.veteran_gate_loss(record, 0.8, 0.5)


def test_records_of_two_stages_are_not_mixed() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    weave = prw.weave(model, prw.Config(target_modules=["0"], rank=2))
    records = []
    for stage in ("a", "b"):
        weave.unlock(stage)
        with weave.record() as record:
            model(torch.randn(3, 4))
        records.append(record)
    with pytest.raises(prw.StageError, match="began between these records; begin a new record"):
        prw.veteran_gate_loss(records, density=0.8, weight=0.5)
