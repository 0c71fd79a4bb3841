"""What every router must promise, and `check_router`, which tries it.

Shape suffixes: T routed rows, D width of what the router reads, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from hypothesis import strategies as st
from torch import Tensor

from prw.errors import ConfigError
from prw.router import Router, RouterPass, Routing
from prw.testing.invariant import Invariant, check, draw, near, require, same_bits

# fp32 sums of at most 130 products of numbers around 1 err by about 1e-6; a router's own functions
# may cost ten times that. Choices are compared where the two largest logits are farther apart.
CLOSE = 1e-4


@dataclass(frozen=True)
class RouterCase:
    """One situation a router is tried in; its numbers follow from the seed.

    Attributes:
        rows: T.
        width: D.
        experts: E.
        later: how many columns join afterwards.
        dtype: of the input, fp32 or fp64.
        columns: dtype of the columns.
        noise: no noise columns, noise columns in a deterministic call, or noise as in training.
        scale: of the input.
        seed: of all numbers.
    """

    rows: int
    width: int
    experts: int
    later: int = 1
    dtype: torch.dtype = torch.float32
    columns: torch.dtype = torch.float32
    noise: Literal["none", "quiet", "noisy"] = "none"
    scale: float = 1.0
    seed: int = 0

    def inputs(self, *, later: bool = False) -> Inputs:
        """The arguments of `Router.route`, with the later columns if asked for."""
        random = torch.Generator().manual_seed(self.seed)
        count = self.experts + self.later
        h_TD = (draw(random, self.rows, self.width) * self.scale).to(self.dtype)
        drawn = [draw(random, count, self.width).to(self.columns) for _ in range(2)]
        eps_TE = draw(random, self.rows, count).float()
        kept = count if later else self.experts
        signal, noise = ([c.clone() for c in part[:kept]] for part in drawn)
        return Inputs(
            h_TD,
            signal,
            [] if self.noise == "none" else noise,
            eps_TE[:, :kept].contiguous() if self.noise == "noisy" else None,
        )


@dataclass(frozen=True)
class Inputs:
    """The arguments of `Router.route`."""

    h_TD: Tensor
    signal: list[Tensor]
    noise: list[Tensor]
    eps_TE: Tensor | None

    def logits(self, router: Router) -> Tensor:
        """Of the experts that take part, ``[T, E]``."""
        logits = router.locked(self.h_TD, self.signal, self.noise, self.eps_TE)
        return logits[:, : len(self.signal)]

    def route(self, router: Router) -> Routing:
        """The routing."""
        return router.route(self.h_TD, self.signal, self.noise, self.eps_TE)

    def only(self, *rows: int) -> Inputs:
        """Some of the rows."""
        eps_TE = None if self.eps_TE is None else self.eps_TE[list(rows)]
        return replace(self, h_TD=self.h_TD[list(rows)], eps_TE=eps_TE)

    def arranged(self, order: list[int]) -> Inputs:
        """The experts in another order, or some of them more than once."""
        return replace(
            self,
            signal=[self.signal[i] for i in order],
            noise=[self.noise[i] for i in order] if self.noise else [],
            eps_TE=None if self.eps_TE is None else self.eps_TE[:, order],
        )

    def copied(self) -> Inputs:
        """Equal arguments, columns as rows of one tensor, as a snapshot holds them."""
        return Inputs(
            self.h_TD.clone(),
            list(torch.stack(self.signal).unbind()),
            list(torch.stack(self.noise).unbind()) if self.noise else [],
            None if self.eps_TE is None else self.eps_TE.clone(),
        )

    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [self.h_TD, *self.signal, *self.noise] + (
            [] if self.eps_TE is None else [self.eps_TE]
        )


def _logits(router: Router, case: RouterCase) -> None:
    given = case.inputs()
    found = router.logits(given.h_TD, given.signal, given.noise, given.eps_TE)
    require(
        found.dim() == 2 and found.shape[0] == case.rows and found.shape[1] >= case.experts,
        f"logits of shape {list(found.shape)} for {case.rows} rows and {case.experts} experts",
    )
    require(found.dtype == case.dtype, f"logits are {found.dtype} for inputs in {case.dtype}")


def _precision(router: Router, case: RouterCase) -> None:
    given = case.inputs()
    exact = replace(given, h_TD=given.h_TD.double()).logits(router)
    found = given.logits(router)
    near(found.softmax(-1), exact.softmax(-1), CLOSE, "probabilities beside those of fp64 inputs")
    # A router that rounds to bf16 inside moves in steps of 1/256, and not with its derivative.
    smooth = replace(case, rows=3, width=max(case.width, 8), scale=1.0, dtype=torch.float64)
    given, random = smooth.inputs(), torch.Generator().manual_seed(case.seed)
    given.h_TD.requires_grad_()
    logits = given.logits(router)
    if not logits.requires_grad:
        return
    weight, step = draw(random, *logits.shape), 1e-3 * draw(random, *given.h_TD.shape)
    (slope,) = torch.autograd.grad((weight * logits).sum(), given.h_TD)
    moved = [replace(given, h_TD=given.h_TD.detach() + sign * step) for sign in (0.5, -0.5)]
    up, down = ((weight * there.logits(router)).sum().detach() for there in moved)
    wanted = (slope * step).sum()
    near((up - down) * 1e3, wanted * 1e3, 0.05, "change of the logits by a step of 0.001")


def _deterministic(router: Router, case: RouterCase) -> None:
    given = case.inputs()
    before, state = given.copied(), torch.get_rng_state()
    first = given.logits(router)
    require(torch.equal(torch.get_rng_state(), state), "it drew from torch's generator")
    replace(case, seed=case.seed + 1).inputs().logits(router)
    same_bits(given.logits(router), first, "logits of the second evaluation")
    for now, then in zip(given.tensors(), before.tensors(), strict=True):
        same_bits(now, then, "an argument after the evaluation")


def _fresh_values(router: Router, case: RouterCase) -> None:
    given, other = case.inputs(), replace(case, seed=case.seed + 1).inputs()
    given.logits(router)
    for column, value in zip(given.signal + given.noise, other.signal + other.noise, strict=True):
        column.copy_(value)
    same_bits(given.logits(router), given.copied().logits(router), "logits after a step")


def _no_nan(router: Router, case: RouterCase) -> None:
    given = replace(case, scale=1.0).inputs()
    zeros = [torch.zeros_like(column) for column in given.signal]
    fresh = [*given.signal[:-1], zeros[-1]]
    rests = [torch.zeros_like(column) for column in given.noise]
    for what, tried in {
        "no rows": given.only(),
        "a row of zeros": replace(given, h_TD=torch.zeros_like(given.h_TD)),
        "a column of zeros, as a new expert has": replace(given, signal=fresh),
        "columns of zeros": replace(given, signal=zeros, noise=rests),
    }.items():
        tried = replace(tried, signal=[c.clone().requires_grad_() for c in tried.signal])
        routing = tried.route(router)
        require(bool(routing.probs.isfinite().all()), f"{what}: a probability is not finite")
        if not routing.gate.requires_grad:
            continue
        for slope in torch.autograd.grad(routing.gate.sum(), tried.signal, allow_unused=True):
            good = slope is None or bool(slope.isfinite().all())
            require(good, f"{what}: the gradient of a column is not finite")


def _gate(router: Router, case: RouterCase) -> None:
    routing = case.inputs().route(router)
    require(bool(routing.probs.isfinite().all()), "a probability is not finite")
    require(
        list(routing.probs.shape) == [case.rows, case.experts],
        f"probabilities of shape {list(routing.probs.shape)}",
    )
    near(routing.probs.sum(-1), torch.ones(case.rows), 1e-5, "sum of the probabilities")
    same_bits(routing.gate, routing.probs.amax(-1), "gate beside the largest probability")
    lowest = float(routing.gate.min()) if case.rows else 1.0
    require(lowest >= 1 / case.experts - 1e-6, f"a gate of {lowest} with {case.experts} experts")
    if case.experts == 1:
        same_bits(routing.gate, torch.ones_like(routing.gate), "gate of the only expert")


def _ties(router: Router, case: RouterCase) -> None:
    given = replace(case, noise="none").inputs()
    random = torch.Generator().manual_seed(case.seed)
    first = torch.randint(case.experts, (case.experts + case.later,), generator=random).tolist()
    found = given.arranged(first).logits(router)
    # the lanes of a matrix product may round differently, so not to the bit
    near(found, found[:, [first.index(i) for i in first]], CLOSE, "logit beside that of its twin")
    fresh = replace(given, signal=[torch.zeros_like(given.signal[0])] * len(first))
    require(not bool(fresh.route(router).expert.any()), "of columns of zeros not the first won")


def _rows(router: Router, case: RouterCase) -> None:
    case = replace(case, rows=max(case.rows, 2))
    given = case.inputs()
    wanted = given.logits(router)
    others = given.h_TD.clone()
    others[1:] = 100 * draw(torch.Generator().manual_seed(case.seed), *others[1:].shape) + 7
    for what, found in {
        "with other neighbours": replace(given, h_TD=others).logits(router),
        "alone": given.only(0).logits(router),
    }.items():
        near(found[0], wanted[0], CLOSE, f"logits of row 0 {what}")
        _same_choice(found[:1], wanted[:1], f"choice of row 0 {what}")


def _permuted(router: Router, case: RouterCase) -> None:
    given = case.inputs()
    random = torch.Generator().manual_seed(case.seed)
    order = torch.randperm(case.experts, generator=random).tolist()
    wanted, found = given.logits(router)[:, order], given.arranged(order).logits(router)
    near(found, wanted, CLOSE, f"logits of experts {order}")
    _same_choice(found, wanted, f"choice among experts {order}")


def _same_choice(found_TE: Tensor, wanted_TE: Tensor, what: str) -> None:
    """Outside the tie margin, where the two largest logits differ by less than rounding."""
    if wanted_TE.shape[1] > 1:
        top = wanted_TE.topk(2, dim=-1).values
        clear = top[:, 0] - top[:, 1] > 4 * CLOSE * wanted_TE.abs().amax(-1).clamp(min=1)
        found_TE, wanted_TE = found_TE[clear], wanted_TE[clear]
    same_bits(found_TE.argmax(-1), wanted_TE.argmax(-1), what)


def _growth(router: Router, case: RouterCase) -> None:
    # noise is left out: it is never there in the pinned calls whose bits are promised
    case = replace(case, noise="none" if case.noise == "none" else "quiet")
    few, many = case.inputs(), case.inputs(later=True)
    old = many.logits(router)[:, : case.experts]
    same_bits(old, few.logits(router), f"old logits beside {case.later} later columns")
    same_bits(few.copied().logits(router), few.logits(router), "logits of a snapshot's columns")


def _gradient(router: Router, case: RouterCase) -> None:
    given = replace(case, experts=max(case.experts, 2), dtype=torch.float64).inputs()
    given = replace(given, signal=[c.double().requires_grad_() for c in given.signal])
    probs = given.route(router).probs
    require(probs.requires_grad, "the probabilities have no gradient")
    slopes = torch.autograd.grad(probs.square().sum(), given.signal, allow_unused=True)
    for index, slope in enumerate(slopes):
        require(slope is not None, f"no gradient reaches column {index}")


def _jacobian(router: Router, case: RouterCase) -> None:
    case = replace(case, dtype=torch.float64, columns=torch.float64, scale=min(case.scale, 1.0))
    given = case.inputs()
    random = torch.Generator().manual_seed(case.seed)
    keep_T = torch.rand(case.rows, generator=random) < 0.7 if case.seed % 2 else None
    if keep_T is not None:
        given = replace(given, h_TD=torch.where(keep_T[:, None], given.h_TD, 0.0))
    newest = case.seed % case.experts
    learned = [c.clone().requires_grad_() for c in given.signal + given.noise]
    signal, noise = learned[: case.experts], learned[case.experts :]
    used_T = replace(given, signal=signal, noise=noise).route(router).probs[:, newest]
    total = used_T.sum() if keep_T is None else used_T[keep_T].sum()
    wanted = torch.autograd.grad(total, learned, allow_unused=True, materialize_grads=True)
    seen = RouterPass(router, *_parts(given), given.route(router).probs)
    found_signal, found_noise = router.usage_jacobian(seen, newest, keep_T)
    near(found_signal, torch.stack(wanted[: case.experts]), 1e-9, "by the signal columns")
    if noise:
        near(found_noise, torch.stack(wanted[case.experts :]), 1e-9, "by the noise columns")


def _parts(given: Inputs) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor | None]:
    return given.h_TD, given.signal, given.noise, given.eps_TE


def _linear(router: Router, case: RouterCase) -> None:
    if router.linear:
        given = replace(case, noise="none", dtype=torch.float64).inputs()
        wanted = given.h_TD @ torch.stack(given.signal).double().T
        near(given.logits(router), wanted, 1e-9, "logits beside h W")


RouterInvariant: TypeAlias = Invariant[Router, RouterCase]

ROUTER_INVARIANTS: tuple[RouterInvariant, ...] = (
    Invariant(
        "logits", "there is one logit per row and expert, in the dtype of the input", _logits
    ),
    Invariant(
        "determinism",
        "the same arguments give the same bits, no generator is drawn from, nothing is changed",
        _deterministic,
    ),
    Invariant(
        "no cache", "columns changed in place, as by an optimizer, are read again", _fresh_values
    ),
    Invariant("no NaN", "no rows, zero rows and zero columns give finite numbers", _no_nan),
    Invariant(
        "gate", "the gate is the largest probability, in [1/N, 1], exactly 1 for one expert", _gate
    ),
    Invariant("precision", "nothing inside is coarser than fp32", _precision),
    Invariant(
        "ties",
        "equal columns have equal logits, and of new experts the one with the lowest index wins",
        _ties,
    ),
    Invariant("row independence", "the routing of a row depends on that row only", _rows),
    Invariant(
        "permutation", "permuting experts together with their columns changes nothing", _permuted
    ),
    Invariant(
        "growth", "without noise, columns that join later change no bit of the old logits", _growth
    ),
    Invariant("gradient", "a gradient reaches every signal column", _gradient),
    Invariant("usage jacobian", "usage_jacobian is the derivative of the usage", _jacobian),
    Invariant("linear", "a router with linear = True computes h W without noise", _linear),
)
"""The promises of a router, in the order in which `check_router` tries them."""


def router_cases() -> st.SearchStrategy[RouterCase]:
    """Situations to try a router in, the simplest first."""
    return st.builds(
        RouterCase,
        rows=st.sampled_from([1, 2, 3, 5, 0, 17, 63]),
        width=st.sampled_from([1, 2, 3, 8, 33, 129]),
        experts=st.integers(1, 18),
        later=st.integers(1, 20),
        dtype=st.sampled_from([torch.float32, torch.float64]),
        columns=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
        noise=st.sampled_from(["none", "quiet", "noisy"]),
        scale=st.sampled_from([1.0, 30.0]),
        seed=st.integers(0, 2**16),
    )


def check_router(router: Router | type[Router], *, examples: int = 60) -> None:
    """Try whether a router keeps the promises that growing pools depend on.

    Args:
        router: a router, or its class, which is called without arguments.
        examples: how many situations each invariant of `ROUTER_INVARIANTS` is tried in.

    Raises:
        BrokenInvariant: one does not hold; the message names it and the smallest situation found.
        ConfigError: it is no `prw.Router`.
    """
    found = router() if isinstance(router, type) else router
    if not isinstance(found, Router):
        raise ConfigError(f"check_router takes a prw.Router, got a {type(found).__name__}")
    check(found, type(found).__name__, ROUTER_INVARIANTS, router_cases(), examples)
