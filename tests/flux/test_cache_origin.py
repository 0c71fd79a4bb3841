"""A cache serves the call that would have recorded it, and no other."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from prw_flux import CoLoGenPipeline, SourceCache

EXACT = {"rtol": 0.0, "atol": 0.0}


def test_a_cache_survives_its_process(make_pipe: Any, photo: Any, run: Any, tmp_path: Path) -> None:
    """Another pipeline, built from the same files, uses a saved cache, bit for bit."""
    pipe = make_pipe()
    pipe.save_pretrained(tmp_path / "pipe")
    wanted = run(pipe, "a", image=photo(), task="edit")
    pipe.encode_source(photo(), task="edit").save(tmp_path / "photo.safetensors")
    again = CoLoGenPipeline.from_pretrained(tmp_path / "pipe")
    cache = SourceCache.load(tmp_path / "photo.safetensors")
    assert_close(run(again, "a", source_cache=cache), wanted, **EXACT)


def change_adapter(pipe: Any) -> None:
    with torch.no_grad():
        pipe.prw.pools[0].expert(1).pair("to_v")[1].mul_(2.0)


def change_stages(pipe: Any) -> None:
    pipe.prw.weave.unlock("later")


def change_base(pipe: Any) -> None:
    with torch.no_grad():
        pipe.transformer.transformer_blocks[0].norm1.linear.weight.mul_(1.1)


def add_lora(pipe: Any) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(lora, "style")


def change_timestep(pipe: Any) -> None:
    pipe.prw.register_to_config(source_timestep="current")


def change_pooling(pipe: Any) -> None:
    pipe.prw.register_to_config(source_pooled="empty")


CHANGES = {
    "adapter": change_adapter,
    "adapter ": change_stages,
    "base .or base LoRA.": change_base,
    "base .or base LoRA. ": add_lora,
    "source_timestep .'zero', not 'current'.": change_timestep,
    "source_pooled .'task', not 'empty'.": change_pooling,
}
CALLS: dict[str, dict[str, Any]] = {
    "task .'edit', not 'customise'.": {"task": "customise"},
    "route .'free', not 'expert:stage0'.": {"route": "expert:stage0"},
    "scale .1.0, not 0.5.": {"source_scale": 0.5},
    "height .32, not 48.": {"height": 48},
}


@pytest.mark.parametrize("what", [*CHANGES, *CALLS])
def test_another_one_is_refused_or_recorded_again(
    make_pipe: Any, photo: Any, run: Any, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    pipe = make_pipe()
    cache = pipe.encode_source(photo(), task="edit")
    CHANGES.get(what, lambda _: None)(pipe)
    call = CALLS.get(what, {})
    match = f"made with another {what.strip()}: call encode_source again"
    with pytest.raises(ValueError, match=match):
        run(pipe, "a", source_cache=cache, **call)
    wanted = run(pipe, "a", image=photo(), **{"task": "edit", **call})
    with caplog.at_level(logging.WARNING):
        found = run(pipe, "a", image=photo(), source_cache=cache, **{"task": "edit", **call})
    assert len(caplog.messages) == 1 and "the source is encoded again" in caplog.text
    assert_close(found, wanted, **EXACT)


def test_beside_an_image_it_is_used_where_it_fits(
    make_pipe: Any, photo: Any, run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = make_pipe()
    cache = pipe.encode_source(photo(), task="edit")
    wanted = run(pipe, "a", source_cache=cache)
    vae, pipe.vae.encode = pipe.vae.encode, None  # an encoder that is asked would raise
    assert_close(run(pipe, "a", image=photo(), source_cache=cache), wanted, **EXACT)
    assert not caplog.messages
    pipe.vae.encode = vae
    with caplog.at_level(logging.WARNING):
        other = run(pipe, "a", image=photo(seed=9), source_cache=cache)
        two = run(pipe, "a", images=[photo()] * 2, source_cache=cache)
    assert "another image" in caplog.messages[0]
    assert "number of references (1, not 2)" in caplog.messages[1]
    assert not torch.equal(other, wanted) and not torch.equal(two, wanted)


def test_a_cache_of_another_depth(make_pipe: Any, run: Any) -> None:
    cache = SourceCache(2)
    for slot in cache:
        slot.write(torch.zeros(1, 4, 2, 16), torch.zeros(1, 4, 2, 16))
    with pytest.raises(ValueError, match=r"another number of blocks \(2, not 3\)"):
        run(make_pipe(), "a", source_cache=cache, task="edit")


def test_what_comes_too_late_for_a_cache(make_pipe: Any, photo: Any, run: Any) -> None:
    pipe = make_pipe()
    cache = pipe.encode_source(photo(), task="edit")
    with pytest.raises(ValueError, match="source_size= would come too late .*encode_source"):
        run(pipe, "a", source_cache=cache, source_size=16)
    with pytest.raises(ValueError, match="use_kv_cache=False would not use the source_cache"):
        run(pipe, "a", source_cache=cache, use_kv_cache=False)


def test_pooled_embeddings_are_part_of_a_cache(make_pipe: Any, photo: Any, run: Any) -> None:
    pipe = make_pipe()
    pooled = torch.randn(1, 16)
    cache = pipe.encode_source(photo(), task="edit", source_pooled_embeds=pooled)
    run(pipe, "a", source_cache=cache, source_pooled_embeds=pooled)
    with pytest.raises(ValueError, match="another prompt"):
        run(pipe, "a", source_cache=cache, source_pooled_embeds=2 * pooled)


def test_a_cache_that_saw_a_prompt_serves_one_branch(
    make_pipe: Any, photo: Any, run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = make_pipe(source_pooled="prompt")
    cache = pipe.encode_source(photo(), task="edit", prompt="a")
    call = {"negative_prompt": "blue", "true_cfg_scale": 2.0, "source_cache": cache}
    with pytest.raises(ValueError, match="another prompt than the negative one"):
        run(pipe, "a", **call)
    wanted = run(pipe, "a", image=photo(), task="edit", **(call | {"source_cache": None}))
    assert_close(run(pipe, "a", image=photo(), **call), wanted, **EXACT)
    run(pipe, "a", **(call | {"true_cfg_scale": 1.0}))


def test_rounded_sizes_are_told(
    make_pipe: Any, photo: Any, run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = make_pipe()
    with caplog.at_level(logging.WARNING):
        assert run(pipe, "a", image=photo(), task="edit", height=50, width=32).shape == (1, 6, 64)
    assert caplog.messages == ["height=50 is no multiple of 16: the result has 48."]
