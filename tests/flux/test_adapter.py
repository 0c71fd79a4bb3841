"""PRWAdapter: its fit, its file, its routes; attach and detach."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch.testing import assert_close

import prw
from prw_flux import PRWAdapter, attach, attached, detach
from prw_flux.attach import processors
from prw_flux.fit import require_layers
from prw_flux.processor import PRWFluxAttnProcessor
from prw_flux.source_cache import SourceCache

EXACT = {"rtol": 0.0, "atol": 0.0}


def test_one_pool_per_block_in_running_order(make_transformer: Any, make_adapter: Any) -> None:
    adapter = make_adapter(make_transformer(), stages=1)
    assert [pool.name for pool in adapter.pools] == [
        "transformer_blocks.0.attn",
        "single_transformer_blocks.0.attn",
        "single_transformer_blocks.1.attn",
    ]
    assert all(pool.projections == {"to_k": 32, "to_v": 32} for pool in adapter.pools)


def test_the_transformer_stays_stock(make_transformer: Any, make_adapter: Any) -> None:
    transformer = make_transformer()
    names = list(transformer.state_dict())
    assert attached(transformer) is None
    adapter = make_adapter(transformer)
    attach(transformer, adapter)
    assert attached(transformer) is adapter
    assert list(transformer.state_dict()) == names
    detach(transformer)
    assert attached(transformer) is None
    assert all(type(p) is FluxAttnProcessor for p in processors(transformer))
    detach(transformer)


def test_the_attention_backend_carries_over(make_transformer: Any, make_adapter: Any) -> None:
    transformer = make_transformer()
    for processor in processors(transformer):
        processor._attention_backend = "native"
    attach(transformer, make_adapter(transformer))
    assert {p._attention_backend for p in processors(transformer)} == {"native"}
    detach(transformer)
    assert {p._attention_backend for p in processors(transformer)} == {"native"}


def test_a_second_adapter_replaces_the_first(make_transformer: Any, make_adapter: Any) -> None:
    transformer = make_transformer()
    first, second = make_adapter(transformer), make_adapter(transformer)
    attach(transformer, first)
    attach(transformer, second)
    assert attached(transformer) is second


def test_lost_processors_are_noticed(make_transformer: Any, make_adapter: Any) -> None:
    transformer = make_transformer()
    attach(transformer, make_adapter(transformer))
    transformer.transformer_blocks[0].attn.set_processor(FluxAttnProcessor())
    with pytest.raises(ValueError, match="Only 2 of 3 attention processors"):
        attached(transformer)
    with pytest.raises(ValueError, match=r"detach\(\) first"):
        PRWFluxAttnProcessor()


def test_foreign_processors_are_not_replaced(make_transformer: Any, make_adapter: Any) -> None:
    class Foreign(FluxAttnProcessor):
        pass

    transformer = make_transformer()
    transformer.single_transformer_blocks[0].attn.set_processor(Foreign())
    with pytest.raises(ValueError, match="processors of Foreign"):
        attach(transformer, make_adapter(transformer))


def test_shapes_must_fit(make_transformer: Any) -> None:
    transformer = make_transformer()
    wider = PRWAdapter(num_layers=1, num_single_layers=2, inner_dim=64, rank=4)
    with pytest.raises(ValueError, match=r"1 \+ 2 blocks of width 64, the transformer has .* 32"):
        attach(transformer, wider)
    by_hand = PRWAdapter(num_layers=1, num_single_layers=2, inner_dim=32, rank=4)
    attach(transformer, by_hand)
    with pytest.raises(ValueError, match="cache of 2 blocks does not fit 3"):
        require_layers(by_hand, SourceCache(2))
    transformer.out_channels = 16
    with pytest.raises(ValueError, match="without channel conditioning"):
        attach(transformer, by_hand)


def test_other_weights_are_reported(
    make_transformer: Any, make_adapter: Any, caplog: pytest.LogCaptureFixture
) -> None:
    transformer = make_transformer()
    adapter = make_adapter(transformer)
    with caplog.at_level(logging.WARNING):
        attach(transformer.to(torch.bfloat16), adapter)
        assert not caplog.messages
        with torch.no_grad():
            for parameter in transformer.parameters():
                parameter.neg_()
        attach(transformer, adapter)
    assert "differ by 200" in caplog.text


@pytest.mark.parametrize("setting", ["source_timestep", "source_pooled"])
def test_settings_are_checked(setting: str) -> None:
    with pytest.raises(ValueError, match=f"{setting} must be one of"):
        PRWAdapter(1, 1, 32, **{setting: "never"})


# Files ----------------------------------------------------------------------------------------


def public(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


@pytest.mark.parametrize("closed", [False, True])
def test_round_trip_is_bitwise(
    make_transformer: Any, make_adapter: Any, make_batch: Any, tmp_path: Path, closed: bool
) -> None:
    adapter = make_adapter(
        make_transformer(), source_timestep="current", source_pooled="empty", alpha=3.0
    )
    if closed:
        adapter.weave.close()
    adapter.save_pretrained(tmp_path / "adapter")
    loaded = PRWAdapter.from_pretrained(tmp_path / "adapter")
    assert public(loaded.config) == public(adapter.config)
    assert loaded.weave.stages == adapter.weave.stages
    assert loaded.weave.fingerprint == adapter.weave.fingerprint
    theirs = dict(loaded.named_parameters()) | dict(loaded.named_buffers())
    ours = dict(adapter.named_parameters()) | dict(adapter.named_buffers())
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        assert_close(theirs[name], tensor, **EXACT, msg=name)


def test_loading_casts_experts_but_not_routers(
    make_transformer: Any, make_adapter: Any, tmp_path: Path
) -> None:
    adapter = make_adapter(make_transformer())
    adapter.save_pretrained(tmp_path)
    loaded = PRWAdapter.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    for pool, original in zip(loaded.pools, adapter.pools, strict=True):
        assert {p.dtype for p in pool.experts.parameters()} == {torch.bfloat16}
        for a, b in zip(pool.columns.parameters(), original.columns.parameters(), strict=True):
            assert_close(a, b, **EXACT)
    wide = loaded.to(torch.float64)
    assert {p.dtype for p in wide.parameters()} == {torch.float64}


def test_a_cast_adapter_runs(make_transformer: Any, make_adapter: Any, make_batch: Any) -> None:
    """bf16 base and experts, fp32 routers: what a pipeline loaded in bf16 does."""
    from prw_flux import TwoPass

    transformer = make_transformer(dtype=torch.bfloat16)
    out = TwoPass(transformer, make_adapter(transformer))(**make_batch(dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


def test_a_missing_or_damaged_folder_says_so(
    make_transformer: Any, make_adapter: Any, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match="There is no folder .*nowhere"):
        PRWAdapter.from_pretrained(tmp_path / "nowhere")
    make_adapter(make_transformer()).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter/config.json"
    whole = file.read_text()
    rank = json.dumps(json.loads(whole) | {"rank": "big"})
    for text, told in (
        (whole[:40], "config.json cannot be read"),
        ("[]", "config.json is damaged: it holds no settings"),
        ("{}", "config.json is damaged"),
        (rank, "config.json is damaged"),
    ):
        file.write_text(text)
        with pytest.raises(prw.CheckpointError, match=told):
            PRWAdapter.from_pretrained(tmp_path / "adapter")
    file.write_text(whole)
    (tmp_path / "adapter/prw.json").write_text("{")
    with pytest.raises(prw.CheckpointError):
        PRWAdapter.from_pretrained(tmp_path / "adapter")


def test_config_json_is_plain(make_transformer: Any, make_adapter: Any, tmp_path: Path) -> None:
    make_adapter(make_transformer()).save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/config.json").read_text())
    assert config["_class_name"] == "PRWAdapter"
    assert config["tasks"]["customise"]["aligned"] is False


# Routes and identity --------------------------------------------------------------------------


def test_routes(make_transformer: Any, make_adapter: Any) -> None:
    adapter = make_adapter(make_transformer())
    assert (adapter.route("free").stage, adapter.route("free").force) == (None, None)
    assert adapter.route("stage:stage0").stage == "stage0"
    assert adapter.route("expert:stage1").force == "stage1"
    for wrong in ("stage", "expert:", "task:edit", ""):
        with pytest.raises(ValueError, match='A route is "free"'):
            adapter.route(wrong)
    with pytest.raises(ValueError, match=r"known: stage0, stage1\."):
        adapter.route("expert:zzz")


def test_the_only_task_needs_no_name(make_transformer: Any, make_adapter: Any) -> None:
    adapter = make_adapter(make_transformer(), tasks=None, trained=["edit"])
    assert adapter.task(None).name == "edit" and adapter.task("ground").name == "ground"
    adapter.note_trained("control")
    with pytest.raises(ValueError, match=r"Choose a task: this adapter knows edit, control\."):
        adapter.task(None)


def test_the_identity_changes_with_every_write(make_transformer: Any, make_adapter: Any) -> None:
    adapter = make_adapter(make_transformer())
    seen = {adapter.state_id}
    assert adapter.state_id in seen
    optimizer = torch.optim.AdamW(adapter.weave.parameters(), lr=0.1)
    for parameter in adapter.weave.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert adapter.state_id not in seen
    seen.add(adapter.state_id)
    adapter.weave.close()
    assert adapter.state_id not in seen
    seen.add(adapter.state_id)
    adapter.weave.unlock("more")
    assert adapter.state_id not in seen
    before = adapter.state_id
    adapter._apply(torch.clone)  # as a move to another device and back
    assert adapter.state_id == before
