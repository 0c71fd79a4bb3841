"""Arguments that cannot work: one sentence each, before anything is computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

from prw_flux import PRWAdapter


class Called(BaseException):
    """Something was computed."""


@pytest.fixture
def idle(make_pipe: Any, make_transformer: Any) -> Any:
    """A pipeline with every task, none of whose models may run."""
    pipe = make_pipe(tasks=None)

    def called(*_: Any, **__: Any) -> None:
        raise Called

    for model in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2):
        model.forward = called
    pipe.vae.encode = pipe.vae.decode = called
    return pipe


def refused(pipe: Any, match: str, *args: Any, **call: Any) -> None:
    call = {"prompt": "a", **call} if not args else call
    with pytest.raises((ValueError, TypeError), match=match) as caught:
        pipe(*args, **call)
    message = str(caught.value)
    assert "\n" not in message and message.endswith("."), message


def test_the_fixture_notices(idle: Any, photo: Any) -> None:
    with pytest.raises(Called):
        idle(photo(), "a", task="edit")


def test_images(idle: Any, photo: Any) -> None:
    edit = {"task": "edit"}
    refused(idle, "got the text 'photo.png': open a file first", image="photo.png", **edit)
    refused(idle, "pass image= and prompt= by name", "a red square", photo(), task="edit")
    refused(idle, "image= .* or images= .*not both", image=photo(), images=[photo()], **edit)
    refused(idle, "images= is a list with one entry per reference", images=photo(), **edit)
    refused(idle, "images= is a list", images=[], **edit)
    refused(idle, "2 source images do not pair with 1 prompt:", image=[photo()] * 2, **edit)
    refused(idle, "3 source images .* 2 prompts", prompt=["a", "b"], image=[photo()] * 3, **edit)
    refused(idle, "differ in size", prompt=["a", "b"], image=[photo(), photo(16)], **edit)
    refused(idle, "mode 'I;16'", image=photo().convert("I;16"), **edit)
    refused(idle, "got set", image={1}, **edit)


def test_sizes_and_numbers(idle: Any, photo: Any) -> None:
    edit = {"image": photo(), "task": "edit"}
    refused(
        idle,
        "height must be a positive number of pixels, a multiple of 16, got 0",
        height=0,
        **edit,
    )
    refused(idle, "width must be .* got 32.5", width=32.5, **edit)
    refused(idle, "width must be .* got -16", width=-16)
    refused(idle, "max_area= and use_kv_cache= and image_guidance_scale= act on a source",
            max_area=256, use_kv_cache=False, image_guidance_scale=2.0)  # fmt: skip
    refused(idle, r"source_size must be .*, or \(height, width\)", source_size=(1, 2, 3), **edit)
    refused(idle, "max_area must be", max_area=True, **edit)
    refused(idle, "source_scale must be finite and at least 0, got -1", source_scale=-1, **edit)
    refused(idle, "source_scale must be a number, got '1'", source_scale="1", **edit)
    refused(
        idle,
        "representation_scale must be finite and at least 0, got -1",
        representation_scale=-1,
        **edit,
    )
    refused(
        idle, "representation_scale=0.5 acts on a feature stream", representation_scale=0.5, **edit
    )
    refused(idle, "image_guidance_scale must be finite", image_guidance_scale=float("nan"), **edit)
    latents = torch.zeros(1, 16, 64)
    refused(idle, r"packed noise \[1, 4, 64\].*got \[1, 16, 64\].*height=", latents=latents, **edit)
    refused(idle, "packed noise .* got list", latents=[1], **edit)
    for given in (torch.zeros(1, 5), torch.zeros(3, 16), torch.zeros(16), [0.0]):
        refused(idle, r"source_pooled_embeds must be \[1, 16\]", source_pooled_embeds=given, **edit)


def test_numbers_of_things(idle: Any, photo: Any) -> None:
    edit = {"image": photo(), "task": "edit"}
    two = {"prompt": ["a", "blue"], "true_cfg_scale": 2.0}
    refused(idle, "negative_prompt has 3 entries for 2 prompts", negative_prompt=["a"] * 3, **two,
            **edit)  # fmt: skip
    refused(idle, "prompt_2 has 2 entries for 1 prompt:", prompt_2=["a", "b"], **edit)
    refused(idle, "list of prompts is empty", prompt=[], **edit)
    refused(idle, "num_images_per_prompt must be .* at least 1, got 0", num_images_per_prompt=0,
            **edit)  # fmt: skip
    refused(idle, "num_inference_steps must be .* got 2.5", num_inference_steps=2.5, **edit)
    several = [torch.Generator()] * 3
    refused(idle, "3 generators .* noise of 4 results", generator=several, num_images_per_prompt=2,
            prompt=["a", "b"], **edit)  # fmt: skip


def test_numbers_of_other_libraries(make_pipe: Any, photo: Any, run: Any) -> None:
    """What numpy measured is a number, too."""
    pipe = make_pipe()
    side = np.int64(48)
    call = {"height": side, "width": side, "source_size": (np.int32(32), side), "max_area": side}
    out = run(pipe, "a", image=photo(), task="edit", source_scale=np.float32(0.5),
              image_guidance_scale=np.float64(2.0), **call)  # fmt: skip
    call = {"height": 48, "width": 48, "source_size": (32, 48)}
    wanted = run(pipe, "a", image=photo(), task="edit", source_scale=0.5, image_guidance_scale=2.0,
                 **call)  # fmt: skip
    assert torch.equal(out, wanted)
    cache = pipe.encode_source(photo(), task="edit", source_scale=np.float32(0.5), height=side)
    assert type(cache.meta.scale) is float and type(cache.meta.height) is int


def test_tasks_routes_and_masks(idle: Any, photo: Any) -> None:
    five = "inpaint, ground, control, customise, edit"
    refused(idle, f"no task 'paint': this adapter knows {five}", image=photo(), task="paint")
    refused(idle, "Choose a task", image=photo())
    refused(idle, "names no stage of this adapter; known: stage0, stage1", image=photo(),
            task="edit", route="stage:x")  # fmt: skip
    mask = np.ones((32, 32), bool)
    refused(idle, "mask_image= belongs to task='inpaint', not 'edit'", image=photo(), task="edit",
            mask_image=mask)  # fmt: skip
    refused(idle, "give one mask of that size", image=photo(16), task="inpaint", mask_image=mask)
    refused(idle, "mask_image= and source_size= act on a source", mask_image=mask, source_size=16)
    refused(idle, "task= acts on a source", task="edit")
    idle.prw.register_to_config(trained=[])
    refused(idle, "Choose a task: this adapter knows inpaint, ground", image=photo())
    idle.prw.note_trained("ground")
    refused(idle, "not trained for 'edit', only for ground: choose one", image=photo(), task="edit")


def test_other_arguments(idle: Any, photo: Any) -> None:
    edit = {"image": photo(), "task": "edit"}
    refused(idle, "source_cache must be what encode_source returned, got str: .*SourceCache.load",
            source_cache=["photo.safetensors"])  # fmt: skip
    refused(idle, "got str", source_cache="photo.safetensors")
    refused(idle, "got an empty list", source_cache=[])
    kwargs = {"prw": 1}
    refused(idle, "is set by the pipeline: leave it out", joint_attention_kwargs=kwargs, **edit)
    refused(idle, "must be a dict, got list", joint_attention_kwargs=[1], **edit)
    refused(idle, "got int: a file is read", source_cache=3)
    for name in ("ip_adapter_image", "negative_ip_adapter_image_embeds"):
        refused(idle, f"{name}= belongs to an IP-Adapter, which cannot", **{name: [1]}, **edit)
    with pytest.raises(ValueError, match="Provide either `prompt` or `prompt_embeds`"):
        idle(**edit)
    with pytest.raises(ValueError, match="needs a source: pass image= or images="):
        idle.encode_source(task="edit")


def test_replaced_processors(idle: Any, photo: Any) -> None:
    class Foreign(FluxAttnProcessor):
        pass

    call = {"image": photo(), "task": "edit"}
    block = idle.transformer.transformer_blocks[0]
    block.attn.set_processor(FluxAttnProcessor())
    refused(idle, r"Only 2 of 3 attention processors .*call attach\(\) again", **call)
    for block in (
        *idle.transformer.transformer_blocks,
        *idle.transformer.single_transformer_blocks,
    ):
        block.attn.set_processor(Foreign())
    refused(idle, "attention processors of Foreign, .*unload them", **call)


def test_adapters_of_other_bases(make_base: Any, make_adapter: Any) -> None:
    from prw_flux import CoLoGenPipeline

    base = make_base()
    for shape, match in (((1, 2, 64), "of width 64, the transformer has 1 . 2 of width 32"),
                         ((2, 2, 32), "made for 2 . 2 blocks")):  # fmt: skip
        with pytest.raises(ValueError, match=f"{match}.*load"):
            CoLoGenPipeline.from_pipe(base, prw=PRWAdapter(*shape, rank=4))
    adapter = make_adapter(base.transformer)
    adapter.weave.fingerprint["class"] = "FluxOther"
    with pytest.raises(ValueError, match=r'another base: its class is "FluxOther".*load'):
        CoLoGenPipeline.from_pipe(base, prw=adapter)
