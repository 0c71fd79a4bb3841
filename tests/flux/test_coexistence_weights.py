"""PRW beside what changes weights or attention: LoRAs, fused projections, foreign processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from diffusers.quantizers.nunchaku.nunchaku_quantizer import NunchakuLiteQuantizer
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from prw_flux import CoLoGenPipeline, attach, attached, detach, main_pass, source_pass
from prw_flux.attach import processors

EXACT = {"rtol": 0.0, "atol": 0.0}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # fp32 sums in another order, over three steps
NO_SOURCE = {"image": None, "task": None, "source_pooled_embeds": None}


@pytest.fixture
def lora_file(make_transformer: Any, tmp_path: Path) -> Path:
    """A LoRA as others share them: on to_k and to_v, where our experts act, and on to_q."""
    transformer = make_transformer()
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"]))
    state = {}
    torch.manual_seed(7)
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            state[name.replace(".default", "")] = 0.3 * torch.randn_like(parameter)
    FluxPipeline.save_lora_weights(tmp_path / "style", state)
    return tmp_path / "style"


def merged(pipe: Any, scale: float) -> Any:
    """What the LoRA means: the pipeline with it added to the weights of its base."""
    for layer in (m for m in pipe.transformer.modules() if "lora_A" in dict(m.named_children())):
        down, up = layer.lora_A["style"].weight, layer.lora_B["style"].weight
        layer.base_layer.weight.data += scale * layer.scaling["style"] * up @ down
    pipe.transformer.disable_lora()
    return pipe


@pytest.mark.parametrize("first", ["lora", "prw"])
def test_loras_of_others(make_bare_pipe: Any, edited: Any, lora_file: Path, first: str) -> None:
    """Loaded before or after attaching; scaled, fused, unloaded: source and result both have it."""
    pipe = make_bare_pipe()
    wanted = edited(pipe)
    adapter, transformer = pipe.prw, pipe.transformer
    if first == "lora":
        detach(transformer)
        pipe.load_lora_weights(lora_file, adapter_name="style")
        pipe = CoLoGenPipeline.from_pipe(pipe, prw=adapter)
    else:
        pipe.load_lora_weights(lora_file, adapter_name="style")
    assert attached(transformer) is adapter

    reference = make_bare_pipe()
    reference.load_lora_weights(lora_file, adapter_name="style")
    with_lora = edited(merged(reference, 1.0))
    assert (with_lora - wanted).abs().max() > 0.01
    assert_close(edited(pipe), with_lora, **CLOSE)

    pipe.set_adapters(["style"], [0.0])
    assert_close(edited(pipe), wanted, **EXACT)
    half = make_bare_pipe()
    half.load_lora_weights(lora_file, adapter_name="style")
    pipe.set_adapters(["style"], [0.5])
    assert_close(edited(pipe), edited(merged(half, 0.5)), **CLOSE)

    pipe.set_adapters(["style"], [1.0])
    pipe.fuse_lora()
    assert_close(edited(pipe), with_lora, **CLOSE)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert_close(edited(pipe), wanted, **CLOSE)  # unfusing subtracts what fusing added
    assert attached(transformer) is adapter


def test_unloading_leaves_no_trace(make_bare_pipe: Any, edited: Any, lora_file: Path) -> None:
    pipe = make_bare_pipe()
    wanted = edited(pipe)
    names = list(pipe.transformer.state_dict())
    pipe.load_lora_weights(lora_file, adapter_name="style")
    pipe.unload_lora_weights()
    assert list(pipe.transformer.state_dict()) == names
    assert_close(edited(pipe), wanted, **EXACT)


def test_one_scale_for_source_and_result(make_bare_pipe: Any, edited: Any, lora_file: Path) -> None:
    """FluxPipeline's own scale reaches a call of the transformer, and the source has one of its
    own: rather than give them different LoRAs, it is refused."""
    pipe = make_bare_pipe()
    pipe.load_lora_weights(lora_file, adapter_name="style")
    with pytest.raises(ValueError, match=r"not of the source.*set_adapters"):
        edited(pipe, joint_attention_kwargs={"scale": 0.5})
    assert edited(pipe, joint_attention_kwargs={"scale": 0.5}, **NO_SOURCE).isfinite().all()
    assert edited(pipe, joint_attention_kwargs={"scale": 1.0}).isfinite().all()


def test_an_adapter_made_beside_a_lora_fits_the_base_without_it(
    make_bare_pipe: Any, make_adapter: Any, lora_file: Path, make_transformer: Any
) -> None:
    """What identifies a base is its own weights, wherever PEFT has put them."""
    pipe = make_bare_pipe()
    pipe.load_lora_weights(lora_file, adapter_name="style")
    late = make_adapter(pipe.transformer)
    assert late.weave.fingerprint == make_adapter(make_transformer()).weave.fingerprint


def test_a_cache_knows_the_loras_it_was_made_with(
    make_bare_pipe: Any, edited: Any, lora_file: Path
) -> None:
    pipe = make_bare_pipe()
    cache = pipe.encode_source(
        torch.zeros(1, 16, 4, 4), task="edit", source_pooled_embeds=torch.zeros(1, 16)
    )
    cached = {"image": None, "source_pooled_embeds": None, "source_cache": cache}
    wanted = edited(pipe, **cached)
    pipe.load_lora_weights(lora_file, adapter_name="style")
    for weight in (1.0, 0.5):
        pipe.set_adapters(["style"], [weight])
        with pytest.raises(ValueError, match="another base .or base LoRA."):
            edited(pipe, **cached)
    pipe.unload_lora_weights()
    assert_close(edited(pipe, **cached), wanted, **EXACT)


def test_one_expert_is_not_a_lora(
    make_bare_pipe: Any, make_adapter: Any, edited: Any, make_batch: Any, tmp_path: Path
) -> None:
    """Where all rows are of the source it is the same; where there are others it is not."""
    pipe, batch = make_bare_pipe(), make_batch()

    def source(pipe: Any, route: str) -> Any:
        return source_pass(
            pipe.transformer, batch["source_BSC"], batch["source_ids_S3"],
            batch["source_pooled_BP"], torch.zeros(1), call=pipe.prw.route(route),
        )  # fmt: skip

    pipe.prw.weave.export_expert("stage1", tmp_path / "expert")
    state = load_file(tmp_path / "expert/adapter_model.safetensors")
    stock = make_bare_pipe(stages=0)
    state = {name.replace("base_model.model.", "transformer."): t for name, t in state.items()}
    halves = [name for name in state if "lora_A" in name]
    alphas = {name.replace("lora_A.weight", "alpha"): 8.0 for name in halves}  # twice the rank
    stock.transformer.load_lora_adapter(
        state, network_alphas=alphas, prefix="transformer", adapter_name="expert"
    )
    for a, b in zip(source(pipe, "expert:stage1"), source(stock, "free"), strict=True):
        assert_close(b.key_BSHD, a.key_BSHD, **CLOSE)
        assert_close(b.value_BSHD, a.value_BSHD, **CLOSE)
    difference = edited(stock) - edited(pipe, route="expert:stage1")
    assert difference.abs().max() > 0.01


def test_fused_projections(make_bare_pipe: Any, edited: Any) -> None:
    """One product for q, k and v; the experts come after it. Undone, every bit is back."""
    pipe = make_bare_pipe()
    wanted = edited(pipe)
    pipe.transformer.fuse_qkv_projections()
    assert pipe.transformer.single_transformer_blocks[0].attn.fused_projections
    assert_close(edited(pipe), wanted, **CLOSE)
    pipe.transformer.unfuse_qkv_projections()
    assert_close(edited(pipe), wanted, **EXACT)


# Processors that are not ours -----------------------------------------------------------------


def test_ip_adapters_are_refused(make_bare_pipe: Any, edited: Any) -> None:
    """Loaded after attaching, or before: one sentence each, and nothing has changed."""
    pipe = make_bare_pipe()
    wanted = edited(pipe)
    with pytest.raises(ValueError, match=r"IP-Adapter loader does\): detach\(\) first"):
        pipe.transformer._load_ip_adapter_weights(ip_adapter())
    with pytest.raises(ValueError, match=r"IP-Adapter loader does\): detach\(\) first"):
        pipe.unload_ip_adapter()
    assert_close(edited(pipe), wanted, **EXACT)
    detach(pipe.transformer)
    pipe.transformer._load_ip_adapter_weights(ip_adapter())
    with pytest.raises(ValueError, match=r"FluxIPAdapterAttnProcessor.*unload_ip_adapter\(\)"):
        edited(pipe)
    pipe.unload_ip_adapter()
    assert_close(edited(pipe), wanted, **EXACT)


def ip_adapter() -> dict[str, Any]:
    """Weights in the layout of XLabs' IP-Adapter, for one double-stream block."""
    projections = {
        f"0.{name}.{kind}": torch.zeros(*size)
        for name in ("to_k_ip", "to_v_ip")
        for kind, size in (("weight", (32, 32)), ("bias", (32,)))
    }
    image = {"proj.weight": torch.zeros(128, 8), "proj.bias": torch.zeros(128)}
    norm = {"norm.weight": torch.ones(32), "norm.bias": torch.zeros(32)}
    return {"ip_adapter": projections, "image_proj": image | norm}


