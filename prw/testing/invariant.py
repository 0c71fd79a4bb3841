"""Running an invariant on somebody's object: search, shrink, and say what broke in plain words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy
from torch import Tensor

Subject = TypeVar("Subject")
Case = TypeVar("Case")


class BrokenInvariant(AssertionError):
    """An object breaks a promise; the message names it and shows the smallest case found.

    Attributes:
        invariant: the name of the promise.
        case: the smallest case found in which it is broken.
    """

    def __init__(
        self, subject: str, invariant: str, promise: str, problem: str, case: object
    ) -> None:
        super().__init__(
            f"{subject} breaks the invariant {invariant!r}: {promise}.\n"
            f"  what happened: {problem}\n"
            f"  smallest case: {case}"
        )
        self.invariant = invariant
        self.case = case


@dataclass(frozen=True)
class Invariant(Generic[Subject, Case]):
    """A promise of an object, and the function that raises AssertionError where it is broken.

    Attributes:
        name: short and unique among the promises of its kind.
        promise: what must hold, in one sentence without a full stop.
        holds: takes the object and a drawn case.
    """

    name: str
    promise: str
    holds: Callable[[Subject, Case], None]


def check(
    subject: Subject,
    label: str,
    invariants: Sequence[Invariant[Subject, Case]],
    cases: SearchStrategy[Case],
    examples: int,
    *,
    always: Sequence[Case] = (),
) -> None:
    """Try every invariant on drawn cases; the same cases in every run.

    Args:
        subject: what is tried.
        label: its name in messages.
        invariants: the promises, in the order in which they are tried.
        cases: where cases come from.
        examples: how many cases each invariant is tried on.
        always: cases that are tried besides.

    Raises:
        BrokenInvariant: at the first invariant that does not hold.
    """
    for invariant in invariants:
        found = _smallest(subject, invariant, cases, examples, always)
        if found is not None:
            case, error = found
            plain = isinstance(error, AssertionError)
            problem = str(error) if plain else f"{type(error).__name__}: {error}"
            raise BrokenInvariant(
                label, invariant.name, invariant.promise, problem, case
            ) from error


def _smallest(
    subject: Subject,
    invariant: Invariant[Subject, Case],
    cases: SearchStrategy[Case],
    examples: int,
    always: Sequence[Case],
) -> tuple[Case, Exception] | None:
    """The smallest case found in which the invariant does not hold, and how it failed."""
    failures: list[tuple[Case, Exception]] = []

    def attempt(case: Case) -> None:
        try:
            invariant.holds(subject, case)
        except Exception as error:
            failures.append((case, error))
            raise

    search = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )(given(cases)(attempt))
    try:
        search()
        for case in always:
            attempt(case)
    except Exception:
        if not failures:
            raise
        # hypothesis runs the smallest case once more at the end, so it is the last one here
        return failures[-1]
    return None


def require(condition: bool, problem: str) -> None:
    """Raise AssertionError with `problem` unless the condition holds."""
    if not condition:
        raise AssertionError(problem)


def same_bits(found: Tensor, wanted: Tensor, what: str) -> None:
    """Raise AssertionError unless two tensors are equal bit for bit; NaN equals NaN."""
    require(
        found.shape == wanted.shape and found.dtype == wanted.dtype,
        f"{what}: {found.dtype} {list(found.shape)}, not {wanted.dtype} {list(wanted.shape)}",
    )
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    if not bool(same.all()):
        place = (~same).nonzero()[0].tolist()
        one, two = found[tuple(place)].item(), wanted[tuple(place)].item()
        raise AssertionError(f"{what}: {one!r} at {place}, not {two!r}")


def near(found: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    """Raise AssertionError unless two tensors agree.

    ``|found - wanted| <= tolerance * max(1, max |wanted|)``, so that sums of cancelling terms are
    judged by the size of what was added.
    """
    require(
        found.shape == wanted.shape, f"{what}: shape {list(found.shape)}, not {list(wanted.shape)}"
    )
    if not found.numel():
        return
    found, wanted = found.detach().double(), wanted.detach().double()
    scale = max(1.0, float(wanted.abs().nan_to_num().max()))
    error = (found - wanted).abs()
    wrong = ~(error <= tolerance * scale) & ~(found == wanted)
    if bool(wrong.any()):
        place = wrong.nonzero()[0].tolist()
        one, two = found[tuple(place)].item(), wanted[tuple(place)].item()
        raise AssertionError(
            f"{what}: {one:.8g} at {place}, not {two:.8g} (tolerance {tolerance * scale:.2g})"
        )


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal fp64 numbers of a seeded generator."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)
