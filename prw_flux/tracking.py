"""Trackers (TensorBoard, Weights & Biases, one's own) through accelerate, at the run's own steps.

A tracker's step is the number of steps of the whole curriculum, a function of where the run is: a
resumed run goes on where its state was saved, and nothing about trackers has to be kept.
"""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol, final, runtime_checkable

from prw import ConfigError
from prw.named_object import named_object
from prw.telemetry import RoutingSummary
from prw_flux.rundir import RunFolder
from prw_flux.tasks import Image

KNOWN: Final[Mapping[str, str]] = {"tensorboard": "tensorboard", "wandb": "wandb"}
"""Trackers by name, and the package that each needs."""
PROJECT: Final = "prw-flux"
OURS: Final = frozenset({"stage", "task", "step"})


@runtime_checkable
class Shows(Protocol):
    """A tracker that takes pictures."""

    name: str

    def log_images(self, values: dict[str, Any], step: int | None, **options: Any) -> None:
        """Pictures [N, H, W, 3] by name."""


def require_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError for a tracker that there is not, or whose package is not installed."""
    for name in names:
        if ":" in name:
            named_object(name, "tracker")
        elif name not in KNOWN:
            raise ConfigError(
                f"trackers: there is no {name!r}; there are {', '.join(KNOWN)}, and one of your "
                "own is package.module:function"
            )
        elif importlib.util.find_spec(KNOWN[name]) is None:
            raise ConfigError(
                f"trackers: {name!r} needs the package {KNOWN[name]}, which is not installed: pip "
                f"install {KNOWN[name]}, or leave it out"
            )


@final
class Trackers:
    """The trackers of a run, none where it names none.

    Args:
        opened: started `accelerate.tracking.GeneralTracker` objects.
    """

    def __init__(self, opened: Sequence[Any] = ()) -> None:
        self._opened = tuple(opened)

    @classmethod
    def open(cls, run: RunFolder, step: int) -> Trackers:
        """Those of a run that has done `step` steps.

        TensorBoard drops what an earlier process logged after that step. W&B keeps the first value
        that it was given for a step; a resumed run gives it the same ones again.

        Raises:
            ConfigError: as `require_trackers`.
        """
        require_trackers(run.config.trackers)
        opened = [_start(name, run, step) for name in run.config.trackers]
        trackers = cls(opened)
        if step == 0:
            trackers.log({"config": run.config.to_json()}, 0)
        return trackers

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Numbers and texts by name."""
        for tracker in self._opened:
            tracker.log(dict(values), step=step)

    def picture(self, name: str, picture: Image, step: int) -> None:
        """One picture, for the trackers that show pictures."""
        for tracker in self._opened:
            if isinstance(tracker, Shows):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name: picture[None]}, step=step, **layout)

    def close(self) -> None:
        """Write what is buffered."""
        for tracker in self._opened:
            tracker.finish()


def _start(name: str, run: RunFolder, step: int) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    PartialState()  # accelerate's trackers log, which it refuses to do without
    if name == "tensorboard":
        tracker = TensorBoardTracker("tensorboard", run.path, purge_step=step + 1)
    elif name == "wandb":
        if "wandb" not in run.index:
            run.note(wandb=uuid.uuid4().hex[:12])
        tracker = WandBTracker(
            PROJECT, id=run.index["wandb"], resume="allow", name=run.path.name, dir=str(run.path)
        )
    else:
        make: Any = named_object(name, "tracker")
        tracker = make(run.path, step)
    tracker.start()
    return tracker


def tracked(line: Mapping[str, Any]) -> dict[str, float]:
    """What trackers are told of a line of the log: its numbers, by task, and those of each block.

    ``TASK/loss``, ``TASK/usage_noisy`` and so on; ``TASK/blocks/usage_noisy/NAME`` per block.
    """
    task = line["task"]
    values = {
        f"{task}/{name}": float(value)
        for name, value in line.items()
        if name not in OURS and isinstance(value, (int, float))
    }
    for name, blocks in line.get("blocks", {}).items():
        values |= {f"{task}/blocks/{name}/{block}": value for block, value in blocks.items()}
    return values


def by_block(summary: RoutingSummary) -> dict[str, dict[str, float]]:
    """``usage`` of the newest expert and mean ``margin`` of the gate, per routed block."""
    usage, margin = summary.usage("group")[:, -1].tolist(), summary.margin("group").tolist()
    return {
        "usage": dict(zip(summary.groups, usage, strict=True)),
        "margin": dict(zip(summary.groups, margin, strict=True)),
    }