class NunchakuFluxAttention(nn.Module):
    """Stands for nunchaku's: a module of another class where FluxAttention was."""

    processor = FluxAttnProcessor()


def test_nunchaku_is_refused(make_transformer: Any, make_adapter: Any) -> None:
    """Its own model classes, and the fused layers that diffusers' quantiser puts in."""
    transformer = make_transformer()
    adapter = make_adapter(transformer)
    transformer.single_transformer_blocks[1].attn = NunchakuFluxAttention()
    sentence = r"NunchakuFluxAttention, which PRW cannot act inside .* bitsandbytes or torchao"
    with pytest.raises(ValueError, match=sentence):
        attach(transformer, adapter)
    transformer.single_transformer_blocks[1] = nn.Identity()
    with pytest.raises(ValueError, match="Identity, which PRW cannot act inside"):
        attach(transformer, adapter)
    layered = make_transformer()
    kind = type("SVDQW4A4Linear", (nn.Linear,), {"__module__": NunchakuLiteQuantizer.__module__})
    layered.transformer_blocks[0].attn.to_k = kind(32, 32)
    with pytest.raises(ValueError, match="SVDQW4A4Linear, which PRW cannot act inside"):
        attach(layered, adapter)


@pytest.mark.parametrize("steps", [0, 1])
def test_processors_replaced_while_sampling_are_noticed(
    make_bare_pipe: Any, edited: Any, steps: int
) -> None:
    """diffusers would drop the source with a warning: the rest would be text to image."""
    pipe = make_bare_pipe()
    wanted = edited(pipe)

    def meddle(pipe: Any, step: int, time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == steps:
            pipe.transformer.set_attn_processor(FluxAttnProcessor())
        return {}

    with pytest.raises(ValueError, match="replaced while sampling"):
        edited(pipe, callback_on_step_end=meddle)
    assert all(type(p) is FluxAttnProcessor for p in processors(pipe.transformer))
    assert_close(edited(pipe), wanted, **EXACT)  # attached again when the next call begins


def test_some_replaced_processors_are_noticed(
    make_bare_pipe: Any, edited: Any, make_batch: Any
) -> None:
    pipe = make_bare_pipe()
    pipe.transformer.single_transformer_blocks[1].attn.set_processor(FluxAttnProcessor())
    with pytest.raises(ValueError, match="Only 2 of 3 attention processors"):
        edited(pipe)


def test_a_cache_needs_our_processors(make_bare_pipe: Any, make_batch: Any) -> None:
    pipe, batch = make_bare_pipe(), make_batch()
    cache = pipe.encode_source(
        torch.zeros(1, 16, 4, 4), task="edit", source_pooled_embeds=torch.zeros(1, 16)
    )
    names = ("noisy_BNC", "noisy_ids_N3", "text_BLE", None, "pooled_BP", "timestep_B")
    arguments = [batch[name] if name else None for name in names]
    assert main_pass(pipe.transformer, *arguments, cache=cache).isfinite().all()
    pipe.transformer.set_attn_processor(FluxAttnProcessor())
    with pytest.raises(ValueError, match=r"not PRW's: call prw_flux.attach"):
        main_pass(pipe.transformer, *arguments, cache=cache)


def test_a_stock_transformer_has_the_classes_we_check(make_transformer: Any) -> None:
    transformer = make_transformer()
    assert type(transformer) is FluxTransformer2DModel
    assert {type(b.attn) for b in transformer.transformer_blocks} == {FluxAttention}
