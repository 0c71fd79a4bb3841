"""What a learned feature stream is worth, and what each of its safeguards holds up.

    python -m benchmarks.coredi [--worlds shapes,photos] [--seeds 3] [--steps 200] [--arms a,b]
                                [--results FILE] [--figure FILE] [--quick]
                                [--encoder auto|squeezenet|autoencoder] [--page PAGE.md]

A small FLUX-shaped transformer learns pictures from nothing, with autoencoder and text encoders
frozen, once per world, arm and seed; every arm sees the same pictures, times and noise:

``none``              no features
``fixed PCA``         principal components, batch normalised: the learned arm without learning
``ReDi``              principal components as in ReDi's code: not normalised
``learned``           CoReDi: learned projection, batch norm, stop-gradient, orthogonality
``covariance``        the same with decorrelated channels instead of orthogonality: the default
``no stop-gradient``  learned, but the projection sees its own target
``no batch norm``     learned, not normalised
``no regulariser``    learned, weight 0
``no safeguard``      learned, none of the three

The worlds are ``shapes`` (ShapeWeave in tiny-flux's latents), ``photos`` (crops of real photos in
the latents of FLUX.1's tiny autoencoder, no captions) and ``pixels`` (ShapeWeave as patches of
pixels, the transformer predicts the clean picture).

Of each: losses, effective rank and scale of the projected features over the steps; of generated
pictures the Fréchet distance to held-out ones and, where there are scenes, ShapeWeave's exact
score; the steps an arm takes to be as good as ``none`` of the same seed is at its end. A line per
finished arm and seed goes to --results, and what is there already is not trained again. Beside
them: the CPU time of a training step with merged and with separate tokens, at two sizes.

Nothing is printed unless a new stream leaves the transformer's velocity what it was, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._common import head, keep, machine, parser
from benchmarks._coredi_course import Course, Size, unchanged
from benchmarks._coredi_overhead import overhead
from benchmarks._coredi_page import tables
from benchmarks._coredi_worlds import WORLDS, Amount
from benchmarks._page import require_marks, write_between
from prw_flux.coredi import REDI, CoReDiConfig

CHANNELS = 8
LEARNED = CoReDiConfig(
    enabled=True, channels=CHANNELS, constant="drop", orthogonality=0.1, covariance=0.0
)
ARMS: dict[str, CoReDiConfig | None] = {
    "none": None,
    "fixed PCA": replace(LEARNED, learn_projection=False),
    "ReDi": replace(REDI, enabled=True, channels=CHANNELS, constant="drop"),
    "learned": LEARNED,
    "covariance": replace(LEARNED, orthogonality=0.0, covariance=0.1),
    "no stop-gradient": replace(LEARNED, stop_gradient=False),
    "no batch norm": replace(LEARNED, normalise="none"),
    "no regulariser": replace(LEARNED, orthogonality=0.0),
    "no safeguard": replace(LEARNED, orthogonality=0.0, normalise="none", stop_gradient=False),
}
HEADLINE = {"shapes": ("C", 1), "photos": ("FD", -1), "pixels": ("FD", -1)}
"""What an arm is judged by, and whether more of it is better."""
Line = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Train the arms that are missing, measure the overhead, print; 1 where the check fails."""
    args = _parse(arguments)
    size, amount = Size(), Amount(images=1500, asked=128)
    if args.quick:
        size, amount = Size(4, 4, 2, 2, 32, 1), Amount(images=32, asked=2, real=8)
    size = size if args.steps is None else replace(size, steps=args.steps)
    finished = read(args.results)
    variants: dict[str, Any] = {}
    lines: list[Line] = []
    for name in args.worlds:
        world = WORLDS[name](amount, args.encoder)
        if not unchanged(Course(world, size, LEARNED, 0)):
            print("no figures: a new feature stream changes the image path", file=sys.stderr)
            return 1
        about = {"world": name, "size": asdict(size), "amount": asdict(amount),
                 "encoder": world.encoder}  # fmt: skip
        own = [line for line in finished if about.items() <= line.items()]
        done = {(line["arm"], line["seed"]) for line in own}
        for seed in range(1 if args.quick else args.seeds):
            for arm in args.arms:
                if (arm, seed) in done:
                    continue
                line = {**about, "arm": arm, "seed": seed, **machine("cpu"),
                        **Course(world, size, ARMS[arm], seed).run()}  # fmt: skip
                own.append(line)
                append(args.results, line)
                print(f"{name}, {arm}, seed {seed}: {line['quality'][-1]}", flush=True)
        variants |= {f"{name}: {arm}": told for arm, told in summary(own, *HEADLINE[name]).items()}
        lines += own
    variants |= overhead(LEARNED, args.quick)
    result = {"benchmark": "coredi", **machine("cpu"), "size": asdict(size),
              "amount": asdict(amount), "variants": variants}  # fmt: skip
    tell(result)
    keep(result, args.json)
    if args.figure:
        draw(lines, args.figure)
    if args.page:
        write_between(args.page, "coredi", tables(result, lines))
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    found = parser("coredi", __doc__ or "")
    found.add_argument("--worlds", type=_among(WORLDS), default=["shapes"])
    found.add_argument("--seeds", type=int, default=3)
    found.add_argument("--steps", type=int)
    found.add_argument("--arms", type=_among(ARMS), default=list(ARMS))
    found.add_argument("--encoder", choices=("auto", "squeezenet", "autoencoder"), default="auto")
    found.add_argument("--results", type=Path, help="finished arms as JSON lines; continued")
    found.add_argument("--figure", type=Path, help="where to draw the finished arms")
    found.add_argument("--page", type=Path, help="write the tables into this page")
    args = found.parse_args(arguments)
    require_marks(found, args.page, "coredi")
    return args


