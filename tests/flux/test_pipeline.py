"""CoLoGenPipeline on tiny random components, with real tokenizers and text encoders."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
)
from PIL import Image
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from prw_flux import CoLoGenPipeline, PRWAdapter, attached, detach
from prw_flux.encode import encode_image, to_pixels

EXACT = {"rtol": 0.0, "atol": 0.0}
STEPS = {"num_inference_steps": 3, "output_type": "latent"}


def photo(height: int = 32, width: int = 32, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(pipe: Any, prompt: Any = None, **kwargs: Any) -> Any:
    return pipe(prompt=prompt, **{**STEPS, "generator": seeded(), **kwargs}).images


@pytest.mark.parametrize("true_cfg", [1.0, 2.0])
def test_without_an_image_it_is_flux_pipeline(
    make_base: Any, make_adapter: Any, true_cfg: float
) -> None:
    base = make_base()
    call = {
        "height": 32,
        "width": 48,
        "negative_prompt": "blue",
        "true_cfg_scale": true_cfg,
        "output_type": "np",
    }
    wanted = run(base, "a red square", max_sequence_length=10, **call)
    pipe = CoLoGenPipeline.from_pipe(base, prw=make_adapter(base.transformer))
    np.testing.assert_array_equal(run(pipe, "a red square", **call), wanted)
    bare = CoLoGenPipeline.from_pipe(base)
    np.testing.assert_array_equal(run(bare, "a red square", **call), wanted)


class Operations(TorchDispatchMode):
    """How often each torch operation is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("true_cfg", [1.0, 2.0])
def test_text_to_image_dispatches_the_operations_of_stock(
    make_base: Any, make_adapter: Any, true_cfg: float
) -> None:
    base = make_base()
    call = {
        "height": 32,
        "width": 48,
        "negative_prompt": "blue",
        "true_cfg_scale": true_cfg,
        "max_sequence_length": 10,
        "output_type": "pt",
    }
    with Operations() as stock:
        wanted = run(base, "a red square", **call)
    pipe = CoLoGenPipeline.from_pipe(base, prw=make_adapter(base.transformer))
    with Operations() as ours:
        found = run(pipe, "a red square", **call)
    assert_close(found, wanted, **EXACT)
    assert ours.counts == stock.counts and sum(ours.counts.values()) > 1000
    with Operations() as edited:
        run(pipe, "a red square", image=photo(32, 48), task="edit", **call)
    assert edited.counts != stock.counts  # the count can tell


def test_arguments_come_in_kontexts_order() -> None:
    def parameters(pipeline: Any) -> list[inspect.Parameter]:
        return list(inspect.signature(inspect.unwrap(pipeline.__call__)).parameters.values())

    kontext, ours = parameters(FluxKontextPipeline), parameters(CoLoGenPipeline)
    assert [p.name for p in ours[: len(kontext)]] == [p.name for p in kontext]
    assert {p.kind for p in ours[: len(kontext)]} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    own = ours[len(kontext) :]
    assert {p.kind for p in own} == {inspect.Parameter.KEYWORD_ONLY}
    wanted = """task route images mask_image source_cache source_size source_scale
    source_pooled_embeds use_kv_cache image_guidance_scale representation_scale"""
    assert [p.name for p in own] == wanted.split()
    # where another default stands, it is worked out from the source or the tokenizer
    differing = {p.name for p, q in zip(ours, kontext, strict=False) if p.default != q.default}
    assert differing == {"callback_on_step_end_tensor_inputs", "max_sequence_length", "max_area"}


def test_a_text_may_stand_first(make_pipe: Any) -> None:
    pipe = make_pipe()
    call = {**STEPS, "height": 32, "width": 32}
    first = pipe("a red square", generator=seeded(), **call).images
    assert_close(run(pipe, "a red square", **call), first, **EXACT)
    both = pipe(["a red square", "blue"], generator=[seeded(), seeded(6)], **call).images
    assert_close(both[:1], first, rtol=0.0, atol=1e-5)  # a product over another number of rows


