"""What two gloo ranks check of the samples that they encode together; `test_together` starts them.

The folder holds ``base.txt``, the place of a base. What one process makes is made by each rank for
itself, and compared.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from two_processes import report

from prw_flux import CoLoGenPipeline, encode, sample_encoder, together
from prw_flux import encoded as encoded_module
from prw_flux.coredi import FunctionEncoder
from prw_flux.data.images import ImageError
from prw_flux.draws import SampleError
from prw_flux.interrupt import Interrupted
from prw_flux.ranks import RankLost, Ranks
from prw_flux.samples import Samples
from prw_flux.shapeweave.source import ShapeWeave
from prw_flux.tasks import Example, Task, TaskReject, Triple

COUNT, CHUNK = 23, 4
WORDS = ("a red", "a blue square", "make the circle blue", "")


class Mixed(Task):
    """Two sizes, draws that are refused, and captions that come again."""

    name, sentence = "mixed", "Be mixed."

    def missing(self, example: Example) -> str | None:
        return None

    def make(self, example: Example, rng: np.random.Generator) -> Triple:
        if rng.random() < 0.3:
            raise TaskReject("not today")
        side = 64 if rng.random() < 0.5 else 32
        text = WORDS[int(rng.integers(4))] + " circle" * int(rng.integers(3))
        return self.triple(example, f"of {side}", example.image, text, example.image[:side, :side])


class Faulty(ShapeWeave):
    """Some pictures are damaged; others raise what they are told to."""

    def __init__(self, damaged: Callable[[int], bool], raised: dict[int, Exception]) -> None:
        super().__init__(size=64)
        self.damaged, self.raised, self.read = damaged, raised, Counter[int]()

    def example(self, task: str, index: int) -> Example:
        self.read[index] += 1
        if index in self.raised:
            raise self.raised[index]
        if self.damaged(index):
            raise ImageError(f"picture {index}", "damaged", "truncated or damaged (cut)")
        return super().example(task, index)


def colours(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Three channels, as a convolution leaves them."""
    return torch.nn.functional.adaptive_avg_pool2d(pixels, grid)


def samples_of(pipe: Any, ranks: Ranks, data: Faulty | None = None, **settings: Any) -> Samples:
    given = {"stage": "mixed", "seed": 0, "batch_size": 3, "count": COUNT, **settings}
    features = given.pop("features", FunctionEncoder(colours, 3))
    return Samples(data or Faulty(lambda i: i % 7 == 3, {}), Mixed(), pipe, encoder=features,
                   ranks=ranks, **given)  # fmt: skip


@contextmanager
def counting() -> Iterator[Counter[Any]]:
    """Inside, pictures and texts are counted as they go through the encoders."""
    seen: Counter[Any] = Counter()

    def pictures(vae: Any, pixels: Tensor, **more: Any) -> Tensor:
        seen.update(hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest() for x in pixels)
        return encode.encode_image(vae, pixels, **more)

    def prompts(texts: list[str], **more: Any) -> tuple[Tensor, Tensor]:
        seen.update(("text", text) for text in texts)
        return encode.encode_prompts(texts, **more)

    with (
        patch.object(sample_encoder, "encode_image", pictures),
        patch.object(encoded_module, "encode_prompts", prompts),
    ):
        yield seen


def prepared(samples: Samples) -> tuple[list[int], Counter[Any]]:
    """What `tick` was told, and what went through the encoders."""
    ticks: list[int] = []
    with counting() as seen:
        samples.prepare(ticks.append)
    return ticks, seen


def contents(samples: Samples) -> Iterator[Any]:
    """Everything that a run sees of prepared samples, in its order."""
    assert isinstance(samples.texts, encoded_module.Texts)
    yield [(bucket.grids, len(bucket)) for bucket in samples._buckets]
    for bucket in samples._buckets:
        assert isinstance(bucket, encoded_module.Encoded) and bucket.features_NRCD is not None
        yield bucket.rows
        for tensor in (bucket.source_NSC, bucket.target_NTC, bucket.features_NRCD):
            yield (tensor.dtype, tensor.shape, tensor.stride())
            yield tensor
    yield samples.texts._rows
    yield from samples.texts._text_LE
    yield from samples.texts._pooled_P
    yield from (samples.features(4), samples.tally, samples.draws.pictures)
    for step in range(4):
        yield from vars(samples.batch(step, [True, False, False])).values()


def require_same(one: Samples, other: Samples) -> None:
    for mine, theirs in itertools.zip_longest(contents(one), contents(other)):
        if isinstance(mine, Tensor):
            assert torch.equal(mine, theirs)
        else:
            assert mine == theirs, (mine, theirs)


