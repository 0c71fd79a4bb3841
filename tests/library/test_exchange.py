"""Experts leave as LoRAs that stock tools open, and LoRAs of other tools join as experts."""

from __future__ import annotations

import json
import logging
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import prw
from prw import exchange, lora_styles

X = torch.linspace(-2, 2, 3 * 5 * 8).sin().reshape(3, 5, 8)
TARGETS = {"block.to_k": 6, "block.to_v": 6, "out": 8}
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


class Block(nn.Module):
    """Two projections of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.to_k = nn.Linear(8, 6)
        self.to_v = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.to_k(x)) * self.to_v(x)


class Net(nn.Module):
    """A block, and a layer of another width and another depth of name."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.out = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.block(x))


def base() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def woven(*names: str, **fields: Any) -> tuple[Net, prw.Weave]:
    """A model whose experts and routers are random; every stage is closed."""
    net = base()
    fields = {"target_modules": ["to_k", "to_v", "out"], "rank": 2, "backend": "reference"} | fields
    weave = prw.weave(net, prw.Config(**fields))
    for name in names:
        weave.unlock(name)
        for parameter in weave.parameters():
            nn.init.normal_(parameter)
    weave.close()
    return net, weave


def state(weave: prw.Weave) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, pool in weave.pools.items():
        found |= {f"{name}.{n}": t.detach().clone() for n, t in pool.named_parameters()}
        found |= {f"{name}.{n}": t.clone() for n, t in pool.named_buffers()}
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        t.dtype == other[n].dtype and torch.equal(t, other[n]) for n, t in one.items()
    )