@pytest.mark.parametrize("kind", [FluxPipeline, FluxKontextPipeline])
def test_any_flux_pipeline_lends_its_components(
    make_base: Any, make_adapter: Any, kind: Any
) -> None:
    base = make_base()
    if kind is FluxKontextPipeline:
        base = FluxKontextPipeline(**base.components)
    adapter = make_adapter(base.transformer)
    pipe = CoLoGenPipeline.from_pipe(base, prw=adapter)
    assert pipe.transformer is base.transformer and pipe.vae is base.vae and pipe.prw is adapter
    wanted = run(pipe, "a", image=photo(), task="edit")
    again = CoLoGenPipeline.from_pipe(pipe)
    assert again.prw is adapter
    assert_close(run(again, "a", image=photo(), task="edit"), wanted, **EXACT)
    other = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert CoLoGenPipeline.from_pipe(pipe, scheduler=other).scheduler is other
    with pytest.raises(TypeError, match="no argument unet: components are"):
        CoLoGenPipeline.from_pipe(pipe, unet=None)
    with pytest.raises(TypeError, match="prw must be a PRWAdapter, got str: read one with"):
        CoLoGenPipeline.from_pipe(pipe, prw="adapter/")


def test_a_kontext_folder_loads(make_base: Any, tmp_path: Path) -> None:
    FluxKontextPipeline(**make_base().components).save_pretrained(tmp_path)
    assert CoLoGenPipeline.from_pretrained(tmp_path).prw is None


def test_another_kind_of_pipeline_lends_nothing() -> None:
    class Other(DiffusionPipeline):
        """Of no FLUX.1."""

        def __init__(self, scheduler: Any) -> None:
            super().__init__()
            self.register_modules(scheduler=scheduler)

    with pytest.raises(TypeError, match="Other has no FLUX.1 transformer"):
        CoLoGenPipeline.from_pipe(Other(FlowMatchEulerDiscreteScheduler()))


@pytest.mark.parametrize("kind", ["pil", "np", "pt", "latent"])
def test_output_types(make_pipe: Any, kind: str) -> None:
    pipe = make_pipe()
    call = {"image": photo(), "task": "edit", "height": 32, "width": 48, "output_type": kind}
    images = run(pipe, "a", num_images_per_prompt=2, **call)
    if kind == "pil":
        assert [image.size for image in images] == [(48, 32)] * 2
    else:
        shape = {"np": (2, 32, 48, 3), "pt": (2, 3, 32, 48), "latent": (2, 6, 64)}[kind]
        assert images.shape == shape
        assert type(images) is (np.ndarray if kind == "np" else Tensor)


def test_one_generator_per_result(make_pipe: Any) -> None:
    pipe = make_pipe()
    call = {"image": photo(), "task": "edit"}
    both = run(pipe, "a", num_images_per_prompt=2, generator=[seeded(1), seeded(2)], **call)
    for i, seed in enumerate((1, 2)):
        alone = run(pipe, "a", generator=seeded(seed), **call)
        assert_close(both[i : i + 1], alone, rtol=0.0, atol=1e-5)  # another number of rows


def test_progress_bar(make_pipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = make_pipe()
    run(pipe, "a", image=photo(), task="edit")
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False, desc="steps")
    run(pipe, "a", image=photo(), task="edit")
    assert "steps: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("tiny_vae", [False, True])
@pytest.mark.parametrize("task", ["edit", "customise"])
def test_end_to_end(make_pipe: Any, tiny_vae: bool, task: str) -> None:
    pipe = make_pipe(tiny_vae)
    call = {"prompt": "make the square blue", "task": task, "num_inference_steps": 2}
    out = pipe(image=photo(), generator=seeded(), **call).images
    assert [image.size for image in out] == [(32, 32)]
    again = pipe(image=photo(), generator=seeded(), **call).images[0]
    np.testing.assert_array_equal(np.array(again), np.array(out[0]))
    first, other = (run(pipe, image=photo(seed=s), **call) for s in (0, 1))
    assert not torch.equal(first, other)


