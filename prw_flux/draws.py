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


class Draws:
    """The samples of a stage before they are encoded.

    Args:
        data: where examples come from.
        task: what makes samples of them.
        stage: name of the stage; with the seed it decides everything that is random.
        seed: of the run.
        max_rejected: largest share of the drawn pictures that may be unusable; see `DataConfig`.

    Attributes:
        tally: what this process has drawn.
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
        self.max_rejected, self.tally = max_rejected, Tally()
        self._drawn, self._unusable = 0, 0
        self._example: ImageError | None = None

    def triple(self, index: int) -> Triple:
        """Sample `index`: the first usable one of a fixed sequence of examples.

        Raises:
            SampleError: none of the first 20 is usable.
        """
        reasons: Counter[str] = Counter()
        for attempt in range(TRIES):
            self._drawn += 1
            try:
                example = self.data.example(self.task.name, index + attempt * STRIDE)
                triple = self.task(example, stable_hash(self.seed, self.stage, index, attempt))
            except TaskReject as refusal:
                reasons[refusal.reason] += 1
                self.tally.rejected.update(refusal.counts)
                continue
            except ImageError as problem:
                reasons[f"picture {problem.reason}"] += 1
                self._unusable, self._example = self._unusable + 1, self._example or problem
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
        if self._unusable <= self.max_rejected * self._drawn:
            return
        if last or self._drawn >= JUDGED_FROM:
            raise SampleError(
                f"{self._unusable} of {self._drawn} pictures of {self.data.name} cannot be used, "
                f"above data.max_rejected={self.max_rejected:g} (the first: {self._example}): mend "
                "them (prw-flux data check finds them in built data), or raise the limit"
            )