def _among(known: Mapping[str, Any]) -> Any:
    def names(text: str) -> list[str]:
        found = text.split(",")
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"no {unknown[0]!r}; there are {', '.join(known)}")
        return found

    return names


def read(path: Path | None) -> list[Line]:
    """Finished arms; a line that was cut off by a crash is left out."""
    if path is None or not path.is_file():
        return []
    lines = []
    for text in path.read_text("utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def append(path: Path | None, line: Line) -> None:
    """Add a finished arm."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def summary(lines: Sequence[Line], headline: str, sign: int) -> dict[str, Any]:
    """Per arm, over seeds: quality at every look, steps to `none`, mean of the last fifth's log."""
    bars = {line["seed"]: line["quality"][-1][headline] for line in lines if line["arm"] == "none"}
    found: dict[str, Any] = {}
    for arm in ARMS:
        own = [line for line in lines if line["arm"] == arm]
        if not own:
            continue
        told: dict[str, Any] = {"seeds": len(own), "headline": headline, "quality": []}
        for index, look in enumerate(own[0]["quality"]):
            marks = [line["quality"][index] for line in own]
            told["quality"].append(
                {"step": look["step"]}
                | {k: among([m[k] for m in marks]) for k in look if k != "step"}
            )
        tail = [line["log"][-max(1, len(line["log"]) // 5) :] for line in own]
        for key in own[0]["log"][-1]:
            if key != "step":
                told[key] = among([float(np.mean([e[key] for e in part])) for part in tail])
        told["cpu_ms_per_step"] = among([line["cpu_ms_per_step"] for line in own])
        told["steps_to_none"] = [
            steps_to(line["quality"], headline, sign, bars[line["seed"]])
            for line in own if line["seed"] in bars
        ]  # fmt: skip
        found[arm] = told
    return found


def steps_to(looks: Sequence[Mapping[str, float]], key: str, sign: int, bar: float) -> float | None:
    """The step from which on a look is at least as good as a bar, between looks linearly.

    None where the last look is not.
    """
    if sign * looks[-1][key] < sign * bar:
        return None
    reached = looks[-1]
    for before, after in zip(reversed(looks[:-1]), reversed(looks[1:]), strict=True):
        if sign * before[key] < sign * bar:
            share = (bar - before[key]) / (after[key] - before[key])
            return round(before["step"] + share * (after["step"] - before["step"]), 1)
        reached = before
    return float(reached["step"])


def among(values: Sequence[float]) -> dict[str, float]:
    """Mean, lowest and highest."""
    found = {"mean": sum(values) / len(values), "low": min(values), "high": max(values)}
    return {name: round(value, 4) for name, value in found.items()}


def tell(result: Mapping[str, Any]) -> None:
    """For people."""
    head(result)
    print(f"{'':26}{'seeds':>6}{'loss':>9}{'f. loss':>9}{'rank':>7}{'scale':>8}"
          f"{'C':>7}{'L':>7}{'FD':>8}  steps to none")  # fmt: skip
    for arm, told in result["variants"].items():
        if "seeds" not in told:
            print(f"{arm}: {told['median_ms']} ms, {told['of_no_features']} of no features")
            continue
        keys = ("loss", "feature_loss", "feature_rank", "feature_scale")
        last = told["quality"][-1]
        cells = [told.get(k, {}).get("mean") for k in keys]
        cells += [last.get(k, {}).get("mean") for k in ("C", "L", "FD")]
        words = [
            "-".rjust(width) if cell is None else f"{cell:{width}.{2 if width == 8 else 3}f}"
            for cell, width in zip(cells, (9, 9, 7, 8, 7, 7, 8), strict=True)
        ]
        steps = ", ".join("never" if s is None else f"{s:.0f}" for s in told["steps_to_none"])
        print(f"{arm:26}{told['seeds']:>6}" + "".join(words) + f"  {steps}")


def draw(lines: list[Line], path: Path) -> None:
    """Curves of every arm, and projected features as colours over the steps; a file per world."""
    from benchmarks._coredi_figure import figure

    path.parent.mkdir(parents=True, exist_ok=True)
    for world in dict.fromkeys(line["world"] for line in lines):
        own = [line for line in lines if line["world"] == world]
        file = path.with_stem(f"{path.stem}-{world}")
        figure(own, list(ARMS)).savefig(file, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
