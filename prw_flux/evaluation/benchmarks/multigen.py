"""Control maps, MultiGen-20M and its kin, as ControlNet++ evaluates them (arXiv 2404.07987).

The benchmark's folder holds `multigen.json`, one condition each, as the authors' data sets do:

    {"version": 1, "condition": "canny", "name": "MultiGen-20M_canny_eval", "items": [
      {"id": "0", "image": "images/0.png", "text": "a caption"}, ...]}

with `condition` canny, hed, lineart, depth or seg. Items of depth have `control`, the depth map
(near is white); items of seg have `control`, the coloured map that a model is given, and `label`,
the class numbers; then the file also says `classes`, their count, `first`, the number of the first
one in the labels (1 in ADE20K's files), and `ignore`, the number that does not count (0 there).

Everything happens at 512 x 512 pixels: pictures are stretched to it, not cropped, and a picture of
another size is brought to it before it is scored. Results, as the public scripts read them:
`images/group_<g>/<id>.png`, beside it the map that was read from it (`_edge`, `_lineart`,
`_depth`), and `annotations/<id>.png`, the map that was given. The annotations of line art are white
on black and `<id>_lineart.png` is black on white, as there.

All numbers but RMSE are times 100, and F1 is over the stack of a prompt's pictures, as there. Line
art has two numbers, see `inverted_as_scripted`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from PIL import Image as PILImage

from prw_flux.data.images import ImageError, open_image, open_map
from prw_flux.evaluation.benchmarks.base import (
    Ask,
    Benchmark,
    BenchmarkError,
    Encoders,
    Line,
    Unscored,
)
from prw_flux.evaluation.benchmarks.multigen_index import (
    CONDITIONS,
    FILE,
    SIZES,
    Controlled,
    classes,
    read,
)
from prw_flux.evaluation.encoders import Encoder
from prw_flux.evaluation.map_models import Map, MapModel
from prw_flux.evaluation.metrics import Confusion, depth_rmse, frechet_distance, ms_ssim
from prw_flux.evaluation.metrics.structure import depth_estimate, depth_label
from prw_flux.tasks.base import Image
from prw_flux.tasks.control import as_rgb

SIDE: Final = 512
GROUPS: Final = 4
SETS: Final[Mapping[str, str]] = {
    "Captioned_ADE20K": "seg mIoU ADE20K",
    "Captioned_COCOStuff": "seg mIoU COCO-Stuff",
}
"""mIoU is of one set of classes, so the set is part of its name."""


@final
class MultiGen(Benchmark[Controlled]):
    """The benchmark's folder.

    Args:
        folder: as above.
        maps: reads a map from a picture; see `map_model`.
        groups: pictures per prompt; the authors make 4.

    Raises:
        BenchmarkError: multigen.json is not there, of another version, or an item is unusable.
    """

    name = "multigen"
    task = "control"

    def __init__(self, folder: Path, maps: MapModel, *, groups: int = GROUPS) -> None:
        if groups < 1:
            raise BenchmarkError(f"multigen needs at least one picture per prompt, got {groups}")
        data, first = read(folder)
        self.condition = str(data["condition"])
        self.set, self._maps, self._groups = str(data.get("name", "unnamed")), maps, groups
        self.items = tuple(
            replace(item, key=f"{item.key}/{g}", group=g,
                    output=f"images/group_{g}/{item.key}.png")
            for item in first
            for g in range(groups)
        )  # fmt: skip
        self._first, self._confusion = classes(data, self.condition, folder / FILE)
        self._of = {item.output: item for item in self.items}
        self._features: dict[tuple[str, int | None], list[Any]] = defaultdict(list)
        self._seen: set[tuple[str, str]] = set()
        ending = CONDITIONS[self.condition]
        self.allowed = frozenset(
            [f"annotations/{item.id}.png" for item in first]
            + [_ended(item.output, ending) for item in self.items if ending]
        )
        if SIZES.get(self.set) != len(first):
            self.notes = (
                f"{folder} holds {len(first)} items of {self.set!r}, published are "
                f"{', '.join(f'{name} {size}' for name, size in SIZES.items())}: not the same set",
            )

    @property
    def folder_name(self) -> str:
        """The benchmark, its condition and its set."""
        return f"{self.name}-{self.condition}-{self.set}"

    def asks(self) -> tuple[Ask, ...]:
        """Squares, from the map."""
        return tuple(replace(ask, square=True) for ask in super().asks())

    def source(self, ask: Ask) -> Image:
        """The map as a picture, 512 x 512: white lines on black, near is white, or classes."""
        return as_rgb(self._control(self._of[ask.output]))

    def source_size(self, ask: Ask) -> tuple[int, int] | None:
        """(512, 512); None where the picture cannot be opened."""
        return (SIDE, SIDE) if super().source_size(ask) else None

    def given(self, item: Controlled, results: Path) -> Path:
        """The given map, as generation wrote it; labels are no picture to look at."""
        written = results / f"annotations/{item.id}.png"
        return item.control or written

    def beside(self, ask: Ask, source: Image, output: Image) -> Mapping[str, Image]:
        """The map read from the output and the given one, where the public scripts look."""
        item, ending = self._of[ask.output], CONDITIONS[self.condition]
        annotation = f"annotations/{item.id}.png"
        if item.label is not None:
            return {annotation: open_map(item.label)}
        found, wanted = self._maps(square(output)), source[..., 0]
        if self.condition == "depth":
            blank = np.zeros((SIDE, SIDE), np.uint8)
            found = depth_estimate(found, blank.shape) if found.max() > 0 else blank
            wanted = depth_label(wanted)
        if self.condition == "lineart":
            found = 255 - found
        return {annotation: wanted, _ended(ask.output, ending): as_grey(found)}

    def score(self, item: Controlled, output: Image, encoders: Encoders) -> dict[str, Any]:
        """The condition's values of one picture, CLIP-S, and features for the distances."""
        picture = square(output)
        row: dict[str, Any] = {"id": item.id, "group": item.group, **self._agreed(item, picture)}
        for value in encoders.caption_score([picture], item.text):
            row["CLIP-S"] = 100 * value
        for name, encoder in encoders.distances().items():
            self._features[name, item.group].append(encoder.images([picture]))
            if (name, item.id) not in self._seen:
                self._seen.add((name, item.id))
                self._features[name, None].append(self._real(encoder, item))
        return row

    def lines(self, rows: Sequence[Mapping[str, Any]], encoders: Encoders) -> list[Line]:
        """One row."""
        condition, metrics = self.condition, {}
        if condition == "canny":
            metrics["canny F1"] = _stacked_f1(rows)
        for key, public in (("SSIM", f"{condition} SSIM"),
                            ("SSIM unwrapped", f"{condition} SSIM unwrapped"),
                            ("RMSE", "depth RMSE"), ("CLIP-S", f"{condition} CLIP-S")):  # fmt: skip
            values = [row[key] for row in rows if key in row]
            if values:
                metrics[public] = float(np.mean(values))
        if self._confusion is not None and self._confusion.counts_CC.any():
            metrics[SETS.get(self.set, f"seg mIoU {self.set}")] = 100 * self._confusion.miou()
        for name in encoders.distances():
            distance = self._distance(name)
            if distance is not None:
                metrics[f"{condition} {name}"] = distance
        protocol = {"bench": self.name, "set": self.set, "items": self.covered(rows),
                    "groups": str(self._groups), **encoders.protocol(),
                    f"{condition} maps": f"{self._maps.kind}:{self._maps.name}"}  # fmt: skip
        return [Line(label=f"{condition}, {self.set}", metrics=metrics, protocol=protocol,
                     n=len(rows))]  # fmt: skip

    def _agreed(self, item: Controlled, picture: Image) -> dict[str, Any]:
        try:
            return self._agreement(item, picture)
        except ValueError as problem:  # maps that cannot be compared
            raise Unscored(f"{item.output}: {problem}") from None

    def _agreement(self, item: Controlled, picture: Image) -> dict[str, Any]:
        found = self._maps(picture)
        if self._confusion is not None:
            assert item.label is not None
            own = Confusion(len(self._confusion.counts_CC), self._confusion.ignore)
            own.add(found, _labels(item.label) - self._first)
            self._confusion.counts_CC += own.counts_CC
            return {"mIoU": 100 * own.miou()} if own.counts_CC.any() else {}
        wanted = self._control(item)
        if self.condition == "depth":
            return {"RMSE": depth_rmse(found, as_grey(wanted))}
        if self.condition == "canny":
            a, b = found > 0, wanted > 0
            both, one = int((a & b).sum()), int((a ^ b).sum())
            return {"both": both, "one": one, "F1": 100 * _f1(both, one)}
        whole = 100 * ms_ssim(found / 255, wanted / 255)
        if self.condition == "lineart":
            scripted = inverted_as_scripted(as_grey(255 - found))
            return {"SSIM": 100 * ms_ssim(scripted / 255, wanted / 255), "SSIM unwrapped": whole}
        return {"SSIM": whole}

    def _control(self, item: Controlled) -> Map:
        """The given map, uint8 512 x 512, grey or (seg) in colours."""
        if item.control is None:
            return np.asarray(self._maps(square(open_image(item.image))), np.uint8)
        control = open_map(item.control)
        colours = self.condition == "seg"
        how = PILImage.Resampling.NEAREST if colours else PILImage.Resampling.BICUBIC
        return np.asarray(square(control if colours else as_grey(control), how))

    def _real(self, encoder: Encoder, item: Controlled) -> Any:
        return encoder.images([square(open_image(item.image))])

    def _distance(self, name: str) -> float | None:
        """Mean over the groups; None where a set has fewer than two pictures."""
        real, values = self._features[name, None], []
        for group in range(self._groups):
            made = self._features[name, group]
            if min(len(made), len(real)) < 2:
                return None
            values.append(frechet_distance(np.concatenate(made), np.concatenate(real)))
        return float(np.mean(values))


