"""Blocks of diffusers' modular pipelines: the bits of the pipeline."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from prw_flux.modular import CoLoGenBlocks

STEPS = {"num_inference_steps": 3, "output_type": "np", "max_sequence_length": 10}


@pytest.fixture
def both(make_pipe: Any) -> Any:
    """A CoLoGenPipeline, and the blocks on its components."""

    def make(**settings: Any) -> tuple[Any, Any]:
        pipe = make_pipe(**settings)
        blocks = CoLoGenBlocks().init_pipeline()
        blocks.update_components(**{k: v for k, v in pipe.components.items() if v is not None})
        blocks.set_progress_bar_config(disable=True)
        return pipe, blocks

    return make


def seeded() -> Any:
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("source", [True, False])
def test_blocks_are_the_pipeline(both: Any, photo: Any, source: bool) -> None:
    pipe, blocks = both()
    call = {"prompt": "a red square", **STEPS}
    call |= {"image": photo(), "task": "edit"} if source else {"height": 32, "width": 48}
    wanted = pipe(generator=seeded(), **call).images
    found = blocks(generator=seeded(), output="images", **call)
    np.testing.assert_array_equal(np.asarray(found), wanted)
    other = pipe(generator=seeded(), **STEPS, prompt="a red square", height=32, width=32).images
    assert not np.array_equal(found, other)


def test_a_source_that_follows_the_time_is_refused(both: Any, photo: Any) -> None:
    """Its blocks would have to run in every step."""
    _, blocks = both(source_timestep="current")
    with pytest.raises(ValueError, match='source_timestep="current"'):
        blocks(prompt="a", image=photo(), task="edit", **STEPS)