def draw(ranks: dict[str, int], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Random factors of some targets."""
    width = {"block.to_k": 8, "block.to_v": 8, "out": 6}
    return {
        t: (torch.randn(r, width[t]).to(dtype), torch.randn(TARGETS[t], r).to(dtype))
        for t, r in ranks.items()
    }


def peft_file(pairs: dict[str, Any], **_: Any) -> dict[str, Tensor]:
    named = {}
    for target, (A, B) in pairs.items():
        named[f"base_model.model.{target}.lora_A.weight"] = A
        named[f"base_model.model.{target}.lora_B.weight"] = B
    return named


def diffusers_file(pairs: dict[str, Any], alphas: dict[str, float]) -> dict[str, Tensor]:
    named = {}
    for target, (A, B) in pairs.items():
        named[f"transformer.{target}.lora_A.weight"] = A
        named[f"transformer.{target}.lora_B.weight"] = B
        named[f"transformer.{target}.alpha"] = torch.tensor(alphas[target])
    return named


def old_diffusers_file(pairs: dict[str, Any], alphas: dict[str, float]) -> dict[str, Tensor]:
    named = {}
    for target, (A, B) in pairs.items():
        named[f"unet.{target}.lora.down.weight"] = A
        named[f"unet.{target}.lora.up.weight"] = B
        named[f"unet.{target}.alpha"] = torch.tensor(alphas[target])
    return named


def kohya_file(pairs: dict[str, Any], alphas: dict[str, float]) -> dict[str, Tensor]:
    named = {}
    for target, (A, B) in pairs.items():
        layer = "lora_unet_" + target.replace(".", "_")
        named[f"{layer}.lora_down.weight"] = A
        named[f"{layer}.lora_up.weight"] = B
        named[f"{layer}.alpha"] = torch.tensor(alphas[target])
    return named


STYLES: dict[str, Callable[..., dict[str, Tensor]]] = {
    "peft": peft_file,
    "diffusers": diffusers_file,
    "old diffusers": old_diffusers_file,
    "kohya": kohya_file,
}


def write(path: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """A LoRA folder, or a file when the path ends so."""
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path)
        return path
    path.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, path / WEIGHTS)
    (path / SETTINGS).write_text(json.dumps({"peft_type": "LORA", **config}))
    return path


def by_hand(pairs: dict[str, Any], scaling: dict[str, float]) -> Tensor:
    """The base with these residuals, written out."""
    net = base()

    def layer(linear: nn.Linear, target: str, x: Tensor) -> Tensor:
        if target not in pairs:
            return linear(x)
        A, B = (factor.float() for factor in pairs[target])
        return linear(x) + nn.functional.linear(nn.functional.linear(x, A), B) * scaling[target]

    k = layer(net.block.to_k, "block.to_k", X)
    h = torch.tanh(k) * layer(net.block.to_v, "block.to_v", X)
    return layer(net.out, "out", h)


@settings(max_examples=20)
@given(
    st.sampled_from(sorted(STYLES)),
    st.dictionaries(st.sampled_from(sorted(TARGETS)), st.integers(1, 4), min_size=1),
    st.lists(st.sampled_from([1.0, 2.0, 3.0, 0.5, 12.0]), min_size=3, max_size=3),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.booleans(),
    st.integers(0, 2),
)
def test_every_style_joins_and_leaves_with_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory,
    style: str,
    ranks: dict[str, int],
    values: list[float],
    dtype: torch.dtype,
    rslora: bool,
    stages: int,
) -> None:
    tmp_path = tmp_path_factory.mktemp("style")
    pairs = draw(ranks, dtype)
    alphas = dict(zip(TARGETS, values, strict=True))
    tensors = STYLES[style](pairs, alphas=alphas)
    scaling = {t: alphas[t] / r for t, r in ranks.items()}
    if style == "peft":
        scaling = {t: alphas[t] / math.sqrt(r) for t, r in ranks.items()} if rslora else scaling
        patterns = {"rank_pattern": ranks, "alpha_pattern": alphas}
        file = write(tmp_path / "in", tensors, r=7, lora_alpha=5, use_rslora=rslora, **patterns)
    else:
        file = write(tmp_path / "in.safetensors", tensors)
    net, weave = woven(*[f"s{i}" for i in range(stages)])
    weave.import_expert(file, "style")
    with weave.force_route("style"):
        # one rounding of alpha: rsLoRA's alpha / sqrt(r) is kept as alpha' / r
        torch.testing.assert_close(net(X), by_hand(pairs, scaling), rtol=1e-6, atol=1e-6)
    weave.call(noisy=False)
    assert net(X).isfinite().all(), "experts of several dtypes route together"
    weave.export_expert("style", tmp_path / "out")
    written = safetensors.torch.load_file(tmp_path / "out" / WEIGHTS)
    assert same(written, peft_file(pairs))
    _, other = woven()
    other.import_expert(tmp_path / "out", "again")
    other.export_expert("again", tmp_path / "out2")
    assert (tmp_path / "out2" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()
    assert (tmp_path / "out2" / SETTINGS).read_text() == (tmp_path / "out" / SETTINGS).read_text()


@given(st.floats(1e-3, 1e3), st.integers(1, 512))
def test_rank_stabilised_scaling_is_kept_to_the_last_bit_or_so(alpha: float, rank: int) -> None:
    rule = lora_styles.alpha_rule({"r": rank, "lora_alpha": alpha, "use_rslora": True}, "it")
    wanted = alpha / math.sqrt(rank)
    assert rule(["a"], rank) / rank == pytest.approx(wanted, rel=2**-52, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", [{}, {"granularity": "sample", "share_router": "parent"}])
def test_stock_peft_computes_the_forced_route(
    tmp_path: Path, fields: dict[str, Any], dtype: torch.dtype
) -> None:
    peft = pytest.importorskip("peft")
    net, weave = woven("one", "two", **fields)
    weave.import_expert(write(tmp_path / "in.safetensors", kohya(3)), "three")
    for module in net.modules():
        if type(module) is nn.Linear:
            module.to(dtype)
    x = X.to(dtype)
    for name in ("one", "two", "three"):
        weave.export_expert(name, tmp_path / name)
        stock = peft.PeftModel.from_pretrained(base().to(dtype), tmp_path / name)
        with weave.force_route(name):
            assert torch.equal(stock(x), net(x))


class Layers(nn.Module):
    """Names that end alike, and one that reads like another as an expression."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.inner = nn.ModuleDict({"out": nn.Linear(8, 8), "layersX0": nn.Linear(8, 8)})
        self.add_module("0", nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers, *self.inner.values(), self.get_submodule("0"), self.out):
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize(
    "targets", [r"0|out", r"layers\.(0|2)", r"layers\.0|out", r"inner\.out", r"inner\.out|out"]
)
def test_stock_peft_adapts_the_woven_layers_and_no_other(tmp_path: Path, targets: str) -> None:
    peft = pytest.importorskip("peft")

    def fresh() -> Layers:
        torch.manual_seed(0)
        return Layers().eval()

    net = fresh()
    weave = prw.weave(net, prw.Config(target_modules=targets, rank=2, backend="reference"))
    weave.unlock("one")
    for parameter in weave.parameters():
        nn.init.normal_(parameter)
    weave.export_expert("one", tmp_path / "out")
    weave.save(tmp_path / "weave")
    for folder in (tmp_path / "out", tmp_path / "weave" / "experts" / "0-one"):
        stock = peft.PeftModel.from_pretrained(fresh(), folder)
        adapted = {
            name.removeprefix("base_model.model.").removesuffix(".lora_A")
            for name, _ in stock.named_modules()
            if name.endswith(".lora_A")
        }
        assert adapted == set(weave.pools)
        with weave.force_route("one"):
            assert torch.equal(stock(X), net(X))


def kohya(rank: int) -> dict[str, Tensor]:
    pairs = draw({"block.to_k": rank, "out": rank + 1}, torch.bfloat16)
    return kohya_file(pairs, {"block.to_k": 1.5, "out": 7.0})


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks
def test_a_peft_lora_of_a_llama_joins_and_leaves(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=64, num_hidden_layers=2, num_key_value_heads=2, **sizes
    )

    def llama() -> Any:
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval()

    lora = peft.LoraConfig(
        target_modules=["q_proj", "down_proj"],
        r=3,
        lora_alpha=5,
        use_rslora=True,
        rank_pattern={r"layers\.1\..*": 5},
        alpha_pattern={"down_proj": 9},
    )
    stock = peft.get_peft_model(llama(), lora)
    for name, parameter in stock.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    stock.save_pretrained(tmp_path / "in")
    model = llama()
    targets = ["q_proj", "v_proj", "down_proj"]
    weave = prw.weave(model, prw.Config(target_modules=targets, rank=4, backend="reference"))
    weave.unlock("one")
    weave.close()
    weave.import_expert(tmp_path / "in", "style")
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad(), weave.force_route("style"):
        forced = model(tokens).logits
        assert torch.equal(forced, stock(tokens).logits)
    weave.export_expert("style", tmp_path / "out")
    before, after = (
        safetensors.torch.load_file(tmp_path / place / WEIGHTS) for place in ("in", "out")
    )
    assert same(before, after)
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, forced)