def test_a_cache_is_the_source(make_pipe: Any) -> None:
    """Encoded once: the same images for any prompt, seed and negative prompt, bit for bit."""
    pipe = make_pipe()
    cache = pipe.encode_source(photo(), task="edit")
    assert cache.recorded == 3 and cache.nbytes == 3 * 2 * 4 * 32 * 4
    for prompt, negative in (("a red square", None), ("blue", "red"), (["a", "blue"], ["", "red"])):
        call = {"prompt": prompt, "negative_prompt": negative, "true_cfg_scale": 3.0}
        direct = run(pipe, image=photo(), task="edit", **call)
        assert_close(run(pipe, source_cache=cache, **call), direct, **EXACT)


@pytest.mark.parametrize("mode", ["zero", "current"])
@pytest.mark.parametrize("pooled", ["task", "prompt", "empty"])
@torch.no_grad()  # attention on CPU has other bits where a gradient is wanted
def test_what_modulates_the_source(make_pipe: Any, mode: str, pooled: str) -> None:
    """The sampling loop equals one written out with `TwoPass`, for both branches of true CFG."""
    from prw_flux import TwoPass
    from prw_flux.encode import pack, position_ids

    pipe = make_pipe(source_timestep=mode, source_pooled=pooled)
    call = {"prompt": "a red square", "negative_prompt": "blue", "true_cfg_scale": 2.0}
    noise = torch.randn(1, 4, 64, generator=seeded())
    found = run(pipe, image=photo(), task="edit", latents=noise, guidance_scale=2.5, **call)

    two_pass = TwoPass(pipe.transformer, pipe.prw).eval()
    source = pack(encode_image(pipe.vae, to_pixels(photo())))
    texts = {"task": "Change the picture.", "empty": ""}
    branches = []
    for text in ("a red square", "blue"):
        embeds, clip, _ = pipe.encode_prompt(text, max_sequence_length=10)
        own = pipe.encode_prompt(texts[pooled])[1] if pooled in texts else clip
        branches.append({"text_BLE": embeds, "pooled_BP": clip, "source_pooled_BP": own})
    ids, latents = position_ids(2, 2), noise
    pipe.scheduler._step_index = 0
    for t in pipe.scheduler.timesteps:
        velocities = [
            two_pass(
                noisy_BNC=latents,
                noisy_ids_N3=ids,
                timestep_B=t.expand(1) / 1000,
                source_BSC=source,
                source_ids_S3=ids,
                guidance_B=torch.full((1,), 2.5),
                **branch,
            )
            for branch in branches
        ]
        velocity = velocities[1] + 2.0 * (velocities[0] - velocities[1])
        latents = pipe.scheduler.step(velocity, t, latents, return_dict=False)[0]
    assert_close(found, latents, **EXACT)


def test_a_customised_source_keeps_its_shape_and_lies_beside(make_pipe: Any) -> None:
    pipe = make_pipe()
    seen: list[Tensor] = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["img_ids"]), with_kwargs=True
    )
    run(pipe, "a", image=photo(16, 64), task="customise", height=32, width=32)
    assert seen[0][:, 2].min() == -4.0 and seen[0][:, 2].max() == -1.0 and len(seen[0]) == 4
    seen.clear()
    run(pipe, "a", image=photo(16, 64), task="edit", height=32, width=32)
    assert_close(seen[0], seen[1], **EXACT)


def test_images_of_every_kind_are_one_source(make_pipe: Any) -> None:
    pipe = make_pipe()
    array = np.array(photo())
    tensor = torch.from_numpy(array).permute(2, 0, 1) / 255
    latents = encode_image(pipe.vae, to_pixels(photo()))
    first = run(pipe, "a", image=photo(), task="edit")
    for image in (array, tensor, tensor[None], array[None], [photo()], latents):
        assert_close(run(pipe, "a", image=image, task="edit"), first, **EXACT)


