"""PRW beside what diffusers does about memory: offloading, fp8 storage, quantised bases.

A CPU is a device like any other to the hooks that offload, so that their order is tested here; that
weights really change places is tested on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch.testing import assert_close

from prw_flux import CoLoGenPipeline, PRWAdapter, attach
from prw_flux.fit import require_device

EXACT = {"rtol": 0.0, "atol": 0.0}


def sequentially(pipe: Any, device: torch.device) -> None:
    """`enable_sequential_cpu_offload`, which writes "cpu:0" where accelerate needs "cpu"."""
    if device.type != "cpu":
        pipe.enable_sequential_cpu_offload(device=device)
        return
    for name, model in pipe.components.items():
        if isinstance(model, torch.nn.Module) and name not in pipe._exclude_from_cpu_offload:
            accelerate.cpu_offload(model, device)


OFFLOADS: dict[str, Callable[[Any, torch.device], None]] = {
    "model": lambda pipe, device: pipe.enable_model_cpu_offload(device=device),
    "sequential": sequentially,
    "group by block": lambda pipe, device: pipe.enable_group_offload(
        device, offload_type="block_level", num_blocks_per_group=1
    ),
    "group by leaf": lambda pipe, device: pipe.enable_group_offload(
        device, offload_type="leaf_level"
    ),
}
MODES = [{}, {"source_timestep": "current"}]


@pytest.mark.parametrize("mode", MODES, ids=["zero", "current"])
@pytest.mark.parametrize("kind", OFFLOADS)
def test_offloading_changes_no_bit(
    make_bare_pipe: Any, edited: Any, kind: str, mode: dict[str, str]
) -> None:
    pipe = make_bare_pipe(**mode)
    wanted = edited(pipe)
    assert not torch.equal(wanted, edited(pipe, image=None, task=None, source_pooled_embeds=None))
    OFFLOADS[kind](pipe, torch.device("cpu"))
    if kind == "sequential":
        assert {p.device.type for p in pipe.transformer.parameters()} == {"meta"}
    for _ in range(2):  # the hooks of model offloading are installed anew after each call
        assert_close(edited(pipe), wanted, **EXACT)
    assert {p.device.type for p in pipe.prw.parameters()} == {"cpu"}


def test_an_adapter_joins_an_offloaded_transformer(
    make_bare_pipe: Any, make_adapter: Any, edited: Any
) -> None:
    """Made, attached and used after offloading: it lands where the transformer computes."""
    pipe = make_bare_pipe()
    wanted = edited(pipe)
    sequentially(pipe, torch.device("cpu"))
    late = make_adapter(pipe.transformer)
    assert late.device == torch.device("cpu")
    late.load_state_dict(pipe.prw.state_dict())
    assert_close(edited(CoLoGenPipeline.from_pipe(pipe, prw=late)), wanted, **EXACT)


def test_an_adapter_on_another_device_is_refused(make_bare_pipe: Any, edited: Any) -> None:
    pipe = make_bare_pipe()
    pipe.prw.to("meta")
    with pytest.raises(ValueError, match=r"this adapter are on the meta device .* leave it out"):
        edited(pipe)


@torch.no_grad()
def test_the_device_where_a_transformer_computes_counts(
    make_transformer: Any, make_adapter: Any
) -> None:
    """A transformer at rest on a CPU may compute elsewhere; the sentence names that place."""
    transformer = make_transformer()
    adapter = make_adapter(transformer)
    attach(transformer, adapter)
    require_device(adapter, transformer)
    accelerate.cpu_offload(transformer, torch.device("meta"))
    with pytest.raises(ValueError, match=r"adapter is on cpu, .* on meta: call adapter.to\('meta"):
        require_device(adapter, transformer)


def test_fp8_storage_of_the_base_leaves_experts_wide(make_bare_pipe: Any, edited: Any) -> None:
    """The same as a base that was rounded to fp8 and back; the adapter is not touched."""
    pipe = make_bare_pipe()
    wide = edited(pipe)
    for model in (pipe.transformer, pipe.prw):
        model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert pipe.transformer.single_transformer_blocks[0].attn.to_k.weight.itemsize == 1
    rounded = make_bare_pipe()
    for ours, stored in zip(
        rounded.transformer.parameters(), pipe.transformer.parameters(), strict=True
    ):
        ours.data = stored.data.float()
    assert {p.dtype for p in pipe.prw.parameters()} == {torch.float32}
    found = edited(pipe)
    assert_close(found, edited(rounded), **EXACT)
    assert not torch.equal(found, wide)


# Quantised bases ------------------------------------------------------------------------------


def through_diffusers(kind: str, folder: Path) -> Any:
    """A FLUX.1 as users load it: diffusers' quantiser of this kind."""
    import diffusers

    if kind == "torchao int8":
        pytest.importorskip("torchao")
        from torchao.quantization import Int8WeightOnlyConfig

        config = diffusers.TorchAoConfig(Int8WeightOnlyConfig())
    else:
        pytest.importorskip("bitsandbytes")
        config = diffusers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    transformer = diffusers.FluxTransformer2DModel.from_pretrained(
        folder, quantization_config=config, torch_dtype=torch.float32
    )
    return transformer.eval()


