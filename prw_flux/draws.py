"""From a data source and a task to samples, before anything is encoded.

Sample i of a stage is a pure function of (seed, stage, i).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from prw import PRWError
from prw_flux.batch_order import stable_hash
from prw_flux.data.images import ImageError
from prw_flux.tasks import DataSource, Task, TaskReject, Triple

TRIES: Final = 20
JUDGED_FROM: Final = 200
"""Drawn pictures from which on the share of unusable ones is judged."""
STRIDE: Final = 1_000_003
"""Distance to the example that replaces a rejected one; prime: a small source is covered."""


def held_out_stage(stage: str) -> str:
    """Under what name the held-out samples of a stage are drawn; no stage can be called so."""
    return f"{stage} held out"


class SampleError(PRWError, ValueError):
    """A stage has no usable samples, or a batch would have several sizes."""


@dataclass(frozen=True)
class Tally:
    """What was drawn.

    Attributes:
        rejected: rejected draws by reason: of examples, and of holes within the task.
        kinds: samples by their kind (of a hole, of an edit, a condition).
    """

    rejected: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        """Count what another counted, too."""
        self.rejected.update(other.rejected)
        self.kinds.update(other.kinds)


@dataclass
class Pictures:
    """How many pictures were drawn, how many of them cannot be used, and what the first has."""

    drawn: int = 0
    unusable: int = 0
    example: str = ""

    def add(self, other: Pictures) -> None:
        """Count what another counted, too."""
        self.drawn += other.drawn
        self.unusable += other.unusable
        self.example = self.example or other.example


class Draws:
    """The samples of a stage before they are encoded.

    Args:
        data: where examples come from.
        task: what makes samples of them.
        stage: name of the stage; with the seed it decides everything that is random.
        seed: of the run.
        max_rejected: largest share of the drawn pictures that may be unusable; see `DataConfig`.

    Attributes:
        tally, pictures: what this process has drawn, and what it was told of by `count`.
    """

    def __init__(
        self,
        data: DataSource,
        task: Task,
        *,
        stage: str,
        seed: int,
        max_rejected: float = 1.0,
    ) -> None:
        self.data, self.task, self.stage, self.seed = data, task, stage, seed
        self.max_rejected, self.tally, self.pictures = max_rejected, Tally(), Pictures()

    def apart(self) -> Draws:
        """The same samples, with counts of their own, which are judged where they are `count`ed."""
        return Draws(self.data, self.task, stage=self.stage, seed=self.seed)

    def count(self, tally: Tally, pictures: Pictures) -> None:
        """Add what was drawn `apart`, here or on another rank; raises like `judge`."""
        self.tally.add(tally)
        self.pictures.add(pictures)
        self.judge()

    def triple(self, index: int) -> Triple:
        """Sample `index`: the first usable one of a fixed sequence of examples.

        Raises:
            SampleError: none of the first 20 is usable.
        """
        reasons: Counter[str] = Counter()
        for attempt in range(TRIES):
            self.pictures.drawn += 1
            try:
                example = self.data.example(self.task.name, index + attempt * STRIDE)
                triple = self.task(example, stable_hash(self.seed, self.stage, index, attempt))
            except TaskReject as refusal:
                reasons[refusal.reason] += 1
                self.tally.rejected.update(refusal.counts)
                continue
            except ImageError as problem:
                reasons[f"picture {problem.reason}"] += 1
                self.pictures.add(Pictures(unusable=1, example=str(problem)))
                self.judge()
                continue
            self.tally.rejected.update(reasons)
            self.tally.rejected.update(triple.metadata.get("rejections", {}))
            self.tally.kinds[str(triple.metadata["kind"])] += 1
            return triple
        told = ", ".join(f"{reason} ({n} x)" for reason, n in reasons.most_common())
        raise SampleError(f"{self.data.name} gives no sample for {self.task.name!r}: {told}")

    def judge(self, *, last: bool = False) -> None:
        """Raise SampleError where too many pictures are unusable; a few, only after the last."""
        drawn, unusable = self.pictures.drawn, self.pictures.unusable
        if unusable <= self.max_rejected * drawn:
            return
        if last or drawn >= JUDGED_FROM:
            raise SampleError(
                f"{unusable} of {drawn} pictures of {self.data.name} cannot be used, above "
                f"data.max_rejected={self.max_rejected:g} (the first: {self.pictures.example}): "
                "mend them (prw-flux data check finds them in built data), or raise the limit"
            )
