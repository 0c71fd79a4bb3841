"""PRW beside what makes diffusers fast: step caches, attention kernels, compilation."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from torch import Tensor
from torch.testing import assert_close

from prw_flux import FluxCall, TwoPass
from prw_flux.attach import processors

EXACT = {"rtol": 0.0, "atol": 0.0}
WIDE = (-1, 1001)
MODES = [
    pytest.param({}, False, id="zero"),
    pytest.param({"source_timestep": "current"}, True, id="current, true cfg"),
    pytest.param({"source_pooled": "prompt"}, True, id="prompt, true cfg"),
]


def caches(pipe: Any, eager: bool) -> dict[str, Any]:
    """Every step cache, so shy that it never acts, or so eager that it acts wherever it may."""

    def now() -> int:
        return 500 if pipe.current_timestep is None else int(pipe.current_timestep)

    return {
        "FirstBlockCache": FirstBlockCacheConfig(threshold=1e9 if eager else 0.0),
        "TaylorSeer": TaylorSeerCacheConfig(
            cache_interval=2 if eager else 1,
            disable_cache_before_step=1,
            taylor_factors_dtype=torch.float32,
        ),
        "PyramidAttentionBroadcast": PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2 if eager else 1,
            spatial_attention_timestep_skip_range=WIDE,
            current_timestep_callback=now,
        ),
        "FasterCache": FasterCacheConfig(
            spatial_attention_block_skip_range=7 if eager else 1,
            spatial_attention_timestep_skip_range=(-1, 500),  # it extrapolates from two steps
            current_timestep_callback=now,
            is_guidance_distilled=True,
            attention_weight_callback=lambda module: 0.5,
        ),
        "MagCache": MagCacheConfig(
            threshold=1e9 if eager else 0.0,
            max_skip_steps=1,
            retention_ratio=0.0,
            num_inference_steps=3,
            mag_ratios=[1.0, 0.9, 0.8],
        ),
        "SeaCache": SeaCacheConfig(threshold=1e9 if eager else 0.0),
    }


class Seen:
    """How often an attention ran: in source passes, in main passes, in passes without source."""

    def __init__(self, transformer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clear()
        kind = type(processors(transformer)[0])
        original = kind.__call__

        @functools.wraps(original)  # diffusers passes what the signature names, and drops the rest
        def counted(processor: Any, attn: Any, hidden_states: Tensor, *args: Any, **kw: Any) -> Any:
            call: FluxCall | None = kw.get("prw")
            mode = "stock" if call is None else call.mode
            setattr(self, mode, getattr(self, mode) + 1)
            return original(processor, attn, hidden_states, *args, **kw)

        monkeypatch.setattr(kind, "__call__", counted)

    def clear(self) -> None:
        self.source = self.main = self.stock = 0


def recorded(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Everything that source passes record from now on."""
    import prw_flux.sources

    found: list[Tensor] = []
    original = prw_flux.sources.source_pass

    def spy(*args: Any, **kwargs: Any) -> Any:
        cache = original(*args, **kwargs)
        found.extend(t for slot in cache for t in (slot.key_BSHD, slot.value_BSHD))
        return cache

    monkeypatch.setattr(prw_flux.sources, "source_pass", spy)
    return found


@pytest.mark.parametrize(("mode", "true_cfg"), MODES)
@pytest.mark.parametrize("name", list(caches(None, False)))
def test_a_step_cache_never_touches_the_source(
    make_bare_pipe: Any,
    edited: Any,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    mode: dict[str, str],
    true_cfg: bool,
) -> None:
    """Idle caches change nothing; eager ones skip blocks of main passes, and of no source pass."""
    pipe = make_bare_pipe(**mode)
    call: dict[str, Any] = {"source_pooled_embeds": None} if "source_pooled" in mode else {}
    if true_cfg:
        call |= {
            "negative_prompt_embeds": torch.ones(1, 5, 32),
            "negative_pooled_prompt_embeds": torch.ones(1, 16),
            "true_cfg_scale": 2.0,
        }
    found = recorded(pipe, monkeypatch)
    wanted = edited(pipe, **call)
    sources = list(found)
    seen = Seen(pipe.transformer, monkeypatch)

    def again(eager: bool) -> Tensor:
        found.clear()
        seen.clear()
        pipe.transformer.enable_cache(caches(pipe, eager)[name])
        results = [edited(pipe, **call) for _ in range(2)]  # nothing is left for the next image
        pipe.transformer.disable_cache()
        assert_close(results[0], results[1], **EXACT)
        return results[0]

    assert_close(again(eager=False), wanted, **EXACT)
    branches = 2 if true_cfg else 1
    assert seen.main == 2 * 3 * 3 * branches
    assert len(found) == 2 * len(sources) == 2 * seen.source
    fast = again(eager=True)
    assert fast.isfinite().all()
    if name == "SeaCache":  # needs the step's number and sigma, which FluxPipeline does not tell it
        assert_close(fast, wanted, **EXACT)
    else:
        assert not torch.equal(fast, wanted)
        assert seen.main < 2 * 3 * 3 * branches
    assert len(found) == 2 * len(sources) == 2 * seen.source
    if "source_timestep" not in mode:  # the source then depends on no latents that a cache changed
        for a, b in zip(found, 2 * sources, strict=True):
            assert_close(a, b, **EXACT)
    assert_close(edited(pipe, **call), wanted, **EXACT)