def flux() -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    ).eval()


def flux_output(model: Any) -> Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        output: Tensor = model(
            hidden_states=torch.randn(2, 4, 4),
            encoder_hidden_states=torch.randn(2, 3, 8),
            pooled_projections=torch.randn(2, 8),
            timestep=torch.tensor([0.3, 0.7]),
            img_ids=torch.randn(4, 3),
            txt_ids=torch.zeros(3, 3),
            return_dict=False,
        )[0]
    return output


def test_loras_of_diffusers_and_kohya_for_flux(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    stock = flux()
    lora = peft.LoraConfig(
        target_modules=["to_k", "to_v"], r=3, lora_alpha=5, alpha_pattern={"to_v": 2}
    )
    stock.add_adapter(lora)
    for name, parameter in stock.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    stock.save_lora_adapter(tmp_path / "bare")
    wanted = flux_output(stock)
    plain = safetensors.torch.load_file(tmp_path / "bare/pytorch_lora_weights.safetensors")
    with safetensors.safe_open(
        tmp_path / "bare/pytorch_lora_weights.safetensors", framework="pt"
    ) as opened:
        packed = json.loads(opened.metadata()["lora_adapter_metadata"])
    # as FluxPipeline.save_lora_weights writes it
    (tmp_path / "pipe").mkdir()
    safetensors.torch.save_file(
        {f"transformer.{name}": tensor for name, tensor in plain.items()},
        tmp_path / "pipe/pytorch_lora_weights.safetensors",
        {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in packed.items()})},
    )
    flat = {}
    for name, tensor in plain.items():
        layer, side = name.removesuffix(".weight").rsplit(".", 1)
        layer = "lora_transformer_" + layer.replace(".", "_")
        flat[f"{layer}.{'lora_down' if side == 'lora_A' else 'lora_up'}.weight"] = tensor
        flat[f"{layer}.alpha"] = torch.tensor(2.0 if "to_v" in name else 5.0)
    write(tmp_path / "kohya.safetensors", flat)
    model = flux()
    config = prw.Config(target_modules=["to_k", "to_v"], rank=4, backend="reference")
    weave = prw.weave(model, config)
    for name in ("bare", "pipe", "kohya.safetensors"):
        weave.import_expert(tmp_path / name, name)
        with weave.force_route(name):
            assert torch.equal(flux_output(model), wanted), name
    weave.export_expert("pipe", tmp_path / "out")
    written = safetensors.torch.load_file(tmp_path / "out" / WEIGHTS)
    assert same(written, {f"base_model.model.{name}": tensor for name, tensor in plain.items()})


