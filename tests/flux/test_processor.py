"""The processor inside the stock attention: one block at a time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from prw_flux import FluxCall, SourceCache, attach

EXACT = {"rtol": 0.0, "atol": 0.0}


@pytest.fixture
def blocks(make_transformer: Any, make_adapter: Any) -> Any:
    transformer = make_transformer()
    attach(transformer, make_adapter(transformer))
    return transformer.transformer_blocks[0].attn, transformer.single_transformer_blocks[0].attn


def test_a_slot_is_written_once(blocks: Any) -> None:
    single = blocks[1]
    cache = SourceCache(3)
    call = FluxCall(cache, "source")
    x = torch.randn(1, 4, 32)
    single(x, prw=call)
    key = cache.slots[1].key_BSHD
    single(2 * x, prw=call)
    assert cache.slots[1].key_BSHD is key and cache.recorded == 1
    assert key.shape == (1, 4, 2, 16)


@pytest.mark.parametrize("double", [True, False])
def test_a_main_block_attends_to_the_source(blocks: Any, double: bool) -> None:
    """softmax over [own keys, source keys], written out."""
    attn = blocks[0] if double else blocks[1]
    layer = 0 if double else 1
    cache = SourceCache(3)
    source, x = torch.randn(2, 3, 32), torch.randn(2, 4, 32)
    text = torch.randn(2, 5, 32) if double else None
    attn(source, source[:, :0] if double else None, prw=FluxCall(cache, "source"))
    found = attn(x, text, prw=FluxCall(cache, "main"))

    def heads(rows: Any, q: Any, k: Any, v: Any, norm_q: Any, norm_k: Any) -> list[torch.Tensor]:
        q, k, v = (f(rows).unflatten(-1, (2, 16)) for f in (q, k, v))
        return [norm_q(q), norm_k(k), v]

    query, key, value = heads(x, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
    if double:
        own = heads(
            text,
            attn.add_q_proj,
            attn.add_k_proj,
            attn.add_v_proj,
            attn.norm_added_q,
            attn.norm_added_k,
        )
        query, key, value = (
            torch.cat(pair, dim=1) for pair in zip(own, (query, key, value), strict=True)
        )
    slot = cache.slots[layer]
    key = torch.cat([key, slot.key_BSHD], dim=1)
    value = torch.cat([value, slot.value_BSHD], dim=1)
    weights = torch.einsum("bqhd,bkhd->bhqk", query, key).div(4.0).softmax(dim=-1)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(2)
    if double:
        rows = (attn.to_out[0](out[:, 5:]), attn.to_add_out(out[:, :5]))
        for a, b in zip(found, rows, strict=True):
            assert_close(a, b, rtol=1e-5, atol=1e-5)  # fp32 sums in another order
    else:
        assert_close(found, out, rtol=1e-5, atol=1e-5)


def test_only_the_source_pass_meets_experts(blocks: Any) -> None:
    single = blocks[1]
    cache = SourceCache(3)
    single(torch.randn(1, 4, 32), prw=FluxCall(cache, "source"))
    x = torch.randn(1, 4, 32)
    before = single(x, prw=FluxCall(cache, "main"))
    with torch.no_grad():
        for parameter in single.processor.pool.parameters():
            parameter.mul_(3.0)
    assert_close(single(x, prw=FluxCall(cache, "main")), before, **EXACT)


def test_masks_and_sources_do_not_combine(blocks: Any) -> None:
    call = FluxCall(SourceCache(3), "main")
    with pytest.raises(ValueError, match="attention mask"):
        blocks[1](torch.randn(1, 4, 32), attention_mask=torch.ones(1, 1, 4, 4), prw=call)


def test_calls_survive_offloading(blocks: Any) -> None:
    """accelerate rebuilds containers and moves what has `.to`: a call must keep its identity."""
    from accelerate.utils import send_to_device

    call = FluxCall(SourceCache(3), "source")
    sent = send_to_device({"joint_attention_kwargs": {"prw": call}}, "cpu")
    assert sent["joint_attention_kwargs"]["prw"] is call


def test_a_copied_transformer_keeps_working(make_transformer: Any, make_adapter: Any) -> None:
    transformer = make_transformer()
    attach(transformer, make_adapter(transformer))
    twin = copy.deepcopy(transformer).single_transformer_blocks[0].attn
    assert twin.processor.pool is twin.processor.adapter.pools[1]
