"""Sampling with a source: several references, scales, and what is recorded when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from prw_flux import SourceCache
from prw_flux.stored import FLOAT8

EXACT = {"rtol": 0.0, "atol": 0.0}


def count_source_passes(pipe: Any) -> list[int]:
    """Tokens of each source pass from now on."""
    seen: list[int] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        call = (kwargs.get("joint_attention_kwargs") or {}).get("prw")
        if call is not None and call.mode == "source":
            seen.append(kwargs["hidden_states"].shape[1])

    pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    return seen


@pytest.mark.parametrize("mode", ["zero", "current"])
def test_without_the_cache_the_same_bits_cost_a_pass_per_step(
    make_pipe: Any, photo: Any, run: Any, mode: str
) -> None:
    pipe = make_pipe(source_timestep=mode)
    seen = count_source_passes(pipe)
    cached = run(pipe, "a", image=photo(), task="edit")
    assert len(seen) == (1 if mode == "zero" else 3)
    seen.clear()
    again = run(pipe, "a", image=photo(), task="edit", use_kv_cache=False)
    assert len(seen) == 3
    assert_close(again, cached, **EXACT)


@pytest.mark.parametrize("pooled, passes", [("task", 1), ("prompt", 2)])
def test_true_cfg_records_once_per_branch(
    make_pipe: Any, photo: Any, run: Any, pooled: str, passes: int
) -> None:
    """Both branches see the same source unless it sees their prompts."""
    pipe = make_pipe(source_pooled=pooled)
    seen = count_source_passes(pipe)
    run(pipe, "a", image=photo(), task="edit", negative_prompt="blue", true_cfg_scale=2.0)
    assert len(seen) == passes


def test_source_scale_goes_from_the_base_to_the_expert(
    make_pipe: Any, make_adapter: Any, photo: Any, run: Any
) -> None:
    pipe = make_pipe()
    call = {"image": photo(), "task": "edit"}
    full, half, none = (run(pipe, "a", source_scale=s, **call) for s in (1.0, 0.5, 0.0))
    assert_close(run(pipe, "a", **call), full, **EXACT)
    assert not torch.equal(half, full) and not torch.equal(half, none)
    cache = pipe.encode_source(photo(), task="edit", source_scale=0.5)
    assert_close(run(pipe, "a", source_cache=cache), half, **EXACT)
    pipe.register_modules(prw=make_adapter(pipe.transformer, stages=0))
    assert_close(run(pipe, "a", **call), none, **EXACT)


@pytest.mark.parametrize("true_cfg", [1.0, 3.0])
def test_image_guidance_extrapolates_from_text_to_image(
    make_pipe: Any, photo: Any, run: Any, true_cfg: float
) -> None:
    """w = 0 is text to image, and the first step is linear in w."""
    pipe = make_pipe()
    text = {"negative_prompt": "blue", "true_cfg_scale": true_cfg}
    call = {"image": photo(), "task": "edit", **text}
    nothing = run(pipe, "a", image_guidance_scale=0.0, **call)
    assert_close(nothing, run(pipe, "a", height=32, width=32, **text), **EXACT)
    one = {"num_inference_steps": 1}
    first, second, third = (
        run(pipe, "a", image_guidance_scale=w, **call, **one) for w in (0.0, 1.0, 2.0)
    )
    assert not torch.equal(first, second)
    # two roundings of values near 10
    assert_close(third - second, second - first, rtol=0.0, atol=1e-4)


def test_several_references_are_recorded_alone(make_pipe: Any, photo: Any, run: Any) -> None:
    pipe = make_pipe()
    pair = [photo(), photo(48, 16, seed=1)]
    call = {"images": pair, "task": "customise", "height": 32, "width": 32}
    both = run(pipe, "a", **call)
    caches = pipe.encode_source(**call)
    assert [type(c) for c in caches] == [SourceCache, SourceCache]
    assert [c.meta.place for c in caches] == [2, 3]
    assert_close(run(pipe, "a", source_cache=caches, height=32, width=32), both, **EXACT)
    alone = pipe.encode_source(pair[0], task="customise", height=32, width=32)
    for one, other in zip(alone, caches[0], strict=True):
        assert_close(one.key_BSHD, other.key_BSHD, **EXACT)
    # softmax over the same keys in another order: rounding of values near 1
    swapped = run(pipe, "a", source_cache=caches[::-1], height=32, width=32)
    assert_close(swapped, both, rtol=0.0, atol=1e-4)
    apart = [pipe.encode_source(one, task="customise", height=32, width=32) for one in pair]
    for pair_ in ([caches[1], caches[1]], apart):
        with pytest.raises(ValueError, match=r"at the same place .* encode_source\(images="):
            run(pipe, "a", source_cache=pair_, height=32, width=32)
    assert (both - run(pipe, "a", source_cache=caches[:1], height=32, width=32)).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["zero", "current"])
@pytest.mark.parametrize("pooled", ["task", "prompt"])
def test_references_and_batches_in_every_mode(
    make_pipe: Any, photo: Any, run: Any, mode: str, pooled: str
) -> None:
    """A batch of two prompts with two references each is two calls."""
    pipe = make_pipe(source_timestep=mode, source_pooled=pooled)
    noise = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(1))
    first, second = [photo(seed=1), photo(seed=2)], [photo(seed=3), photo(seed=4)]
    call = {"task": "edit", "height": 32, "width": 32}
    out = run(pipe, ["a red square", "blue"], images=[first, second], latents=noise, **call)
    for i, prompt in enumerate(["a red square", "blue"]):
        images = [first[i], second[i]]
        alone = run(pipe, prompt, images=images, latents=noise[i : i + 1], **call)
        # a matrix product over another number of rows
        assert_close(out[i : i + 1], alone, rtol=0.0, atol=1e-4)


def test_small_storage_changes_little(make_pipe: Any, photo: Any, run: Any) -> None:
    pipe = make_pipe()
    cache = pipe.encode_source(photo(), task="edit")
    full = run(pipe, "a", source_cache=cache)
    small = run(pipe, "a", source_cache=cache.to("cpu", FLOAT8))
    without = run(pipe, "a", height=32, width=32)
    error = (small - full).norm() / (full - without).norm()
    assert 0 < error < 0.05, error  # a sixteenth per value at most, averaged over keys


def test_references_are_stored_as_they_are_recorded(make_pipe: Any, photo: Any, run: Any) -> None:
    pipe = make_pipe()
    call = {"images": [photo(), photo(seed=1)], "task": "edit"}
    stored = pipe.encode_source(device="cpu", dtype=FLOAT8, **call)
    later = [cache.to("cpu", FLOAT8) for cache in pipe.encode_source(**call)]
    assert stored[0].slots[0].key_BSHD.dtype == FLOAT8
    found, wanted = (run(pipe, "a", source_cache=caches) for caches in (stored, later))
    assert_close(found, wanted, **EXACT)
    with pytest.raises(ValueError, match="stored as one of"):
        pipe.encode_source(photo(), task="edit", dtype=torch.int8)


def test_a_small_source_serves_a_large_result(make_pipe: Any, photo: Any, run: Any) -> None:
    pipe = make_pipe()
    seen = count_source_passes(pipe)
    call = {"image": photo(64, 64), "task": "edit", "height": 64, "width": 64}
    large, small = run(pipe, "a", **call), run(pipe, "a", source_size=32, **call)
    assert seen == [16, 4] and large.shape == small.shape and not torch.equal(large, small)


def test_the_users_kwargs_stay_as_they_are(make_pipe: Any, photo: Any, run: Any) -> None:
    pipe = make_pipe()
    mine = {"scale": 1.0}
    run(pipe, "a", image=photo(), task="edit", joint_attention_kwargs=mine)
    assert mine == {"scale": 1.0}