def test_an_import_is_a_closed_stage_that_leaves_earlier_ones_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    net, weave = woven("one", "two")
    before = {}
    for name in ("one", "two"):
        with weave.at_stage(name):
            before[name] = net(X)
    old = state(weave)
    with caplog.at_level(logging.WARNING, "prw"):
        weave.import_expert(write(tmp_path / "in.safetensors", kohya(3)), "style")
    assert "block.to_v" in caplog.text and "zero" in caplog.text
    assert [(s.name, s.open) for s in weave.stages][2:] == [("style", False)]
    assert weave.newest is None and not list(weave.parameters())
    now = state(weave)
    assert same(old, {name: now[name] for name in old})
    for pool in weave.pools.values():
        signal, noise = pool.columns.state()
        assert not signal[2].any() and not noise[2].any()
    for name, wanted in before.items():
        with weave.at_stage(name):
            assert torch.equal(net(X), wanted)
    weave.call(noisy=False)
    free = net(X)
    with weave.at_stage("style"):
        assert torch.equal(net(X), free)
    weave.unlock("four")
    columns = [n for n, _ in weave.named_parameters() if "columns.signal.2" in n]
    assert len(columns) == 3, "the router learns about it in the next stage"
    assert not any(".experts.2." in n for n, _ in weave.named_parameters())
    for parameter in weave.parameters():
        nn.init.normal_(parameter)
    with weave.at_stage("style"):
        assert torch.equal(net(X), free)
    weave.save(tmp_path / "run")
    twin = base()
    loaded = prw.load(twin, tmp_path / "run")
    assert same(state(loaded), state(weave))
    with loaded.force_route("style"), weave.force_route("style"):
        assert torch.equal(twin(X), net(X))
    weave.rollback("two")
    assert same(state(weave), old)
    weave.import_expert(tmp_path / "in.safetensors", "style")
    assert same(state(weave), now)


def test_the_first_expert_of_all_may_be_an_import(tmp_path: Path) -> None:
    net, weave = woven()
    weave.import_expert(write(tmp_path / "in.safetensors", kohya(2)), "style")
    weave.call(noisy=False)
    free = net(X)
    with weave.force_route("style"):
        assert torch.equal(net(X), free), "one expert has gate 1"


