"""`prw.testing`: what we ship keeps every promise, and a planted bug is caught by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

import prw
from prw.router import RouterPass, column_product
from prw.testing import (
    BACKEND_INVARIANTS,
    LOSS_INVARIANTS,
    ROUTER_INVARIANTS,
    BrokenInvariant,
    check_backend,
    check_loss,
    check_router,
    histories,
    play,
    pools,
    shapes,
)
from prw_kernels import routed_lora

EXAMPLES = settings.default.max_examples  # type: ignore[attr-defined]


@pytest.mark.parametrize("router", [prw.Top1, prw.NoisyTop1])
def test_our_routers_keep_their_promises(router: type[prw.Router]) -> None:
    check_router(router, examples=EXAMPLES)


def veteran(records: Sequence[prw.Record]) -> Tensor:
    return prw.veteran_gate_loss(records, 0.8, 0.5)


def veteran_per_sample(records: Sequence[prw.Record]) -> Tensor:
    return prw.veteran_gate_loss(records, 0.8, 0.5, per="sample")


def balance(records: Sequence[prw.Record]) -> Tensor:
    return prw.load_balance_loss(records, 0.3)


def small_logits(records: Sequence[prw.Record]) -> Tensor:
    return prw.z_loss(records, 0.3)


def entropy(records: Sequence[prw.Record]) -> Tensor:
    return prw.entropy_loss(records, -0.3)


@pytest.mark.parametrize("loss", [veteran, veteran_per_sample, balance, small_logits, entropy])
def test_our_losses_keep_their_promises(loss: Callable[..., Tensor]) -> None:
    check_loss(loss, examples=EXAMPLES // 3)


def plain(*arguments: Any) -> tuple[Tensor, ...]:
    return routed_lora(*arguments, backend="reference")


@pytest.mark.parametrize("op", [routed_lora, plain])
def test_our_backends_keep_their_promises(op: Callable[..., Any]) -> None:
    check_backend(op, examples=EXAMPLES)


class Planted(prw.Router):
    """Top-1 with a bug: `spoil` takes the logits, the rows and the stacked columns."""

    def __init__(self, spoil: Callable[..., Tensor]) -> None:
        self.spoil = spoil

    def logits(
        self,
        h_TD: Tensor,
        signal: Sequence[Tensor],
        noise: Sequence[Tensor],
        eps_TE: Tensor | None,
    ) -> Tensor:
        logits_TE = column_product(h_TD, signal)[:, : len(signal)]
        return self.spoil(logits_TE, h_TD, torch.stack(list(signal)).to(h_TD.dtype))


class WrongSlope(Planted):
    """Its closed form lacks the other experts."""

    def usage_jacobian(
        self, seen: RouterPass, newest: int, keep_T: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        signal_ED, noise_ED = super().usage_jacobian(seen, newest, keep_T)
        only = torch.arange(len(signal_ED))[:, None] == newest
        return torch.where(only, signal_ED, 0.0), noise_ED


class SaysLinear(Planted):
    """Says that it is linear and is not."""

    linear = True


class Caches(prw.Router):
    """Stacks the columns once per list of tensors, as if they never changed."""

    def __init__(self) -> None:
        self.known: dict[tuple[int, ...], tuple[Any, Tensor]] = {}

    def logits(
        self,
        h_TD: Tensor,
        signal: Sequence[Tensor],
        noise: Sequence[Tensor],
        eps_TE: Tensor | None,
    ) -> Tensor:
        key = (id(h_TD), *map(id, signal))
        self.known.setdefault(key, (signal, column_product(h_TD, signal)))
        return self.known[key][1]


def cosine(w: Tensor, h: Tensor, columns: Tensor) -> Tensor:
    return w / (h.norm(dim=-1, keepdim=True) * columns.norm(dim=-1))


def halved(w: Tensor, h: Tensor, columns: Tensor) -> Tensor:
    return (h.bfloat16() @ columns.bfloat16().T).to(h.dtype)


def in_place(w: Tensor, h: Tensor, columns: Tensor) -> Tensor:
    h.mul_(2.0)
    return w


PLANTED_ROUTERS: dict[str, list[prw.Router]] = {
    "logits": [
        Planted(lambda w, h, c: w[:, 1:]),
        Planted(lambda w, h, c: w[0]),
        Planted(lambda w, h, c: w.bfloat16()),
    ],
    "determinism": [Planted(lambda w, h, c: w + torch.randn_like(w)), Planted(in_place)],
    "no cache": [Caches()],
    "no NaN": [Planted(cosine)],
    "gate": [Planted(lambda w, h, c: (w / 40).pow(4).exp())],
    "precision": [Planted(halved)],
    "ties": [
        Planted(lambda w, h, c: w + torch.arange(w.shape[1]) * 1e-2),
        Planted(lambda w, h, c: w - torch.arange(w.shape[1]) * 1e-2),
    ],
    "row independence": [Planted(lambda w, h, c: w - w.sum(0) / max(len(w), 1))],
    "permutation": [Planted(lambda w, h, c: w * (1 + c[0].mean()))],
    "growth": [
        Planted(lambda w, h, c: F.linear(h, c)),
        Planted(lambda w, h, c: w - w.mean(1, keepdim=True)),
    ],
    "gradient": [Planted(lambda w, h, c: w.detach())],
    "usage jacobian": [WrongSlope(lambda w, h, c: w)],
    "linear": [SaysLinear(lambda w, h, c: w.tanh())],
}


def planted(table: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(name, subject, id=f"{name} {index}")
        for name, subjects in table.items()
        for index, subject in enumerate(subjects)
    ]


@pytest.mark.parametrize(("name", "router"), planted(PLANTED_ROUTERS))
def test_a_planted_bug_in_a_router_is_named(name: str, router: prw.Router) -> None:
    with pytest.raises(BrokenInvariant, match=f"breaks the invariant '{name}': ") as caught:
        check_router(router, examples=30)
    assert caught.value.invariant == name
    assert "smallest case: RouterCase(rows=" in str(caught.value)


def rows_of(records: Sequence[prw.Record]) -> list[tuple[Tensor, Tensor]]:
    """Logits and whether they count, of every forward."""
    found = []
    for record in records:
        for group in record.tally.groups.values():
            for seen, mask in zip(group.passes, group.masks, strict=True):
                logits = seen.logits()
                kept = torch.ones(len(logits)) if mask is None else mask.flatten().double()
                found.append((logits, kept.double()))
    return found


def squares(records: Sequence[prw.Record]) -> Tensor:
    """A correct loss: the mean square of the logits over the rows that count."""
    rows = rows_of(records)
    total = sum((w.square().sum(1) * kept).sum() for w, kept in rows)
    return total / sum(kept.sum() for _, kept in rows).clamp(min=1)  # type: ignore[union-attr]


def mean_of_means(records: Sequence[prw.Record]) -> Tensor:
    means = [(w.square().sum(1) * k).sum() / k.sum().clamp(min=1) for w, k in rows_of(records)]
    kept = sum(bool(k.any()) for _, k in rows_of(records))
    return torch.stack(means).sum() / max(kept, 1)


def every_row(records: Sequence[prw.Record]) -> Tensor:
    rows = rows_of(records)
    total = sum(((w - 1).square().sum(1) * kept).sum() for w, kept in rows)
    counted = any(bool(kept.any()) for _, kept in rows)
    return total / max(sum(len(kept) for _, kept in rows), 1) * counted  # type: ignore[return-value]


def forgetful(records: Sequence[prw.Record]) -> Tensor:
    found = squares(records)
    for record in records:
        for group in record.tally.groups.values():
            group.passes[:] = []
            group.masks[:] = []
    return found


def first_counts_more(records: Sequence[prw.Record]) -> Tensor:
    """Weighs the rows of the first group by their position among those that count."""
    values = []
    for record in records:
        group = next(iter(record.tally.groups.values()))
        for seen, mask in zip(group.passes, group.masks, strict=True):
            square_T = seen.logits().square().sum(1)
            values.append(square_T if mask is None else square_T[mask.flatten()])
    value_T = torch.cat(values)
    weight_T = 1 / torch.arange(1, len(value_T) + 1).double()
    return (value_T * weight_T).sum() + 0 * squares(records)


PLANTED_LOSSES: dict[str, list[Callable[..., Any]]] = {
    "scalar": [
        lambda r: squares(r)[None],
        lambda r: squares(r).float(),
        lambda r: float(squares(r)),
        lambda r: squares(r).log().log(),
    ],
    "purity": [forgetful, lambda r: squares(r) * torch.rand(())],
    "reach": [
        lambda r: squares(r).detach(),
        lambda r: r[0].tally.groups["b0.p0"].columns[0].sum() * 1.0,
    ],
    "nothing counted": [
        lambda r: squares(r) + 1.0,
        lambda r: squares(r) / sum(k.sum() for _, k in rows_of(r)),
    ],
    "mask": [every_row],
    "split": [mean_of_means, lambda r: squares(r) * len(r)],
    "order": [first_counts_more],
}


@pytest.mark.parametrize(("name", "loss"), planted(PLANTED_LOSSES))
def test_a_planted_bug_in_a_loss_is_named(name: str, loss: Callable[..., Any]) -> None:
    with pytest.raises(BrokenInvariant, match=f"breaks the invariant '{name}': ") as caught:
        check_loss(loss, examples=15)
    assert "smallest case: LossCase(samples=" in str(caught.value)


def test_a_sound_loss_of_ones_own_passes() -> None:
    check_loss(squares, examples=10)


class Wrong(torch.autograd.Function):
    """Identity forward, a gradient that is too large."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 1.01


