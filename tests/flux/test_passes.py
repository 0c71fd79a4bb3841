"""The two passes: the same function as one masked joint attention, with exact gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import prw
from prw_flux import TwoPass, attach, detach, main_pass, source_pass
from prw_flux.source_cache import SourceCache

EXACT = {"rtol": 0.0, "atol": 0.0}


def joint_reference(transformer: Any, batch: dict[str, Tensor]) -> Tensor:
    """One call of the stock model on [noisy, source], the source hidden from nobody but seeing
    itself alone."""
    noisy, source, text = batch["noisy_BNC"], batch["source_BSC"], batch["text_BLE"]
    rows = text.shape[1] + noisy.shape[1]
    total = rows + source.shape[1]
    allowed = torch.ones(total, total, dtype=torch.bool)
    allowed[rows:, :rows] = False
    ids = torch.cat([batch["noisy_ids_N3"], batch["source_ids_S3"]])
    return transformer(
        hidden_states=torch.cat([noisy, source], dim=1),
        encoder_hidden_states=text,
        pooled_projections=batch["pooled_BP"],
        timestep=batch["timestep_B"],
        img_ids=ids,
        txt_ids=ids.new_zeros(text.shape[1], 3),
        guidance=torch.ones(len(noisy)) if transformer.config.guidance_embeds else None,
        joint_attention_kwargs={"attention_mask": allowed[None, None]},
        return_dict=False,
    )[0][:, : noisy.shape[1]]


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("fused", [False, True])
def test_two_passes_are_one_masked_attention(
    make_transformer: Any, make_adapter: Any, make_batch: Any, guidance: bool, fused: bool
) -> None:
    transformer = make_transformer(guidance=guidance, dtype=torch.float64)
    batch = make_batch(dtype=torch.float64)
    batch["source_pooled_BP"] = batch["pooled_BP"]  # one modulation, as in a joint pass
    reference = joint_reference(transformer, batch)
    adapter = make_adapter(transformer, stages=0, source_timestep="current")
    if fused:
        transformer.fuse_qkv_projections()
    found = TwoPass(transformer, adapter)(**batch)
    # 1e-12 of values near 1: fp64 sums of a few hundred terms in another order
    assert_close(found, reference, rtol=0.0, atol=1e-12)
    plain = main_pass(transformer, *main_arguments(batch))
    assert (found - plain).abs().max() > 1e-3


def main_arguments(batch: dict[str, Tensor]) -> list[Any]:
    names = ("noisy_BNC", "noisy_ids_N3", "text_BLE", None, "pooled_BP", "timestep_B")
    return [batch[name] if name else None for name in names]


def encode(transformer: Any, batch: dict[str, Tensor], call: prw.Call | None = None) -> SourceCache:
    zero = torch.zeros(1, dtype=batch["source_BSC"].dtype)
    return source_pass(
        transformer,
        batch["source_BSC"],
        batch["source_ids_S3"],
        batch["source_pooled_BP"],
        zero,
        call=call,
    )


def test_experts_enter_before_the_norm_and_the_rotation(
    make_transformer: Any, make_adapter: Any, make_batch: Any
) -> None:
    """A forced expert is the same as its LoRA merged into to_k and to_v of the source pass."""
    transformer = make_transformer(dtype=torch.float64)
    batch = make_batch(dtype=torch.float64)
    adapter = make_adapter(transformer)
    attach(transformer, adapter)
    forced = encode(transformer, batch, adapter.route("expert:stage1"))
    with torch.no_grad():
        for pool in adapter.pools:
            attn = transformer.get_submodule(pool.name)
            expert = pool.expert(1)
            for name in ("to_k", "to_v"):
                down, up = expert.pair(name)
                getattr(attn, name).weight.add_(up @ down * expert.scaling(name))
    merged = make_adapter(transformer, stages=0)
    attach(transformer, merged)
    for slot, reference in zip(forced, encode(transformer, batch), strict=True):
        assert_close(slot.key_BSHD, reference.key_BSHD, rtol=0.0, atol=1e-12)
        assert_close(slot.value_BSHD, reference.value_BSHD, rtol=0.0, atol=1e-12)


def test_a_fresh_expert_changes_nothing(
    make_transformer: Any, make_adapter: Any, make_batch: Any
) -> None:
    transformer, batch = make_transformer(), make_batch()
    bare = TwoPass(transformer, make_adapter(transformer, stages=0))(**batch)
    adapter = make_adapter(transformer, stages=0)
    adapter.weave.unlock("fresh")
    fresh = TwoPass(transformer, adapter.train())(**batch, call=adapter.weave.call(key=1))
    assert_close(fresh, bare, **EXACT)


def test_a_main_pass_without_source_is_stock(
    make_transformer: Any, make_adapter: Any, make_batch: Any
) -> None:
    transformer, batch = make_transformer(), make_batch()
    stock = main_pass(transformer, *main_arguments(batch))
    attach(transformer, make_adapter(transformer))
    assert_close(main_pass(transformer, *main_arguments(batch)), stock, **EXACT)
    detach(transformer)
    assert_close(main_pass(transformer, *main_arguments(batch)), stock, **EXACT)


def test_the_source_sees_nothing_but_itself(
    make_transformer: Any, make_adapter: Any, make_batch: Any
) -> None:
    """Its keys stay when noise, text, time and their batch change."""
    transformer = make_transformer()
    adapter = make_adapter(transformer)
    attach(transformer, adapter)
    batch = make_batch()
    first = encode(transformer, batch)
    main_pass(transformer, *main_arguments(batch), cache=first)
    second = encode(transformer, batch)
    for a, b in zip(first, second, strict=True):
        assert_close(a.key_BSHD, b.key_BSHD, **EXACT)
        assert_close(a.value_BSHD, b.value_BSHD, **EXACT)


@pytest.mark.parametrize("mode", ["zero", "current"])
def test_cached_sampling_is_exact_only_if_the_source_has_its_own_time(
    make_transformer: Any, make_adapter: Any, make_batch: Any, mode: str
) -> None:
    transformer, batch = make_transformer(), make_batch()
    module = TwoPass(transformer, make_adapter(transformer, source_timestep=mode)).eval()
    times = torch.linspace(1.0, 0.0, 5)

    @torch.no_grad()
    def sample(cached: bool) -> Tensor:
        latents, cache = batch["noisy_BNC"], None
        for now, after in zip(times[:-1], times[1:], strict=True):
            inputs = batch | {"noisy_BNC": latents, "timestep_B": now.expand(2)}
            if cached:
                cache = cache or source_pass(
                    transformer,
                    batch["source_BSC"],
                    batch["source_ids_S3"],
                    batch["source_pooled_BP"],
                    module.adapter.source_time(now.expand(2)),
                )
                velocity = main_pass(transformer, *main_arguments(inputs), cache=cache)
            else:
                velocity = module(**inputs)
            latents = latents + (after - now) * velocity
        return latents

    if mode == "zero":
        assert_close(sample(cached=True), sample(cached=False), **EXACT)
    else:
        assert (sample(cached=True) - sample(cached=False)).abs().max() > 1e-4


def gradients(
    transformer: Any, adapter: Any, batch: dict[str, Tensor], checkpointing: bool, passes: int
) -> tuple[dict[str, Tensor], float]:
    module = TwoPass(transformer, adapter).train()
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    else:
        transformer.disable_gradient_checkpointing()
    adapter.zero_grad()
    loss = torch.zeros(())
    with adapter.weave.record(key=7) as record:
        for index in range(passes):  # several caches alive before one backward
            inputs = batch | {"source_BSC": batch["source_BSC"] * (1.0 + index)}
            loss = loss + module(**inputs, call=record).square().mean()
    (loss + prw.veteran_gate_loss(record, density=0.8, weight=0.5)).backward()
    return {n: p.grad.clone() for n, p in adapter.weave.named_parameters()}, record.usage()


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("granularity", ["sample", "token"])
def test_checkpointing_changes_no_gradient(
    make_transformer: Any, make_adapter: Any, make_batch: Any, granularity: str, passes: int
) -> None:
    transformer, batch = make_transformer(), make_batch()
    adapter = make_adapter(transformer, granularity=granularity)
    plain, usage = gradients(transformer, adapter, batch, False, passes)
    checked, usage_checked = gradients(transformer, adapter, batch, True, passes)
    assert usage == usage_checked
    assert plain.keys() == checked.keys()
    for name, gradient in plain.items():
        assert_close(checked[name], gradient, **EXACT, msg=name)
    assert max(float(g.abs().max()) for g in plain.values()) > 0.0


class Passes:
    """Counts the passes of a transformer by how many text tokens they have."""

    def __init__(self, transformer: Any) -> None:
        self.source = self.main = 0
        transformer.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        alone = kwargs["encoder_hidden_states"].shape[1] == 0
        self.source, self.main = self.source + alone, self.main + (not alone)


def drawn(
    batch: dict[str, Tensor], count: int
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A batch with `count` noisy latents per source, and the batches of single draws."""
    each = []
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        noise = torch.randn(batch["noisy_BNC"].shape, generator=generator, dtype=torch.float64)
        times = 0.2 + 0.15 * index + 0.1 * torch.arange(len(noise))
        dtype = batch["noisy_BNC"].dtype
        each.append(batch | {"noisy_BNC": noise.to(dtype), "timestep_B": times.to(dtype)})
    own = ("noisy_BNC", "timestep_B")
    together = {name: torch.stack([one[name] for one in each], 1).flatten(0, 1) for name in own}
    shared = {k: batch[k].repeat_interleave(count, dim=0) for k in ("text_BLE", "pooled_BP")}
    return batch | shared | together, each


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("pooled", ["task", "prompt"])
def test_m_draws_of_one_source_pass_are_m_forwards(
    make_transformer: Any, make_adapter: Any, make_batch: Any, pooled: str, checkpointing: bool
) -> None:
    transformer = make_transformer(dtype=torch.float64)
    adapter = make_adapter(transformer)
    module = TwoPass(transformer, adapter).train()
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    batch = make_batch(dtype=torch.float64)
    if pooled == "prompt":
        del batch["source_pooled_BP"]
    together, each = drawn(batch, 3)

    def run(batches: list[dict[str, Tensor]]) -> tuple[Tensor, list[Tensor], int]:
        adapter.zero_grad()
        passes, losses = Passes(transformer), []
        for one in batches:
            with adapter.weave.record(key=7) as record:
                losses.append(module(**one, call=record).square().mean())
        counted = passes.source
        loss = torch.stack(losses).mean()
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in adapter.weave.parameters()], counted

    loss, gradients, passes = run([together])
    wanted_loss, wanted, many = run(each)
    assert (passes, many) == (1, 3)
    # fp64 sums over other numbers of rows, through three blocks and back
    assert_close(loss, wanted_loss, rtol=1e-12, atol=0.0)
    for found, gradient in zip(gradients, wanted, strict=True):
        # routers compute in fp32 whatever the dtype: their gradients agree to its rounding, 6e-8
        assert_close(found, gradient, rtol=1e-6, atol=1e-9)
    assert max(float(g.abs().max()) for g in wanted) > 1e-4