def test_layers_that_are_zero_stay_out_of_an_export(tmp_path: Path) -> None:
    net, weave = woven("one")
    weave.import_expert(write(tmp_path / "in.safetensors", kohya(2)), "style")
    weave.export_expert("style", tmp_path / "out")
    written = json.loads((tmp_path / "out" / SETTINGS).read_text())
    assert written["target_modules"] == r"block\.to_k|out"
    weave.unlock("fresh")
    weave.export_expert("fresh", tmp_path / "fresh")
    assert len(safetensors.torch.load_file(tmp_path / "fresh" / WEIGHTS)) == 6
    for pool in weave.pools.values():
        for parameter in pool.expert(2).parameters():
            nn.init.zeros_(parameter)
    weave.export_expert("fresh", tmp_path / "fresh")
    assert len(safetensors.torch.load_file(tmp_path / "fresh" / WEIGHTS)) == 6


def test_only_an_experts_folder_is_overwritten(tmp_path: Path) -> None:
    _, weave = woven("one", "two")
    weave.export_expert("one", tmp_path / "out")
    weave.export_expert("two", tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [SETTINGS, WEIGHTS]
    (tmp_path / "empty").mkdir()
    weave.export_expert("one", tmp_path / "empty")
    weave.export_expert("one", tmp_path / "new/deep")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.txt").write_text("mine")
    for place in ("photos", "photos/a.txt"):
        with pytest.raises(prw.CheckpointError, match="exists and is not an expert's folder"):
            weave.export_expert("one", tmp_path / place)
    os.mknod(tmp_path / "socket", stat.S_IFSOCK | 0o600)
    with pytest.raises(prw.CheckpointError, match="exists and is not an expert's folder"):
        weave.export_expert("one", tmp_path / "socket")
    assert (tmp_path / "socket").is_socket()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    weave.export_expert("one", tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and not list(tmp_path.glob(".*"))
    (tmp_path / "out/README.md").write_text("mine")
    with pytest.raises(prw.CheckpointError, match=r"'README.md' beside an expert"):
        weave.export_expert("one", tmp_path / "out")
    assert (tmp_path / "photos/a.txt").read_text() == "mine"
    with pytest.raises(prw.StageError, match="no stage 'thre'"):
        weave.export_expert("thre", tmp_path / "three")
    assert not (tmp_path / "three").exists()


def test_a_failed_export_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, weave = woven("one", "two")
    weave.export_expert("one", tmp_path / "out")
    before = (tmp_path / "out" / WEIGHTS).read_bytes()

    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exchange.lora_format, "settings", full)
    with pytest.raises(prw.CheckpointError, match="nothing changed.*No space left"):
        weave.export_expert("two", tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def good(**changes: Any) -> Callable[[Path], Path]:
    """A PEFT folder with other settings."""
    fields = {"r": 2, "lora_alpha": 4} | changes
    return lambda path: write(path / "in", peft_file(draw({"out": 2})), **fields)


def tensors(**named: Tensor) -> Callable[[Path], Path]:
    """A file of a good LoRA with further tensors."""

    def make(path: Path) -> Path:
        return write(path / "in.safetensors", {**peft_file(draw({"out": 2})), **named})

    return make


def only(**named: Tensor) -> Callable[[Path], Path]:
    return lambda path: write(path / "in.safetensors", named)


def raw(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        (path / name).write_bytes(content)
        return path / name

    return make


def damaged(text: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        folder = good()(path)
        (folder / SETTINGS).write_text(text)
        return folder

    return make


def linked(name: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        folder = good()(path)
        (folder / name).rename(path / "outside")
        (folder / name).symlink_to(path / "outside")
        return folder

    return make


def two_files(path: Path) -> Path:
    for name in ("a", "b"):
        write(path / "in", peft_file(draw({"out": 2})))
        (path / "in" / WEIGHTS).rename(path / "in" / f"{name}.safetensors")
    return path / "in"


ONE = torch.ones(1)
OUT = "base_model.model.out"
A, B = torch.randn(2, 6), torch.randn(8, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "gone", "there is no file or folder"),
        (raw("in.bin", b""), "no .safetensors file, and nothing else is read"),
        (raw("in.safetensors", b"12345678"), "cannot be read"),
        (lambda path: path, "should hold one .safetensors file, it holds none"),
        (two_files, "several, 'a.safetensors' and 'b.safetensors'; name one"),
        (linked(WEIGHTS), "leads out of its folder"),
        (linked(SETTINGS), "leads out of its folder"),
        (damaged("{"), "adapter_config.json is damaged"),
        (damaged("[" * 100_000), "adapter_config.json is damaged: maximum recursion"),
        (damaged("[]"), "it is not a JSON object"),
        (damaged("{}"), "damaged settings: KeyError"),
        (good(alpha_pattern={"(": 1}), "damaged settings"),
        (good(r=3), "'out' has rank 2, but by its settings it should be 3"),
        (good(rank_pattern={"out": 3}), "has rank 2, but by its settings it should be 3"),
        (good(peft_type="LOHA"), "is a LOHA adapter"),
        (good(use_dora=True), "is DoRA"),
        (good(bias="lora_only"), r"LoRA with biases \(bias='lora_only'\)"),
        (good(lora_bias=True), "LoRA with biases"),
        (good(modules_to_save=["head"]), "modules_to_save"),
        (good(init_lora_weights="pissa_niter_4"), "'pissa_niter_4', which changes the base"),
        (good(alora_invocation_tokens=[1]), "activated LoRA"),
        (tensors(**{"out.lora_magnitude_vector": ONE}), "is DoRA"),
        (tensors(**{"lora_unet_out.dora_scale": ONE}), "is DoRA"),
        (tensors(**{"lora_unet_out.hada_w1_a": ONE}), "is LoHa"),
        (tensors(**{"lora_unet_out.lokr_w1": ONE}), "is LoKr"),
        (tensors(**{f"{OUT}.lora_B.bias": ONE}), "LoRA with biases"),
        (tensors(**{"base_model.model.head.weight": ONE}), "whole weights"),
        (tensors(**{"lora_unet_out.lora_mid.weight": ONE}), "LoRA of convolutions"),
        (tensors(**{"x.lora_embedding_A": ONE}), "LoRA of an embedding"),
        (good(lora_alpha=math.nan), "the alpha of 'base_model.model.out' is nan"),
        (tensors(**{f"{OUT}.alpha": ONE / 0}), "the alpha of 'base_model.model.out' is inf"),
        (tensors(surprise=ONE), r"no plain LoRA \('surprise'\)"),
        (tensors(**{"x.alpha": ONE}), "an alpha but no factors of 'x'"),
        (tensors(**{f"{OUT}.lora_A.other.weight": A}), "several adapters"),
        (tensors(**{"out.lora_A.weight": A, "out.lora_B.weight": B}), "changes 'out' twice"),
        (
            tensors(**{"block.to_q.lora_A.weight": A, "block.to_q.lora_B.weight": B}),
            "layers that this weave does not adapt, block.to_q; name them in target_modules",
        ),
        (only(**{"out.lora_A.weight": A}), r"lacks the factor B \(up\) of 'out'"),
        (only(), "holds no LoRA"),
        (
            only(**{"out.lora_A.weight": A[..., None, None], "out.lora_B.weight": B}),
            r"LoRA of convolutions: 'out.lora_A.weight' is \[2, 6, 1, 1\]",
        ),
        (
            only(**{"out.lora_A.weight": A[:, :5].contiguous(), "out.lora_B.weight": B}),
            r"factors of 'out' are \[2, 5\] and \[8, 2\], but 'out' needs \[2, 6\] and \[8, 2\]",
        ),
        (
            only(**{"out.lora_A.weight": A / 0, "out.lora_B.weight": B}),
            "'out.lora_A.weight' holds values that are not finite",
        ),
        (
            only(**{"out.lora_A.weight": A.to(torch.int8), "out.lora_B.weight": B}),
            "is torch.int8; convert it",
        ),
    ],
)
def test_what_cannot_join_is_named_and_changes_nothing(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    _, weave = woven("one")
    before, stages = state(weave), weave.stages
    with pytest.raises(prw.CheckpointError, match=message) as caught:
        weave.import_expert(make(tmp_path), "style")
    assert "\n" not in str(caught.value)
    assert weave.stages == stages and same(state(weave), before)


def test_an_import_that_fails_in_the_middle_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, weave = woven("one")
    before, stages = state(weave), weave.stages
    file = write(tmp_path / "in.safetensors", kohya(2))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(exchange.Lora, "fill", interrupted)
        weave.import_expert(file, "style")
    assert weave.stages == stages and same(state(weave), before)
    weave.import_expert(file, "style")


def test_names_that_lost_their_dots_may_be_ambiguous(tmp_path: Path) -> None:
    net = nn.ModuleDict({"a_b": nn.Linear(2, 2), "a": nn.ModuleDict({"b": nn.Linear(2, 2)})})
    weave = prw.weave(net, prw.Config(target_modules=["a_b", "a.b"], rank=1))
    named = {"lora_unet_a_b.lora_down.weight": torch.ones(1, 2)}
    named["lora_unet_a_b.lora_up.weight"] = torch.ones(2, 1)
    file = write(tmp_path / "in.safetensors", named)
    with pytest.raises(prw.CheckpointError, match=r"may be 'a_b' or 'a\.b'"):
        weave.import_expert(file, "style")


def test_the_part_of_another_model_is_refused(tmp_path: Path) -> None:
    packed = {"transformer.r": 2, "text_encoder.r": 2}
    safetensors.torch.save_file(
        peft_file(draw({"out": 2})),
        tmp_path / "in.safetensors",
        {"lora_adapter_metadata": json.dumps(packed)},
    )
    _, weave = woven()
    with pytest.raises(prw.CheckpointError, match="several models, text_encoder, transformer"):
        weave.import_expert(tmp_path / "in.safetensors", "style")


def test_names_and_open_stages_are_checked_first(tmp_path: Path) -> None:
    file = write(tmp_path / "in.safetensors", kohya(2))
    _, weave = woven("one")
    with pytest.raises(prw.StageError, match="exists already"):
        weave.import_expert(file, "one")
    with pytest.raises(prw.StageError, match="cannot name a stage"):
        weave.import_expert(file, "a/b")
    weave.unlock("two")
    with pytest.raises(
        prw.StageError, match="'two' is open; close it before an expert is imported"
    ):
        weave.import_expert(file, "style")
    assert weave.newest == "two"


def test_kohya_alphas_that_are_absent_or_zero_mean_the_rank(tmp_path: Path) -> None:
    pairs = draw({"block.to_k": 2, "out": 3})
    named = kohya_file(pairs, {"block.to_k": 0.0, "out": 1.0})
    del named["lora_unet_out.alpha"]
    net, weave = woven()
    weave.import_expert(write(tmp_path / "in.safetensors", named), "style")
    with weave.force_route("style"):
        assert torch.equal(net(X), by_hand(pairs, {"block.to_k": 1.0, "out": 1.0}))


def test_a_lora_of_a_base_in_double_precision(tmp_path: Path) -> None:
    net = base().double()
    config = prw.Config(target_modules=["out"], rank=2, backend="reference")
    weave = prw.weave(net, config)
    weave.import_expert(write(tmp_path / "in.safetensors", peft_file(draw({"out": 2}))), "style")
    with weave.force_route("style"):
        assert net(X.double()).dtype == torch.float64