def by_hand(kind: str, folder: Path) -> Any:
    """Layers of bitsandbytes in place of every linear one: diffusers' quantiser wants a GPU."""
    bnb = pytest.importorskip("bitsandbytes")
    from diffusers import FluxTransformer2DModel

    transformer = FluxTransformer2DModel.from_pretrained(folder).eval()
    found = [(n, m) for n, m in transformer.named_modules() if type(m) is torch.nn.Linear]
    for name, layer in found:
        small = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, compute_dtype=torch.float32, quant_type="nf4"
        )
        small.load_state_dict(layer.state_dict())
        parent, _, child = name.rpartition(".")
        setattr(transformer.get_submodule(parent), child, small.to("cpu"))
    return transformer


QUANTISED = [
    pytest.param("torchao int8", through_diffusers, "cpu", id="torchao int8"),
    pytest.param("bitsandbytes nf4", by_hand, "cpu", id="bitsandbytes nf4"),
    pytest.param(
        "torchao int8", through_diffusers, "cuda", id="torchao int8 cuda", marks=pytest.mark.gpu
    ),
    pytest.param(
        "bitsandbytes nf4", through_diffusers, "cuda", id="bnb nf4 cuda", marks=pytest.mark.gpu
    ),
]


@pytest.mark.parametrize(("kind", "load", "device"), QUANTISED)
@pytest.mark.filterwarnings("ignore")  # of the quantising libraries
def test_a_quantised_base(
    make_bare_pipe: Any, edited: Any, tmp_path: Path, kind: str, load: Any, device: str
) -> None:
    """Experts of the wide base act in the quantised one, which is close to it."""
    wide = make_bare_pipe()
    wide.transformer.save_pretrained(tmp_path / "base")
    wide.prw.save_pretrained(tmp_path / "adapter")
    transformer = load(kind, tmp_path / "base")
    assert type(transformer.transformer_blocks[0].attn.to_k.weight) is not torch.nn.Parameter
    pipe = make_bare_pipe(transformer)
    pipe.prw = PRWAdapter.from_pretrained(tmp_path / "adapter")
    attach(transformer, pipe.prw)
    pipe.to(device)
    wanted, found = edited(wide), edited(pipe).cpu()
    plain = edited(wide, image=None, task=None, source_pooled_embeds=None)
    error = (found - wanted).norm() / wanted.norm()
    bare = edited(pipe, image=None, task=None, source_pooled_embeds=None).cpu()
    moved, shift = wanted - plain, found - bare
    assert 0.0 < error < (0.02 if "int8" in kind else 0.3), error
    # what the source and its experts add is the same thing, up to the rounding of the base
    assert torch.cosine_similarity(moved.flatten(), shift.flatten(), dim=0) > 0.8


# On a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("stream", [False, True])
def test_streams_prefetch_only_the_base(make_bare_pipe: Any, edited: Any, stream: bool) -> None:
    pipe = make_bare_pipe()
    wanted = edited(pipe)
    pipe.enable_group_offload(
        torch.device("cuda"), offload_type="leaf_level", use_stream=stream, non_blocking=stream
    )
    assert pipe.prw.device.type == "cuda"
    assert {p.device.type for p in pipe.transformer.parameters()} == {"cpu"}
    # a GPU sums in another order: 1e-4 of values near 1 over three steps
    assert_close(edited(pipe).cpu(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_offloading_from_a_gpu(make_bare_pipe: Any, edited: Any, kind: str) -> None:
    pipe = make_bare_pipe()
    wanted = edited(pipe)
    OFFLOADS[kind](pipe, torch.device("cuda"))
    for _ in range(2):
        assert_close(edited(pipe).cpu(), wanted, rtol=1e-3, atol=1e-3)
        assert pipe.prw.device.type == "cuda"
        assert {p.device.type for p in pipe.transformer.parameters()} <= {"cpu", "meta"}
    pipe.prw.to("cpu")
    with pytest.raises(ValueError, match=r"adapter is on cpu, .* call adapter.to\('cuda"):
        edited(pipe)
