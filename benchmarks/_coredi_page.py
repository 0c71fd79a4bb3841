"""The tables of `benchmarks.coredi` in docs/pages/coredi.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from benchmarks._page import table

WORDS: Final = {
    "shapes": "drawn scenes, in tiny-flux's latents",
    "photos": "crops of real photos, in the latents of FLUX.1's tiny autoencoder",
    "pixels": "drawn scenes, as patches of pixels",
}
QUALITY: Final = {"C": "C", "L": "L", "FD": "Fréchet distance"}
LOG: Final = {
    "feature_rank": "effective rank", "feature_scale": "scale before BN",
    "feature_loss": "feature loss", "loss": "image loss",
}  # fmt: skip


def tables(result: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> str:
    """Where the lines come from, a table per world, then the cost of a step.

    Args:
        result: of a run, with its ``variants``.
        lines: of the finished arms.
    """
    commits = ", ".join(sorted({line["commit"] for line in lines}))
    devices = ", ".join(
        sorted({f"{line['device']}, {line['threads']} thread(s)" for line in lines})
    )
    parts = [
        [f"Commit {commits}, torch {result['torch']}, {devices}. A cell is the mean over the seeds "
         "[lowest, highest]."]
    ]  # fmt: skip
    for world, words in WORDS.items():
        arms = {
            name.partition(": ")[2]: told
            for name, told in result["variants"].items()
            if name.startswith(f"{world}: ")
        }
        if arms:
            parts += [[f"#### {world}: {words}"], _world(arms)]
    parts += [["#### Cost of a training step"], _cost(result["variants"])]
    return "\n\n".join("\n".join(part) for part in parts)


def _world(arms: Mapping[str, Any]) -> list[str]:
    told = next(iter(arms.values()))
    looks = told["quality"]
    half = len(looks) // 2 - 1
    chosen = [(key, at) for key in QUALITY if key in looks[-1] for at in (half, -1)
              if (key, at) != ("L", half)]  # fmt: skip
    head = ["arm", "seeds", *(f"{QUALITY[key]} after {looks[at]['step']}" for key, at in chosen),
            "steps to `none`", *LOG.values()]  # fmt: skip
    body = []
    for arm, own in arms.items():
        steps = ", ".join("never" if s is None else f"{s:.0f}" for s in own["steps_to_none"])
        body.append([
            arm, str(own["seeds"]), *(_cell(own["quality"][at][key]) for key, at in chosen),
            steps, *(_cell(own.get(key)) for key in LOG),
        ])  # fmt: skip
    return table(head, body)


def _cell(found: Mapping[str, float] | None) -> str:
    if found is None:
        return "-"
    digits = 0 if found["mean"] >= 100 else 2
    low, high = (f"{found[name]:.{digits}f}" for name in ("low", "high"))
    return f"{found['mean']:.{digits}f}" + (f" [{low}, {high}]" if low != high else "")


def _cost(variants: Mapping[str, Any]) -> list[str]:
    body = []
    for name, told in variants.items():
        if "of_no_features" in told and ", no features, " not in name:
            _, way, shape = name.split(", ", 2)
            body.append([way, shape, f"{told['of_no_features']:.3f}"])
    return table(["tokens", "transformer", "times a step without features"], body, 2)