def spoilt(change: Callable[..., Any]) -> Callable[..., Any]:
    """The reference after `change` of its arguments, or of its outputs with ``after``."""

    def op(*arguments: Any) -> Any:
        return plain(*change(*arguments))

    return op


def chosen_only(
    results: Any, x: Any, A: Any, B: Any, scaling: Any, expert: Any, gate: Any
) -> tuple[Tensor, ...]:
    """Detaches experts that nobody chose, so that their gradient is absent."""
    used = set(expert.flatten().tolist())
    A, B = (
        [[f if e in used else f.detach() for e, f in enumerate(of)] for of in part]
        for part in (A, B)
    )
    return plain(results, x, A, B, scaling, expert, gate)


def changes_results(results: Any, *rest: Any) -> list[Tensor]:
    outputs = plain(results, *rest)
    with torch.no_grad():
        results[0].add_(1.0)
    return list(outputs)


def flat_memory(results: Any, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Reads the memory of x as if x were contiguous."""
    if x.untyped_storage().nbytes() >= x.numel() * x.element_size():
        x = x.as_strided(x.shape, torch.empty(x.shape).stride())
    return plain(results, x, *rest)


PLANTED_BACKENDS: dict[str, list[Callable[..., Any]]] = {
    "outputs": [
        lambda *a: [y.bfloat16() for y in plain(*a)],
        lambda *a: [y.flatten(0, -2) for y in plain(*a)],
        lambda *a: plain(*a)[:1] if len(a[0]) > 1 else (),
    ],
    "purity": [changes_results, lambda *a: [y + torch.rand(()) for y in plain(*a)]],
    "strides": [flat_memory],
    "forward": [
        spoilt(lambda r, x, A, B, s, e, g: (r, x, A, B, s, e, None)),
        spoilt(lambda r, x, A, B, s, e, g: (r, x, A, B, s, e * 0, g)),
        spoilt(lambda r, x, A, B, s, e, g: (r, x, A, B, [[2.0] * len(A[0])] * len(A), e, g)),
        lambda r, x, *a: plain(r, x, *a) if x.shape[0] != 63 else tuple(y + 1 for y in r),
    ],
    "gradients": [
        spoilt(lambda r, x, *a: (r, Wrong.apply(x), *a)),
        spoilt(lambda r, x, A, B, s, e, g: (r, x, A, B, s, e, None if g is None else g.detach())),
        spoilt(lambda r, x, A, *a: (r, x, [[*of[:-1], Wrong.apply(of[-1])] for of in A], *a)),
        spoilt(lambda r, x, A, B, *a: (r, x, A, [[f.detach() for f in of] for of in B], *a)),
        spoilt(lambda r, *a: ([result.detach() for result in r], *a)),
    ],
    "starving expert": [chosen_only],
}


@pytest.mark.parametrize(("name", "op"), planted(PLANTED_BACKENDS))
def test_a_planted_bug_in_a_backend_is_named(name: str, op: Callable[..., Any]) -> None:
    with pytest.raises(BrokenInvariant, match=f"breaks the invariant '{name}': ") as caught:
        check_backend(op, examples=25)
    assert "smallest case: BackendCase(leading=(" in str(caught.value)


def test_every_invariant_has_a_planted_bug() -> None:
    for invariants, table in (
        (ROUTER_INVARIANTS, PLANTED_ROUTERS),
        (LOSS_INVARIANTS, PLANTED_LOSSES),
        (BACKEND_INVARIANTS, PLANTED_BACKENDS),
    ):
        assert [i.name for i in invariants] == list(table)  # type: ignore[attr-defined]
        assert all(table.values())


def test_a_counterexample_is_small_and_reads_well() -> None:
    with pytest.raises(BrokenInvariant) as caught:
        check_router(Planted(cosine))
    assert str(caught.value) == (
        "Planted breaks the invariant 'no NaN': no rows, zero rows and zero columns give finite "
        "numbers.\n"
        "  what happened: a row of zeros: a probability is not finite\n"
        "  smallest case: RouterCase(rows=1, width=1, experts=1, later=1, dtype=torch.float32, "
        "columns=torch.float32, noise='none', scale=1.0, seed=0)"
    )


def test_only_routers_are_checked_as_routers() -> None:
    with pytest.raises(prw.ConfigError, match="takes a prw.Router, got a str"):
        check_router("top1")  # type: ignore[arg-type]


def test_a_bug_that_raises_is_named_too() -> None:
    def op(results: Any, x: Tensor, *rest: Any) -> Any:
        x.view(-1)
        return plain(results, x, *rest)

    with pytest.raises(BrokenInvariant, match=r"what happened: RuntimeError: view size"):
        check_backend(op, examples=25)


@given(shapes(), pools(noise=False), histories())
def test_the_strategies_draw_what_can_be_built(
    leading: tuple[int, ...], plan: Any, history: tuple[str, ...]
) -> None:
    weave = plan.build()
    assert plan.config.noise is False and history[0] == "unlock"
    play(weave, history)
    assert 1 <= len(weave.stages) <= len(history)
    outputs = plan.forward(weave, plan.inputs(*leading))
    assert len(outputs) == plan.blocks * len(plan.sizes)
    shared = plan.config.share_router == "parent"
    assert len(weave.pools) == plan.blocks * (1 if shared else len(plan.sizes))
    assert all(y.shape[:-1] == leading and y.dtype == plan.dtype for y in outputs.values())