def test_batches_pair_images_with_prompts(make_pipe: Any) -> None:
    pipe = make_pipe()
    noise = torch.randn(4, 4, 64, generator=seeded())
    out = run(
        pipe,
        ["a red square", "blue"],
        image=[photo(seed=1), photo(seed=2)],
        task="edit",
        num_images_per_prompt=2,
        latents=noise,
    )
    for i, (prompt, seed) in enumerate(zip(["a red square", "blue"], [1, 2], strict=True)):
        alone = run(
            pipe,
            prompt,
            image=photo(seed=seed),
            task="edit",
            num_images_per_prompt=2,
            latents=noise[2 * i : 2 * i + 2],
        )
        # 1e-5 of values near 1: a matrix product over another number of rows
        assert_close(out[2 * i : 2 * i + 2], alone, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("route", ["free", "stage:stage0", "stage:stage1", "expert:stage0"])
def test_routes(make_pipe: Any, route: str) -> None:
    pipe = make_pipe()
    found = run(pipe, "a", image=photo(), task="edit", route=route)
    free = run(pipe, "a", image=photo(), task="edit")
    assert torch.equal(found, free) == (route in ("free", "stage:stage1"))
    if route.startswith("stage"):
        with pipe.prw.weave.at_stage(route[6:]) as call:
            pipe.prw.route = lambda _: call
            assert_close(run(pipe, "a", image=photo(), task="edit"), found, **EXACT)


def test_callbacks_see_and_change_the_latents(make_pipe: Any) -> None:
    pipe = make_pipe()
    steps: list[int] = []

    def zero(pipe: Any, step: int, time: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return {"latents": torch.zeros_like(tensors["latents"])}

    out = run(pipe, "a", image=photo(), task="edit", callback_on_step_end=zero)
    assert steps == [0, 1, 2] and not out.any()


def test_callbacks_see_and_change_the_embeddings(make_pipe: Any) -> None:
    pipe = make_pipe()
    embeds, pooled, _ = pipe.encode_prompt("blue", max_sequence_length=10)
    call = {"image": photo(), "task": "edit"}

    def swap(pipe: Any, step: int, time: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        assert set(tensors) == {"latents", "prompt_embeds"}
        return {"prompt_embeds": embeds}

    names = ["latents", "prompt_embeds"]
    out = run(
        pipe, "a", callback_on_step_end=swap, callback_on_step_end_tensor_inputs=names, **call
    )
    assert not torch.equal(out, run(pipe, "a", **call))
    with pytest.raises(ValueError, match="has to be in"):
        run(pipe, "a", callback_on_step_end_tensor_inputs=["noise"], **call)

    def stop(pipe: Any, step: int, time: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True
        return tensors

    one = run(pipe, "a", callback_on_step_end=stop, **call)
    assert not torch.equal(one, out)


def test_return_tuple_and_numpy(make_pipe: Any) -> None:
    pipe = make_pipe()
    call = {"image": photo(), "task": "edit", "num_inference_steps": 1}
    (images,) = pipe(prompt="a", output_type="np", return_dict=False, **call)
    assert images.shape == (1, 32, 32, 3)


@torch.no_grad()
def test_embeddings_without_text_encoders(make_pipe: Any) -> None:
    pipe = make_pipe()
    embeds, pooled, _ = pipe.encode_prompt("a red square", max_sequence_length=10)
    own = pipe.encode_prompt("Change the picture.")[1]
    wanted = run(pipe, "a red square", image=photo(), task="edit")
    parts = {
        k: v
        for k, v in pipe.components.items()
        if k not in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    }
    bare = CoLoGenPipeline(
        text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, **parts
    )
    call = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "image": photo()}
    with pytest.raises(ValueError, match="needs source_pooled_embeds="):
        run(bare, task="edit", **call)
    found = run(bare, task="edit", source_pooled_embeds=own, **call)
    assert_close(found, wanted, **EXACT)


def test_sizes_follow_the_source_and_the_adapter(make_pipe: Any) -> None:
    pipe = make_pipe()
    call = {"task": "edit", "num_inference_steps": 1}
    assert pipe(prompt="a", image=photo(64, 64), **call).images[0].size == (32, 32)
    assert pipe(prompt="a", image=photo(20, 80), **call).images[0].size == (64, 16)
    assert pipe(prompt="a", image=photo(), height=16, width=50, **call).images[0].size == (48, 16)
    assert pipe(prompt="a", image=photo(64, 64), max_area=48**2, **call).images[0].size == (48, 48)
    assert pipe(prompt="a", image=photo(64, 48), _auto_resize=False, **call).images[0].size == (
        48,
        64,
    )
    pipe.prw.register_to_config(resolution=None)
    assert pipe(prompt="a", image=photo(64, 33), **call).images[0].size == (32, 64)


# Files ----------------------------------------------------------------------------------------


def test_a_saved_pipeline_loads_as_it_was(make_pipe: Any, tmp_path: Path) -> None:
    pipe = make_pipe()
    wanted = run(pipe, "a red square", image=photo(), task="edit")
    pipe.save_pretrained(tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe/model_index.json").read_text())
    assert index["_prw"] == "prw" and "prw" not in index
    loaded = CoLoGenPipeline.from_pretrained(tmp_path / "pipe")
    assert attached(loaded.transformer) is loaded.prw
    assert_close(run(loaded, "a red square", image=photo(), task="edit"), wanted, **EXACT)


def test_without_an_adapter_it_round_trips_too(make_base: Any, tmp_path: Path) -> None:
    base = make_base()
    CoLoGenPipeline.from_pipe(base).save_pretrained(tmp_path)
    assert CoLoGenPipeline.from_pretrained(tmp_path).prw is None


def test_a_run_loads_with_its_base(make_base: Any, make_adapter: Any, tmp_path: Path) -> None:
    base = make_base()
    base.save_pretrained(tmp_path / "base")
    adapter = make_adapter(base.transformer)
    wanted = run(CoLoGenPipeline.from_pipe(base, prw=adapter), "a", image=photo(), task="edit")
    adapter.save_pretrained(tmp_path / "run/adapter")
    place = {"path": str(tmp_path / "base"), "revision": None}
    (tmp_path / "run/run.json").write_text(json.dumps({"base": place}))
    pipe = CoLoGenPipeline.from_pretrained(tmp_path / "run")
    assert_close(run(pipe, "a", image=photo(), task="edit"), wanted, **EXACT)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"does not exist: name its new place with base="):
        CoLoGenPipeline.from_pretrained(tmp_path / "run")
    pipe = CoLoGenPipeline.from_pretrained(tmp_path / "run", base=tmp_path / "moved")
    assert_close(run(pipe, "a", image=photo(), task="edit"), wanted, **EXACT)


@pytest.mark.parametrize("text", ["{", "[]", '{"base": null}', '{"base": {}}'])
def test_a_damaged_run_says_so(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match="does not say which base"):
        CoLoGenPipeline.from_pretrained(tmp_path)


def test_an_adapter_needs_its_base(make_pipe: Any, tmp_path: Path) -> None:
    make_pipe().prw.save_pretrained(tmp_path / "adapter")
    with pytest.raises(FileNotFoundError, match=r"without its base: load the base, then call"):
        CoLoGenPipeline.from_pretrained(tmp_path / "adapter")


def test_a_folder_that_is_neither(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a pipeline .* nor a run"):
        CoLoGenPipeline.from_pretrained(tmp_path)


# Bad input ------------------------------------------------------------------------------------


def test_unknown_tasks_and_routes(make_pipe: Any) -> None:
    pipe = make_pipe()
    with pytest.raises(ValueError, match=r"no task 'paint': this adapter knows edit, customise\."):
        run(pipe, "a", image=photo(), task="paint")
    with pytest.raises(ValueError, match=r"Choose a task: this adapter knows edit, customise\."):
        run(pipe, "a", image=photo())
    with pytest.raises(ValueError, match="did you mean 'stage1'"):
        run(pipe, "a", image=photo(), task="edit", route="stage:stage11")
    with pytest.raises(ValueError, match='A route is "free"'):
        run(pipe, "a", image=photo(), task="edit", route="newest")
    with pytest.raises(ValueError, match="acts on a source"):
        run(pipe, "a", task="edit")
    with pytest.raises(TypeError, match="pass image= and prompt= by name"):
        pipe("a red square", photo(), task="edit")


def test_an_image_needs_an_adapter(make_base: Any) -> None:
    with pytest.raises(ValueError, match="no PRW adapter"):
        run(CoLoGenPipeline.from_pipe(make_base()), "a", image=photo(), task="edit")


def test_current_time_cannot_be_encoded_once(make_pipe: Any) -> None:
    with pytest.raises(ValueError, match='source_timestep="current"'):
        make_pipe(source_timestep="current").encode_source(photo(), task="edit")


def test_caches_of_others_are_refused(make_pipe: Any) -> None:
    pipe = make_pipe()
    cache = pipe.encode_source(photo(), task="edit")

    def refused(what: str, other: Any = pipe, **call: Any) -> None:
        with pytest.raises(ValueError, match=f"made with another {what}.*encode_source again"):
            run(other, "a", source_cache=cache, **call)

    refused("task .'edit', not 'customise'", task="customise")
    refused("route", route="stage:stage0")
    refused("height", height=64)
    refused("adapter", make_pipe(rank=3))
    with torch.no_grad():
        pipe.prw.pools[0].expert(1).pair("to_v")[1].mul_(2.0)
    refused("adapter")


def test_a_source_that_lies_beside_serves_any_size(make_pipe: Any) -> None:
    pipe = make_pipe()
    cache = pipe.encode_source(photo(), task="customise", height=32, width=32)
    out = run(pipe, "a", source_cache=cache, height=48, width=16)
    assert_close(out, run(pipe, "a", image=photo(), task="customise", height=48, width=16), **EXACT)
    aligned = pipe.encode_source(photo(), task="edit", height=50, width=32)
    assert run(pipe, "a", source_cache=aligned, height=50).shape == (1, 6, 64)


def test_a_cache_that_saw_a_prompt_serves_that_prompt(make_pipe: Any) -> None:
    pipe = make_pipe(source_pooled="prompt")
    with pytest.raises(ValueError, match="prompt= that the calls will use"):
        pipe.encode_source(photo(), task="edit")
    cache = pipe.encode_source(photo(), task="edit", prompt="a red square")
    call = {"image": photo(), "task": "edit"}
    wanted = run(pipe, "a red square", **call)
    assert_close(run(pipe, "a red square", source_cache=cache), wanted, **EXACT)
    with pytest.raises(ValueError, match="made with another prompt"):
        run(pipe, "blue", source_cache=cache)


def test_an_adapter_of_another_base_is_refused(make_base: Any, make_adapter: Any) -> None:
    base = make_base()
    adapter = make_adapter(base.transformer)
    adapter.weave.fingerprint["config"]["guidance_embeds"] = False
    with pytest.raises(ValueError, match="made for another base: its config"):
        CoLoGenPipeline.from_pipe(base, prw=adapter)


def test_stock_processors_are_replaced_again(make_pipe: Any) -> None:
    """Another user of the transformer may have detached: the pipeline attaches its adapter."""
    pipe = make_pipe()
    wanted = run(pipe, "a", image=photo(), task="edit")
    detach(pipe.transformer)
    assert_close(run(pipe, "a", image=photo(), task="edit"), wanted, **EXACT)


def test_the_registry_serves_an_adapter_without_tasks_of_its_own(make_transformer: Any) -> None:
    adapter = PRWAdapter.for_transformer(make_transformer(), rank=4)
    assert {"inpaint", "ground", "control", "customise", "edit"} <= set(adapter.tasks)
    assert not adapter.task("customise").aligned
    adapter.add_task("mine", "Do it.", True)
    assert adapter.task("mine").sentence == "Do it." and adapter.task("edit").aligned


def test_the_embedded_base_loads_by_name_in_one_dtype() -> None:
    pipe = CoLoGenPipeline.from_pretrained("tiny-flux")
    parts = (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.vae)
    assert {part.dtype for part in parts} == {torch.float32}
    image = pipe("a red circle", height=32, width=32, num_inference_steps=1).images[0]
    assert image.size == (32, 32)