def shared(pipe: Any, ranks: Ranks) -> None:
    """Each rank ends with what one process has; each picture and text was encoded by one."""
    alone = samples_of(pipe, Ranks())
    ticks, all_of_them = prepared(alone)
    assert ticks == [0, 4, 8, 12, 16, 20, 23]
    assert alone.tally.rejected["not today"] and alone.tally.rejected["picture damaged"]
    assert {bucket.grids for bucket in alone._buckets} == {((4, 4), (4, 4)), ((4, 4), (2, 2))}
    ours = samples_of(pipe, ranks)
    ticks, mine = prepared(ours)
    assert ticks == [0, 8, 16, 23]
    require_same(alone, ours)
    both = ranks.gathered((mine, ours.data.read))
    assert sum((seen for seen, _ in both), Counter()) == all_of_them
    assert all(seen.total() > 0.3 * all_of_them.total() for seen, _ in both), "not a fair share"
    read = [frozenset(data) for _, data in both]
    assert not read[0] & read[1] and sum((data for _, data in both), Counter()) == alone.data.read
    without = [samples_of(pipe, r, features=None, count=3) for r in (Ranks(), ranks)]
    for samples in without:
        samples.prepare()
    assert without[0].batch(0).features_BRCD is None  # and the second rank has no chunk
    assert torch.equal(without[0].batch(0).source_BSC, without[1].batch(0).source_BSC)


def raised(call: Callable[[], None]) -> Exception:
    try:
        call()
    except Exception as problem:
        return problem
    raise AssertionError("nothing was raised")


def judged(pipe: Any, ranks: Ranks) -> None:
    """The share of unusable pictures is that of all, though only one rank has met any."""

    def of(who: Ranks, limit: float) -> Samples:
        return samples_of(pipe, who, Faulty(lambda i: 4 <= i < 8, {}), max_rejected=limit)

    of(ranks, 0.2).prepare()  # of what the second rank has drawn, it is more
    told = [str(raised(of(who, 0.05).prepare)) for who in (Ranks(), ranks)]
    assert told[0] == told[1] and told[0].startswith("4 of "), told


def errors(pipe: Any, ranks: Ranks) -> None:
    """What one rank raises, where it draws or encodes, is what both raise; then they go on."""
    for problem in (OSError(5, "the disk is gone", "/data/x.png"), SampleError("no such sample")):
        wrong = raised(samples_of(pipe, ranks, Faulty(bool(0).__and__, {6: problem})).prepare)
        assert type(wrong) is type(problem) and str(wrong) == str(problem)

    def narrow(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        return colours(pixels, grid)[:, : 3 - ranks.index]

    wrong = raised(samples_of(pipe, ranks, features=FunctionEncoder(narrow, 3)).prepare)
    assert "gives features of shape (" in str(wrong), wrong
    assert len(set(ranks.gathered(str(wrong)))) == 1


def stopped(pipe: Any, ranks: Ranks) -> None:
    """A signal that one rank has got ends the preparation of both at the same round."""
    ticks: list[int] = []

    def tick(done: int) -> None:
        ticks.append(done)
        if number := ranks.largest(15 if ranks.index and done == 8 else 0):
            raise Interrupted(number, "stopped")

    assert isinstance(raised(lambda: samples_of(pipe, ranks).prepare(tick)), Interrupted)
    assert ranks.gathered(ticks) == [[0, 8], [0, 8]]


def lost(pipe: Any, ranks: Ranks) -> None:
    """A rank that fails in its own way ends; the other says so at once."""
    data = Faulty(bool(0).__and__, {6: RuntimeError("a bug")})
    wrong = raised(samples_of(pipe, ranks, data).prepare)
    if ranks.index:
        assert str(wrong) == "a bug"
        dist.destroy_process_group()
        os._exit(0)
    assert isinstance(wrong, RankLost)


CHECKS = {f.__name__: f for f in (shared, judged, errors, stopped, lost)}


def main() -> None:
    """Both ranks check everything with one base."""
    together.CHUNK = CHUNK
    control: list[Any] = []

    def check(what: Callable[[Any, Ranks], None]) -> Callable[[int, Path], None]:
        def run(rank: int, folder: Path) -> None:
            if not control:
                place = (folder / "base.txt").read_text()
                group = dist.new_group(backend="gloo")
                control.extend([CoLoGenPipeline.from_pretrained(place), group])
            if what is lost and rank:  # it will write nothing any more
                (folder / f"lost-{rank}.txt").write_text("", encoding="utf-8")
            what(control[0], Ranks(rank, 2, control[1]))

        return run

    report({name: check(what) for name, what in CHECKS.items()})


if __name__ == "__main__":
    main()
