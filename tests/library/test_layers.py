"""Layers that are linear without being `nn.Linear`, and ways of a model to go round its layers."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prw
from prw.linear import RoutedLinear, is_linear, linear_size, plain_weight


def weave(model: nn.Module, targets: Any, **fields: Any) -> prw.Weave:
    return prw.weave(model, prw.Config(target_modules=targets, rank=2, **fields))


def shake(woven: prw.Weave) -> None:
    """Give the open stage's expert and the routers something to say."""
    for parameter in woven.parameters():
        nn.init.normal_(parameter)


class ForeignLinear(nn.Module):
    """As a quantisation library has them: packed, and no relative of nn.Linear."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.register_buffer("codes", (base.weight.detach() * 100).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.codes.to(x.dtype) / 100).T


class PairLinear(ForeignLinear):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) + y


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # torch's own layer, see below
def test_which_layers_are_linear() -> None:
    from transformers.pytorch_utils import Conv1D

    assert linear_size(nn.Linear(3, 5)) == (3, 5)
    assert linear_size(Conv1D(5, 3)) == (3, 5)
    assert linear_size(ForeignLinear(nn.Linear(3, 5))) == (3, 5)
    quantised = torch.ao.nn.quantized.dynamic.Linear(3, 5)
    for other in (PairLinear(nn.Linear(3, 5)), nn.Bilinear(2, 3, 4), nn.Conv1d(3, 5, 1), quantised):
        assert not is_linear(other), other
    assert plain_weight(ForeignLinear(nn.Linear(3, 5))) is None


@pytest.mark.parametrize("shape", [(7, 6), (2, 7, 6), (2, 3, 7, 6)], ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv1d", "foreign"])
def test_each_kind_adds_the_residual(kind: str, shape: tuple[int, ...]) -> None:
    from transformers.pytorch_utils import Conv1D

    layer: nn.Module = {
        "linear": lambda: nn.Linear(6, 5),
        "conv1d": lambda: Conv1D(5, 6),
        "foreign": lambda: ForeignLinear(nn.Linear(6, 5)),
    }[kind]()
    model = nn.ModuleDict({"layer": layer})
    x = torch.randn(shape)
    base = layer(x)
    woven = weave(model, ["layer"])
    woven.unlock("one")
    shake(woven)
    A_RD, B_OR = woven.pools["layer"].expert(0).pair("layer")
    torch.testing.assert_close(model["layer"](x), base + x @ A_RD.T @ B_OR.T * 2)


@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_strides_change_nothing(granularity: str) -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    woven = weave(model, ["0"], granularity=granularity)
    for stage in ("one", "two"):
        woven.unlock(stage)
        shake(woven)
    plain = torch.randn(2, 3, 4, 6)
    strided = plain.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not strided.is_contiguous()
    torch.testing.assert_close(model(strided), model(plain))
    expanded = plain[:, :1].expand(2, 3, 4, 6)
    torch.testing.assert_close(model(expanded), model(expanded.contiguous()))


def test_strided_inputs_have_the_same_bits_when_the_expert_is_a_veteran() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    woven = weave(model, ["0"])
    woven.unlock("one")
    shake(woven)
    x = torch.randn(2, 16, 3, 5).permute(0, 2, 3, 1)
    with torch.no_grad():
        learning = model(x)
        woven.close()
        assert torch.equal(model(x), learning)


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_bitsandbytes_weights(kind: str, tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    options = {"Linear4bit": {"quant_type": "nf4"}, "Linear8bitLt": {"has_fp16_weights": False}}
    plain = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    model = nn.Sequential(
        getattr(bnb.nn, kind)(64, 64, **options[kind]),
        nn.Tanh(),
        getattr(bnb.nn, kind)(64, 64, **options[kind]),
    )
    model.load_state_dict(plain.state_dict())
    model = model.to("cpu")  # in training mode: on a CPU its inference kernels give no gradient
    x = torch.randn(3, 5, 64)
    base = model(x)
    assert not torch.equal(base, plain(x)), "the weights are quantised"

    woven = weave(model, "all-linear", noise=False)
    woven.unlock("one")
    assert torch.equal(model(x), base)
    shake(woven)
    x.requires_grad_()
    model(x).square().mean().backward()
    assert x.grad is not None and all(p.grad is not None for p in woven.parameters())
    learners = {id(p) for p in woven.parameters()}
    assert {id(p) for p in model.parameters() if p.grad is not None} == learners

    now = model(x)
    woven.save(tmp_path / "weave")
    woven.unload()
    assert torch.equal(model(x), base)
    prw.load(model, tmp_path / "weave")
    assert torch.equal(model(x), now)


def test_torchao_int8_weights(tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 64)).eval()
    plain = copy.deepcopy(model)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    x = torch.randn(3, 5, 64)
    base = model(x)
    before = {name: id(module) for name, module in model.named_modules()}

    woven = weave(model, "all-linear", noise=False)
    woven.unlock("one")
    assert torch.equal(model(x), base)
    assert {p.dtype for p in woven.parameters()} == {torch.float32}
    shake(woven)
    x.requires_grad_()
    model(x).square().mean().backward()
    assert x.grad is not None and all(p.grad is not None for p in woven.parameters())
    learners = {id(p) for p in woven.parameters()}
    assert {id(p) for p in model.parameters() if p.grad is not None} == learners

    # the gradients are those of a float model with the same, dequantised weights
    layers = [(model[i].base, plain[i]) for i in (0, 2)]
    for quantised, layer in layers:
        layer.weight.data = quantised.weight.dequantize()
    twin = weave(plain, "all-linear", noise=False)
    woven.save(tmp_path / "weave")
    twin.load_state(tmp_path / "weave")
    plain(x.detach()).square().mean().backward()
    for ours, theirs in zip(woven.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)

    now = model(x)
    woven.unload()
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert torch.equal(model(x), base)
    prw.load(model, tmp_path / "weave")
    assert torch.equal(model(x), now)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


def test_adapting_a_tied_head_leaves_the_embedding(tmp_path: Path) -> None:
    model, ids = Tied(), torch.arange(4)[None]
    embedded, base = model.embed(ids), model(ids)
    woven = weave(model, ["head"])
    woven.unlock("one")
    shake(woven)
    model(ids).sum().backward()
    assert model.embed.weight.grad is None
    assert torch.equal(model.embed(ids), embedded) and not torch.equal(model(ids), base)
    now = model(ids)
    woven.save(tmp_path / "weave")
    woven.unload()
    assert model.head.weight is model.embed.weight
    prw.load(model, tmp_path / "weave")
    assert torch.equal(model(ids), now)


def test_tying_again_ties_the_base() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, **special)
    model = GPT2LMHeadModel(config)
    woven = weave(model, ["lm_head", "c_attn"])
    model.transformer.wte.weight = nn.Parameter(torch.randn(20, 8))
    model.tie_weights()
    assert isinstance(model.lm_head, RoutedLinear)
    assert model.lm_head.weight is model.transformer.wte.weight
    woven.unload()
    assert model.lm_head.weight is model.transformer.wte.weight


def test_two_names_in_one_parent() -> None:
    model = nn.Module()
    model.first = nn.Linear(4, 4)
    model.second = model.first
    woven = weave(model, ["first"])
    assert model.first is model.second and isinstance(model.first, RoutedLinear)
    woven.unload()
    assert model.first is model.second and isinstance(model.first, nn.Linear)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # the base uses them
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_the_fast_path_of_torchs_encoder_does_not_skip_experts(padded: bool, grad: bool) -> None:
    assert torch.backends.mha.get_fastpath_enabled()
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2)).eval()
    encoder = model[0]
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    x = torch.randn(2, 5, 8)

    def run() -> Tensor:
        return encoder(x, src_key_padding_mask=mask)[~mask if padded else ...]

    with torch.set_grad_enabled(grad):
        base = run()
        woven = weave(model, "all-linear")
        assert set(woven.pools) == {f"0.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)}
        woven.unlock("one")
        # the fast path of the base rounds otherwise; layer norm keeps values around 1
        torch.testing.assert_close(run(), base, rtol=1e-5, atol=1e-5)
        shake(woven)
        assert (run() - base).abs().max() > 0.1
        woven.unload()
        assert encoder.use_nested_tensor
        assert torch.equal(run(), base)


def test_a_single_encoder_layer_too() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        base = layer(x)
        woven = weave(layer, ["linear2"])
        woven.unlock("one")
        shake(woven)
        assert (layer(x) - base).abs().max() > 0.1
        woven.unload()
        assert torch.equal(layer(x), base)


def test_all_linear_says_what_it_leaves_out(caplog: pytest.LogCaptureFixture) -> None:
    class WithHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 9)
            self.attention = nn.MultiheadAttention(4, 2)
            self.wrapped = ForeignLinear(nn.Linear(4, 4))
            self.wrapped.inner = nn.Linear(4, 4)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    with caplog.at_level(logging.INFO, logger="prw"):
        woven = weave(WithHead(), "all-linear")
    assert set(woven.pools) == {"body", "wrapped"}
    assert "leaves out 'head', 'attention.out_proj'" in caplog.text


def test_lazy_layers_are_refused() -> None:
    with pytest.raises(prw.ConfigError, match="no weights yet; run the model once"):
        weave(nn.Sequential(nn.LazyLinear(4)), ["0"])


def test_what_hooks_into_a_base_layer_still_sees_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6))
    woven = weave(model, ["0"])
    woven.unlock("one")
    shake(woven)
    x, seen = torch.randn(3, 6), []
    plain = model(x)
    handle = model[0].base.register_forward_hook(lambda layer, given, y: seen.append(y) or 2 * y)
    hooked = model(x)
    handle.remove()
    base = model[0].base(x)
    assert len(seen) == 1 and torch.equal(seen[0], base)
    torch.testing.assert_close(hooked - plain, base)
    model[0].base.forward = lambda x: x  # as accelerate's offloading replaces it
    torch.testing.assert_close(model(x) - x, plain - base)
