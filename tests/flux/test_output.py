"""Grounding: the marked picture comes back with its box, mask and confidence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from prw_flux.output import CoLoGenPipelineOutput, named_colour, read_grounding
from prw_flux.tasks.base import fill_box
from prw_flux.tasks.grounding import paint_overlay

BOX = (8.0, 4.0, 28.0, 20.0)


def pictures() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    source = np.full((32, 48, 3), 200, np.uint8)
    return source, paint_overlay(source, fill_box(BOX, 32, 48), "cyan")


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_marks_are_read_from_every_output_type(kind: str) -> None:
    source, marked = pictures()
    results: Any = [Image.fromarray(source), Image.fromarray(marked)]
    if kind != "pil":
        results = np.stack([source, marked]) / 255.0
    if kind == "pt":
        results = torch.from_numpy(results).permute(0, 3, 1, 2)
    picture = torch.from_numpy(source).permute(2, 0, 1)[None]
    nothing, found = read_grounding(results, picture, ["mark the square in cyan"])
    assert nothing.box is None and nothing.confidence == 0.0
    assert found.box == BOX and found.mask.sum() == 20 * 16 and found.confidence > 0.98


def test_each_result_is_compared_with_its_own_source() -> None:
    source, marked = pictures()
    both = torch.from_numpy(np.stack([source, marked])).permute(0, 3, 1, 2)
    results = [Image.fromarray(marked)] * 4
    found = read_grounding(results, both, ["mark it in cyan", "mark it in cyan"])
    assert [one.box for one in found] == [BOX, BOX, None, None]


def test_the_colour_is_the_one_that_is_asked_for() -> None:
    assert named_colour("Mark the red circle in Cyan") == "cyan"
    assert named_colour("mark the red circle") == "magenta"
    assert named_colour("mark the dog in redwood in orange") == "orange"


def test_a_grounding_call_returns_marks(make_pipe: Any, photo: Any) -> None:
    pipe = make_pipe(tasks=None)
    call = {"image": photo(), "task": "ground", "num_inference_steps": 1}
    out = pipe(prompt="mark the square in magenta", **call, num_images_per_prompt=2)
    assert isinstance(out, CoLoGenPipelineOutput) and len(out.grounding) == len(out.images) == 2
    assert out.grounding[0].mask.shape == (32, 32) and 0 <= out.grounding[0].confidence <= 1
    assert (out.grounding[0].box is None) == (out.grounding[0].confidence == 0)
    images, marks = pipe(prompt="a", return_dict=False, **call)
    assert len(images) == len(marks) == 1
    cache = pipe.encode_source(photo(), task="ground")
    cached = pipe(prompt="a", source_cache=cache, num_inference_steps=1, output_type="pt")
    assert cached.images.shape == (1, 3, 32, 32) and cached.grounding is not None
    assert pipe(prompt="a", output_type="latent", **call).grounding is None
    plain = pipe(prompt="a", **(call | {"task": "edit"}))
    assert plain.grounding is None and plain.to_tuple() == (plain.images,)
