"""The guarantees on small random instances of the models that people have."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prw

WIDTH = 16
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])


@dataclass(frozen=True)
class Family:
    """How to build a model, what to feed it, and which layers to adapt."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    targets: Any = "all-linear"
    exclude: Any = ()


def causal(name: str, **fields: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{name}Config")(
            **{
                "vocab_size": 32,
                "hidden_size": WIDTH,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 32,
                "bos_token_id": 0,
                "eos_token_id": 31,
                "pad_token_id": 30,
                **fields,
            }
        )
        return getattr(transformers, f"{name}ForCausalLM")(config)

    return build


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    special = {"bos_token_id": 0, "eos_token_id": 31, "pad_token_id": 30}
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=32, n_positions=32, n_embd=WIDTH, n_layer=2, n_head=2, **drops, **special
        )
    )


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=32,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=32,
        )
    )


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=32,
            d_model=WIDTH,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
            feed_forward_proj="gated-gelu",
        )
    )


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(
        ViTConfig(
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=8,
            patch_size=4,
        )
    )


def clip() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=32,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=32,
            projection_dim=WIDTH,
            bos_token_id=0,
            eos_token_id=31,
            pad_token_id=30,
        )
    )


def sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=8,
    )


def torch_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 24, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def timm_vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.models.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=WIDTH, depth=2, num_heads=2, num_classes=3
    )


class Handwritten(nn.Module):
    """Attention by hand, over 4-D inputs, with a layer that is used in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.mixer = nn.Linear(WIDTH, WIDTH, bias=False)
        self.again = self.mixer

    def forward(self, x: Tensor) -> Tensor:
        h = x.permute(0, 2, 3, 1)  # not contiguous
        scores = self.query(h) @ self.key(h).transpose(-1, -2) / WIDTH**0.5
        return self.again(self.mixer(scores.softmax(-1) @ self.value(h)).tanh())


def ids() -> dict[str, Any]:
    return {"input_ids": TOKENS}


def image() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 8, 8)}


def latents() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "pooled_projections": torch.randn(2, WIDTH),
        "timestep": torch.tensor([3.0, 500.0]),
    }


FAMILIES = {
    "llama": Family(causal("Llama"), ids),
    "qwen3": Family(causal("Qwen3", head_dim=8), ids, ["q_proj", "v_proj", "gate_proj"]),
    "gpt2": Family(gpt2, ids, r".*\.(c_attn|c_fc|c_proj)"),
    "bert": Family(bert, ids),
    "t5": Family(t5, lambda: {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :5]}),
    "vit": Family(vit, image),
    "clip": Family(clip, ids, ["q_proj", "k_proj", "v_proj", "fc1"]),
    "sd3": Family(sd3, latents, exclude=["proj_out", "timestep_embedder.*"]),
    "encoder": Family(torch_encoder, lambda: {"src": torch.randn(2, 6, WIDTH)}),
    "handwritten": Family(Handwritten, lambda: {"x": torch.randn(2, WIDTH, 3, 5)}),
    "timm-vit": Family(timm_vit, lambda: {"x": torch.randn(2, 3, 8, 8)}, ["qkv", "fc1", "fc2"]),
}
DECODERS = ["llama", "qwen3", "gpt2"]


@pytest.fixture(autouse=True)
def slow_path() -> Iterator[None]:
    """torch's fast path rounds in its own way, so the base is compared without it."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(enabled)


def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """All tensors that come out, one after another."""
    output = model(**inputs)
    parts = [output] if isinstance(output, Tensor) else list(output.values())
    return torch.cat([part.flatten() for part in parts if isinstance(part, Tensor)])


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return run(model, inputs)