def square(picture: Any, how: PILImage.Resampling = PILImage.Resampling.BICUBIC) -> Any:
    """uint8 [H, W] or [H, W, 3], stretched to 512 x 512 pixels."""
    if picture.shape[:2] == (SIDE, SIDE):
        return picture
    return np.array(PILImage.fromarray(picture).resize((SIDE, SIDE), how), np.uint8)


def as_grey(values: Any) -> Any:
    """uint8 [H, W] or [H, W, 3] -> uint8 [H, W], as PIL's "L"."""
    if values.ndim == 2:
        return np.asarray(values, np.uint8)
    return np.asarray(PILImage.fromarray(values).convert("L"), np.uint8)


def inverted_as_scripted(lines: Any) -> Any:
    """Black lines to white ones as ControlNet++'s eval_edge.py does it: 1 - p in 8 bits.

    It wraps: p becomes 257 - p, except that 0 and 1, the blackest lines, become 1 and 0. Published
    numbers that used the script were obtained so; the metric without it is called "unwrapped".
    """
    return np.uint8(1) - np.asarray(lines, np.uint8)


def _f1(both: int, one: int) -> float:
    return 2 * both / (2 * both + one) if both + one else 0.0


def _stacked_f1(rows: Sequence[Mapping[str, Any]]) -> float:
    """Mean over the prompts of F1 over the stack of a prompt's pictures, times 100."""
    stacks: dict[str, list[int]] = {}
    for row in rows:
        stack = stacks.setdefault(row["id"], [0, 0])
        stack[0] += row["both"]
        stack[1] += row["one"]
    return float(np.mean([100 * _f1(both, one) for both, one in stacks.values()]))


def _labels(path: Path) -> Any:
    """int [512, 512]."""
    labels = open_map(path)
    if labels.ndim != 2:
        raise ImageError(path, "not labels", "labels have one channel, these are colours")
    return square(labels, PILImage.Resampling.NEAREST).astype(np.int64)


def _ended(output: str, ending: str) -> str:
    return f"{output.removesuffix('.png')}_{ending}.png"
