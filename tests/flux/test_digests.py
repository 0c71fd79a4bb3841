"""What a cache remembers of adapter and base: equal when they are, in any process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prw_flux import PRWAdapter
from prw_flux.coredi import CoReDi, CoReDiConfig
from prw_flux.digests import adapter_digest, base_digest, stream_digest, tensor_digest


def test_tensors(make_transformer: Any) -> None:
    x = torch.randn(2, 3)
    assert tensor_digest(x) == tensor_digest(x.double()) == tensor_digest(x.t().contiguous().t())
    assert tensor_digest(x) != tensor_digest(x.reshape(3, 2))
    assert tensor_digest(x) != tensor_digest(x.neg())


def test_an_adapter_is_known_again(
    make_transformer: Any, make_adapter: Any, tmp_path: Path
) -> None:
    adapter = make_adapter(make_transformer())
    first = adapter_digest(adapter)
    adapter.save_pretrained(tmp_path / "adapter")
    assert adapter_digest(PRWAdapter.from_pretrained(tmp_path / "adapter")) == first
    assert adapter_digest(make_adapter(make_transformer(), stages=1)) != first
    assert adapter_digest(make_adapter(make_transformer(), source_timestep="current")) != first
    assert adapter_digest(make_adapter(make_transformer(), gate="one")) != first
    with torch.no_grad():
        adapter.pools[2].expert(0).pair("to_k")[0][0, 0] += 1.0
    assert adapter_digest(adapter) != first
    with torch.no_grad():
        adapter.pools[2].expert(0).pair("to_k")[0][0, 0] -= 1.0
    other = adapter_digest(adapter)
    adapter.weave.rename("stage0", "first")
    assert adapter_digest(adapter) != other


def test_a_base_is_known_again(make_transformer: Any, make_base: Any) -> None:
    pipe = make_base()
    first = base_digest(pipe.transformer, pipe.vae)
    again = make_base()
    assert base_digest(again.transformer, again.vae) == first
    with torch.no_grad():
        again.transformer.single_transformer_blocks[1].proj_out.weight.mul_(1.5)
    assert base_digest(again.transformer, again.vae) != first
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.neg_()
    assert base_digest(pipe.transformer, pipe.vae) != first


def test_a_base_on_meta_is_equal_to_itself_alone(make_transformer: Any, make_base: Any) -> None:
    one, two = make_transformer().to("meta"), make_transformer().to("meta")
    vae = make_base().vae
    assert base_digest(one, vae) == base_digest(one, vae) != base_digest(two, vae)


def test_a_lora_makes_another_base(make_base: Any) -> None:
    peft = pytest.importorskip("peft")
    pipe = make_base()
    first = base_digest(pipe.transformer, pipe.vae)
    lora = peft.LoraConfig(r=2, target_modules=["to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(lora, "style")
    with_lora = base_digest(pipe.transformer, pipe.vae)
    pipe.transformer.set_adapters("style", 0.5)
    weaker = base_digest(pipe.transformer, pipe.vae)
    pipe.transformer.disable_adapters()
    off = base_digest(pipe.transformer, pipe.vae)
    assert len({first, with_lora, weaker, off}) == 4
    pipe.transformer.enable_adapters()
    assert base_digest(pipe.transformer, pipe.vae) == weaker


def test_a_feature_stream_is_known_again(tmp_path: Path) -> None:
    stream = CoReDi(CoReDiConfig(enabled=True, channels=4), 10, 32)
    first = stream_digest(stream)
    stream.save(tmp_path / "coredi")
    assert stream_digest(CoReDi.load(tmp_path / "coredi")) == first
    stream.close_stage("inpaint")
    closed = stream_digest(stream)
    with torch.no_grad():
        next(stream.parameters()).add_(1.0)
    assert len({first, closed, stream_digest(stream)}) == 3