@pytest.mark.parametrize("name", ["FirstBlockCache", "TaylorSeer", "PyramidAttentionBroadcast"])
def test_a_step_cache_never_takes_one_velocity_for_the_other(
    make_bare_pipe: Any, edited: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Image guidance compares with a pass without source, which no cache may skip or learn from."""
    pipe = make_bare_pipe()
    wanted = edited(pipe, image_guidance_scale=2.0)
    seen = Seen(pipe.transformer, monkeypatch)
    pipe.transformer.enable_cache(caches(pipe, eager=False)[name])
    assert_close(edited(pipe, image_guidance_scale=2.0), wanted, **EXACT)
    pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(caches(pipe, eager=True)[name])
    seen.clear()
    edited(pipe, image_guidance_scale=2.0)
    assert seen.stock == 3 * 3 and seen.source == 3 and seen.main < 3 * 3


# Attention kernels ----------------------------------------------------------------------------


@pytest.fixture
def restored_backend() -> Iterator[None]:
    """`set_attention_backend` also changes the default of the whole process."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

    before = Registry.get_active_backend()[0]
    yield
    Registry.set_active_backend(before)


@pytest.mark.parametrize("backend", ["native", "_native_math", "_native_flash"])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.usefixtures("restored_backend")
def test_attention_backends(make_bare_pipe: Any, edited: Any, backend: str, before: bool) -> None:
    """Chosen before or after attaching; no kernel is asked for a mask."""
    from prw_flux import attach, detach

    pipe = make_bare_pipe()
    wanted = edited(pipe)
    if before:
        detach(pipe.transformer)
    pipe.transformer.set_attention_backend(backend)
    if before:
        attach(pipe.transformer, pipe.prw)
    assert {p._attention_backend for p in processors(pipe.transformer)} == {backend}
    assert_close(edited(pipe), wanted, rtol=1e-4, atol=1e-4)  # sums in another order


# Compilation ----------------------------------------------------------------------------------


def deep(make_transformer: Any, blocks: int) -> Any:
    """`blocks` blocks of each kind."""
    from diffusers import FluxTransformer2DModel

    config = dict(make_transformer().config) | {"num_layers": blocks, "num_single_layers": blocks}
    torch.manual_seed(0)
    return FluxTransformer2DModel.from_config(config).eval()


def graphs(pipe: Any, edited: Any, **call: Any) -> int:
    """How many graphs dynamo captures for the blocks in one run, every layer sharing them."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    wanted = edited(pipe, **call)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert_close(edited(pipe, **call), wanted, rtol=1e-5, atol=1e-5)
    count = int(counters["stats"]["unique_graphs"])
    edited(pipe, image=torch.full((1, 16, 4, 4), 0.1), **call)
    assert counters["stats"]["unique_graphs"] == count, "another image compiled again"
    assert not counters["graph_break"]
    return count


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["sample", "token"])
def test_the_number_of_graphs_does_not_grow_with_depth(
    make_transformer: Any, make_bare_pipe: Any, edited: Any, granularity: str
) -> None:
    """Two kinds of block, a pass each for source and result: dynamo gives up at eight per code."""
    found = {}
    for blocks in (2, 9):
        pipe = make_bare_pipe(deep(make_transformer, blocks), granularity=granularity)
        found[blocks] = graphs(pipe, edited)
    assert len(set(found.values())) == 1, found
    assert next(iter(found.values())) <= 8


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it
def test_training_compiles_layer_by_layer(
    make_transformer: Any, make_adapter: Any, make_batch: Any
) -> None:
    """With gradients a layer keeps its number, so dynamo needs room for each; exact as ever."""
    transformer, batch = deep(make_transformer, 5), make_batch()
    adapter = make_adapter(transformer)
    module = TwoPass(transformer, adapter).train()

    def gradients() -> list[Tensor]:
        adapter.zero_grad()
        module(**batch, call=adapter.weave.call(key=1)).square().mean().backward()
        return [parameter.grad.clone() for parameter in adapter.weave.parameters()]

    torch._dynamo.reset()
    wanted = gradients()
    with torch._dynamo.config.patch(recompile_limit=64):
        transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
        compiled = gradients()
    for found, gradient in zip(compiled, wanted, strict=True):
        assert_close(found, gradient, rtol=1e-5, atol=1e-6)  # as compiled, sums may be reordered