def test_draws_that_share_a_source_keep_to_its_time(
    make_transformer: Any, make_adapter: Any, make_batch: Any
) -> None:
    transformer, batch = make_transformer(), make_batch()
    together, _ = drawn(batch, 2)
    module = TwoPass(transformer, make_adapter(transformer, source_timestep="current"))
    with pytest.raises(ValueError, match='4 noisy latents cannot share 2 sources under .*"current'):
        module(**together)
    assert module(**batch).shape == batch["noisy_BNC"].shape
    three = make_batch(3)["source_BSC"]
    with pytest.raises(ValueError, match="3 sources cannot be shared by 4 noisy latents"):
        module(**together | {"source_BSC": three})


def test_the_bound_call_may_change_before_the_backward_pass(
    make_transformer: Any, make_adapter: Any, make_batch: Any
) -> None:
    """Recomputation uses the call that was bound when its pass began."""
    transformer, batch = make_transformer(), make_batch()
    adapter = make_adapter(transformer)
    module = TwoPass(transformer, adapter).train()

    def run(rebind: bool) -> list[Tensor]:
        adapter.zero_grad()
        adapter.weave.call(key=7)
        loss = module(**batch).square().mean()
        if rebind:
            adapter.weave.call(key=8)
        loss.backward()
        return [p.grad.clone() for p in adapter.weave.parameters()]

    plain = run(rebind=False)
    transformer.enable_gradient_checkpointing()
    for a, b in zip(plain, run(rebind=True), strict=True):
        assert_close(b, a, **EXACT)