def outputs_of_base(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Of a frozen base: torch picks the kernel of a product by ``requires_grad``, other bits."""
    flags = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)
    found = outputs_of(model, inputs)
    for parameter, flag in zip(model.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)
    return found


def config(family: Family, share: str, **fields: Any) -> prw.Config:
    given = {"rank": 2, "share_router": share, **fields}
    return prw.Config(target_modules=family.targets, exclude_modules=family.exclude, **given)


def train(model: nn.Module, weave: prw.Weave, inputs: dict[str, Any], steps: int = 2) -> None:
    """Two steps: after the first one B is not zero, so that A and the gate get gradients."""
    optimizer = torch.optim.AdamW(weave.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        with weave.record() as routing:
            loss = run(model, inputs).square().mean()
        loss = loss + prw.veteran_gate_loss(routing, density=0.8, weight=0.5)
        loss.backward()
        optimizer.step()
    weave.call(noisy=False)


@pytest.mark.parametrize("share", ["module", "parent"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_life_of_a_weave(name: str, share: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model, inputs = family.build().eval(), family.inputs()
    modules, flags = dict(model.named_modules()), [p.requires_grad for p in model.parameters()]
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    base = outputs_of_base(model, inputs)

    weave = prw.weave(model, config(family, share))
    weave.unlock("one")
    assert torch.equal(outputs_of(model, inputs), base), "a fresh expert changes nothing"
    train(model, weave, inputs)
    one = outputs_of(model, inputs)
    assert not torch.equal(one, base), "training changes something"

    weave.unlock("two")
    train(model, weave, inputs)
    learners = {id(p) for p in weave.parameters()}
    moved = {id(p) for p in model.parameters() if p.grad is not None}
    assert moved == learners, "gradients reach the newest experts and the routers, and only them"
    weave.close()
    with weave.at_stage("one"):
        assert torch.equal(outputs_of(model, inputs), one)

    now = outputs_of(model, inputs)
    weave.save(tmp_path / "weave")
    weave.unload()
    assert dict(model.named_modules()) == modules
    assert [p.requires_grad for p in model.parameters()] == flags
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert torch.equal(outputs_of_base(model, inputs), base)

    loaded = prw.load(model, tmp_path / "weave")
    assert torch.equal(outputs_of(model, inputs), now)
    with loaded.at_stage("one"):
        assert torch.equal(outputs_of(model, inputs), one)


def test_a_group_is_smaller_than_its_layers_where_routers_are_shared() -> None:
    family = FAMILIES["llama"]
    counts = [len(prw.weave(family.build(), config(family, s)).pools) for s in ("module", "parent")]
    # per block: q, k, v, o of one width; gate and up of one width, down of another
    assert counts == [2 * 7, 2 * (1 + 2)]


def decoder(name: str, share: str = "module") -> tuple[nn.Module, prw.Weave]:
    """A decoder in fp64 whose two experts differ and whose routers choose both."""
    family = FAMILIES[name]
    model = family.build().double().eval()
    weave = prw.weave(model, config(family, share, granularity="sample"))
    for stage in ("one", "two"):
        weave.unlock(stage)
        for parameter in weave.parameters():
            nn.init.normal_(parameter, std=0.5)
    weave.close()
    return model, weave


PROMPT = torch.tensor([[30, 30, 7, 1, 9], [2, 8, 4, 11, 3]])
KEPT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def logits_of_generation(model: Any, **fields: Any) -> tuple[Tensor, Tensor]:
    result = model.generate(
        input_ids=PROMPT,
        attention_mask=KEPT,
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **fields,
    )
    return result.sequences, torch.stack(result.logits, 1)


def full_forward(model: nn.Module, sequences: Tensor) -> Tensor:
    """Logits of the whole sequences, with the positions that generate() gives padded prompts."""
    kept = torch.nn.functional.pad(KEPT, (0, sequences.shape[1] - KEPT.shape[1]), value=1)
    positions = (kept.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(sequences, attention_mask=kept, position_ids=positions, use_cache=False).logits


def assert_same_logits(generated: Tensor, full: Tensor) -> None:
    # fp64, but norms compute in fp32 and generate() rounds to it: a few units of 1.2e-7 per block,
    # on values of around 1
    torch.testing.assert_close(generated, full[:, 4:-1].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share", ["module", "parent"])
@pytest.mark.parametrize("name", DECODERS)
def test_generation_with_a_cache_is_the_full_forward(name: str, share: str) -> None:
    model, weave = decoder(name, share)
    mask = KEPT.bool()
    weave.call(mask=mask)
    sequences, cached = logits_of_generation(model)
    _, uncached = logits_of_generation(model, use_cache=False)
    weave.call(mask=torch.nn.functional.pad(mask, (0, 6)))
    with weave.record(mask=torch.nn.functional.pad(mask, (0, 6))) as routing:
        full = full_forward(model, sequences)
    chosen = {int(e) for group in routing.by_group().values() for e in group["expert"]}
    assert chosen == {0, 1}, "the routing is worth testing"
    assert_same_logits(cached, full)
    assert_same_logits(uncached, full)
    with weave.force_route("one"):
        forced = full_forward(model, sequences)
    assert (forced - full).abs().max() > 1e-3, "the routing matters"


def test_generation_at_a_stage_and_with_a_forced_route() -> None:
    model, weave = decoder("llama")
    with weave.at_stage("one"):
        weave.call(mask=KEPT.bool())
        sequences, cached = logits_of_generation(model)
        assert_same_logits(cached, full_forward(model, sequences))
    with weave.force_route("two"):
        sequences, cached = logits_of_generation(model)
        assert_same_logits(cached, full_forward(model, sequences))


def test_beams_repeat_the_mask() -> None:
    model, weave = decoder("llama")
    weave.call(mask=KEPT.bool().repeat_interleave(3, 0))
    found = model.generate(
        input_ids=PROMPT, attention_mask=KEPT, num_beams=3, max_new_tokens=4, min_new_tokens=4
    )
    again = model.generate(
        input_ids=PROMPT,
        attention_mask=KEPT,
        num_beams=3,
        max_new_tokens=4,
        min_new_tokens=4,
        use_cache=False,
    )
    assert torch.equal(found, again)


def test_a_kept_routing_is_never_stale() -> None:
    model, weave = decoder("llama")
    mask, step = KEPT.bool(), {"input_ids": torch.tensor([[5], [6]])}
    with torch.no_grad():
        weave.call(mask=mask)
        cache = model(PROMPT, use_cache=True).past_key_values
        model(**step, past_key_values=cache)
        other = model(PROMPT.flip(0), use_cache=True).past_key_values
        with pytest.raises(prw.ConfigError, match="did not see the prompt of the given past_key"):
            model(**step, past_key_values=cache)
        model(**step, past_key_values=other)
        weave.call(mask=mask)
        with pytest.raises(prw.ConfigError, match="did not see the prompt"):
            model(**step, past_key_values=other)
        with pytest.raises(prw.ConfigError, match=r"\[2, 5\].*given tokens \[2, 1\]"):
            model(**step)
        half = model(PROMPT, use_cache=True).past_key_values
        half.crop(-2)
        with pytest.raises(prw.ConfigError, match="holds 3 tokens.*a prompt of 5"):
            model(**step, past_key_values=half)
        cache = model(PROMPT, use_cache=True).past_key_values
        with pytest.raises(prw.ConfigError, match="1 samples, its prompt had 2"):
            cache.batch_select_indices(torch.tensor([1]))
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        cache = model(PROMPT, use_cache=True).past_key_values
        weave.unlock("three")
        with pytest.raises(prw.StageError, match="the stages changed since the prompt"):
            model(**step, past_key_values=cache)
        cache = model(PROMPT, use_cache=True).past_key_values
    with pytest.raises(prw.ConfigError, match=r"torch.no_grad\(\)"):
        model(**step, past_key_values=cache)


def test_a_prompt_is_counted_once_and_leaves_no_graph() -> None:
    model, weave = decoder("llama")
    with weave.record(mask=KEPT.bool()) as routing:
        logits_of_generation(model)
    assert all(len(group["expert"]) == 2 for group in routing.by_group().values())
    weave.unlock("three")
    weave.call(mask=KEPT.bool())
    model(PROMPT, use_cache=True)
    clone = copy.deepcopy(model)
    assert torch.equal(clone(PROMPT).logits, model(PROMPT).logits)
    weave.unload()
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_what_cannot_be_routed_per_sample_is_refused() -> None:
    head = prw.Config(target_modules=["lm_head"], granularity="sample")
    with pytest.raises(prw.ConfigError, match="output head 'lm_head' of a decoder"):
        prw.weave(FAMILIES["llama"].build(), head)
    model = FAMILIES["t5"].build()
    with pytest.raises(prw.ConfigError, match=r"cannot adapt 'decoder\.block\.0.*the encoder only"):
        prw.weave(model, prw.Config(target_modules=["q"], rank=2, granularity="sample"))


def test_the_encoder_of_a_sequence_model_is_routed_per_sample() -> None:
    model = FAMILIES["t5"].build().eval()
    fields: Any = {"target_modules": r"encoder\..*\.(q|v)", "rank": 2, "granularity": "sample"}
    weave = prw.weave(model, prw.Config(**fields))
    weave.unlock("one")
    weave.call(mask=torch.ones_like(TOKENS).bool())
    assert model.generate(input_ids=TOKENS, max_new_tokens=3).shape[0] == 2


def test_a_pooler_sees_samples() -> None:
    family = FAMILIES["bert"]
    model = family.build().eval()
    weave = prw.weave(model, config(family, "module", granularity="sample"))
    weave.unlock("one")
    with weave.record(mask=torch.ones_like(TOKENS).bool()) as routing:
        model(TOKENS)
    assert routing.by_group()["pooler.dense"]["expert"].shape == (2,)


class Wrapped(nn.Module):
    """A decoder inside a module of one's own, beside a layer that is no part of it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.before = nn.Linear(16, 16).double()
        self.inner = inner

    def forward(self, **given: Any) -> Any:
        return self.inner(**given)


def steps(decoder: nn.Module, sequences: Tensor, start: int) -> Tensor:
    """Hidden states after a prompt of `start` tokens, then one token at a time from the cache."""
    with torch.no_grad():
        out = decoder(input_ids=sequences[:, :start], use_cache=True)
        found = [out.last_hidden_state]
        for index in range(start, sequences.shape[1]):
            out = decoder(
                input_ids=sequences[:, index : index + 1],
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            found.append(out.last_hidden_state)
    return torch.cat(found, 1)


@pytest.mark.parametrize("where", ["bare", "inside"])
def test_a_decoder_is_found_wherever_it_is(where: str) -> None:
    torch.manual_seed(0)
    body = FAMILIES["llama"].build().double().eval().model
    model = Wrapped(body) if where == "inside" else body
    targets = ["q_proj", "v_proj", *(["before"] if where == "inside" else [])]
    weave = prw.weave(model, prw.Config(target_modules=targets, rank=2, granularity="sample"))
    for stage in ("one", "two"):
        weave.unlock(stage)
        for parameter in weave.parameters():
            nn.init.normal_(parameter, std=0.5)
    weave.close()
    sequences = torch.cat([PROMPT, PROMPT.flip(1)], 1)
    with pytest.raises(prw.ConfigError, match="give the prompt's tokens as mask="):
        body(input_ids=sequences)
    prompt = torch.ones_like(PROMPT).bool()
    weave.call(mask=prompt)
    cached = steps(body, sequences, PROMPT.shape[1])
    weave.call(mask=torch.nn.functional.pad(prompt, (0, PROMPT.shape[1])))
    with torch.no_grad():
        full = body(input_ids=sequences, use_cache=False).last_hidden_state
    torch.testing.assert_close(cached, full, rtol=1e-5, atol=1e-5)
    assert not weave.pools[next(iter(weave.pools))].prompted == (where == "inside")
    weave.unload()
    assert not body._forward_hooks


def test_two_decoders_are_not_followed_at_once() -> None:
    model = nn.ModuleDict({"a": FAMILIES["llama"].build(), "b": FAMILIES["gpt2"].build()})
    fields: Any = {"rank": 2, "granularity": "sample"}
    with pytest.raises(prw.ConfigError, match="of one decoder, but 'a.*' and 'b.*' are in two"):
        prw.weave(model, prw.Config(target_modules=["q_proj", "c_attn"], **fields))
    assert prw.weave(model, prw.Config(target_modules=["c_attn"], **fields)).pools