def test_reentrant_checkpointing_is_refused(
    make_transformer: Any, make_adapter: Any, make_batch: Any
) -> None:
    transformer = make_transformer()
    module = TwoPass(transformer, make_adapter(transformer)).train()

    def reentrant(function: Callable[..., Any], *args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=True)

    transformer.enable_gradient_checkpointing(reentrant)
    batch = make_batch()
    batch["source_BSC"].requires_grad_()
    with pytest.raises(RuntimeError, match="reentrant"):
        module(**batch)


def test_veterans_and_base_receive_no_gradient(
    make_transformer: Any, make_adapter: Any, make_batch: Any
) -> None:
    transformer = make_transformer()
    adapter = make_adapter(transformer)
    module = TwoPass(transformer, adapter).train()
    module(**make_batch(), call=adapter.weave.call(key=3)).square().mean().backward()
    assert all(p.grad is None for p in transformer.parameters())
    for pool in adapter.pools:
        assert all(p.grad is None for p in pool.experts[0].parameters())
        assert all(p.grad is not None for p in pool.experts[1].parameters())


def test_one_source_serves_a_batch_and_b_serve_consecutive_samples(
    make_transformer: Any, make_adapter: Any, make_batch: Any
) -> None:
    transformer = make_transformer(dtype=torch.float64)
    attach(transformer, make_adapter(transformer))
    batch = make_batch(4, torch.float64)
    pair = {**batch, "source_BSC": batch["source_BSC"][:2]}
    repeated = {**batch, "source_BSC": pair["source_BSC"].repeat_interleave(2, dim=0)}
    found = main_pass(transformer, *main_arguments(batch), cache=encode(transformer, pair))
    wanted = main_pass(transformer, *main_arguments(batch), cache=encode(transformer, repeated))
    assert_close(found, wanted, rtol=0.0, atol=1e-12)
    single = {**batch, "source_BSC": batch["source_BSC"][:1]}
    alone = main_pass(transformer, *main_arguments(batch), cache=encode(transformer, single))
    assert_close(alone[:2], found[:2], rtol=0.0, atol=1e-12)
    three = {**batch, "source_BSC": batch["source_BSC"][:3]}
    with pytest.raises(ValueError, match="3 sources cannot be shared by 4 samples"):
        main_pass(transformer, *main_arguments(batch), cache=encode(transformer, three))


def test_an_unrecorded_block_is_noticed(make_transformer: Any, make_adapter: Any) -> None:
    cache = SourceCache(3)
    with pytest.raises(RuntimeError, match="recorded 0 of 3 blocks"):
        cache.require_complete()
    with pytest.raises(RuntimeError, match="run source_pass before"):
        cache.slots[0].read(torch.zeros(1, 4, 2, 16))
