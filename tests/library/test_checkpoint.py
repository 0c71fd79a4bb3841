"""The folder on disk: bitwise, verified, all or nothing, and open to stock tools."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import prw
from prw import atomic, checkpoint

X = torch.linspace(-2, 2, 3 * 5 * 8).sin().reshape(3, 5, 8)


def base(seed: int = 0, width: int = 8) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 8))


def trained(*names: str, **fields: Any) -> tuple[nn.Module, prw.Weave]:
    """A woven model whose last stage is open."""
    model = base()
    weave = prw.weave(model, prw.Config(target_modules=["0", "2"], rank=2, **fields))
    for name in names:
        weave.unlock(name)
        for parameter in weave.parameters():
            nn.init.normal_(parameter)
    return model, weave


def state(weave: prw.Weave) -> dict[str, Tensor]:
    """Every tensor of the pools, snapshots included."""
    found: dict[str, Tensor] = {}
    for name, pool in weave.pools.items():
        found |= {f"{name}.{n}": t.detach() for n, t in pool.named_parameters()}
        found |= {f"{name}.{n}": t for n, t in pool.named_buffers()}
    return found


def files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_save_and_load_keep_every_bit(
    tmp_path: Path, closed: bool, noise: bool, granularity: str
) -> None:
    model, weave = trained("one", "two", noise=noise, granularity=granularity)
    if closed:
        weave.close()
    weave.save(tmp_path / "run")
    twin = base()
    generator = torch.get_rng_state()
    loaded = prw.load(twin, tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), generator), "loading draws nothing"
    assert loaded.stages == weave.stages and loaded.config == weave.config
    assert torch.equal(twin(X), model(X))
    with weave.at_stage("one"), loaded.at_stage("one"):
        assert torch.equal(twin(X), model(X))
    ours, theirs = state(weave), state(loaded)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], t) and ours[n].dtype == t.dtype for n, t in theirs.items())
    learning = [name for name, _ in loaded.named_parameters()]
    assert learning == [name for name, _ in weave.named_parameters()]
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    loaded.save(tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "run")


def test_an_older_stage_loads_into_a_weave_that_has_grown(tmp_path: Path) -> None:
    model, weave = trained("one")
    weave.close()
    weave.save(tmp_path / "one")
    wanted = model(X)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))])
    weave.unlock("two")
    weave.sync(optimizer)
    weave.unlock("three")
    weave.load_state(tmp_path / "one")
    assert torch.equal(model(X), wanted)
    assert [stage.name for stage in weave.stages] == ["one"]
    weave.unlock("other")
    weave.sync(optimizer)
    assert len(optimizer.param_groups[0]["params"]) == 1 + len(list(weave.parameters()))


def test_dtypes_are_kept(tmp_path: Path) -> None:
    _, weave = trained("one")
    for pool in weave.pools.values():
        pool.expert(0).bfloat16()
    weave.save(tmp_path / "run")
    loaded = prw.load(base(), tmp_path / "run")
    kinds = {n.split(".")[1]: p.dtype for n, p in loaded.named_parameters()}
    assert kinds == {"experts": torch.bfloat16, "columns": torch.float32}


def test_the_layout_and_the_extra_files(tmp_path: Path) -> None:
    _, weave = trained("one", "two")
    weave.save(tmp_path / "run", extra={"config.json": "{}"})
    wanted = {"prw.json", "router.safetensors", "config.json"}
    for place in ("experts/0-one", "experts/1-two"):
        wanted |= {f"{place}/adapter_model.safetensors", f"{place}/adapter_config.json"}
    assert set(files(tmp_path / "run")) == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    index = json.loads((tmp_path / "run/prw.json").read_text())
    assert set(index["sha256"]) == wanted - {"prw.json", "config.json"}
    for name in ("../x", "prw.json", "a/b", "experts"):
        with pytest.raises(prw.CheckpointError, match="cannot name a file"):
            weave.save(tmp_path / "run", extra={name: ""})


def test_stock_peft_opens_an_expert_and_computes_the_forced_route(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, weave = trained("one", "two")
    weave.close()
    weave.save(tmp_path / "run")
    stock = peft.PeftModel.from_pretrained(base(), tmp_path / "run/experts/0-one")
    with weave.force_route("one"):
        assert torch.equal(stock(X), model(X))


def test_saving_again_replaces_the_folder_in_one_step(tmp_path: Path) -> None:
    _, weave = trained("one")
    weave.save(tmp_path / "run")
    weave.unlock("two")
    weave.save(tmp_path / "run")
    assert prw.load(base(), tmp_path / "run").stages == weave.stages
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_failed_save_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    _, weave = trained("one")
    weave.save(tmp_path / "run")
    before = files(tmp_path / "run")
    weave.unlock("two")
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(prw.CheckpointError, match="No space left"):
        patch.setattr(checkpoint, "_sha256", full)
        weave.save(tmp_path / "run")
    assert files(tmp_path / "run") == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    weave.save(tmp_path / "run")
    assert len(prw.load(base(), tmp_path / "run").stages) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_crash_between_two_renames_is_put_right(tmp_path: Path) -> None:
    _, weave = trained("one")
    weave.save(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / ".run.previous")
    assert prw.load(base(), tmp_path / "run").stages == weave.stages
    (tmp_path / "run").rename(tmp_path / ".run.previous")
    weave.save(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_device_is_not_replaced_by_a_folder(tmp_path: Path) -> None:
    """/dev/null is neither file nor folder, and exchanging two names would move it."""
    _, weave = trained("one")
    os.mkfifo(tmp_path / "device")
    with pytest.raises(
        prw.CheckpointError, match="exists and is not a weave; choose another folder"
    ):
        weave.save(tmp_path / "device")
    assert (tmp_path / "device").is_fifo() and len(list(tmp_path.iterdir())) == 1


def test_other_folders_are_not_overwritten(tmp_path: Path) -> None:
    _, weave = trained("one")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.txt").write_text("mine")
    for place in ("photos", "photos/a.txt"):
        with pytest.raises(prw.CheckpointError, match="exists and is not a weave"):
            weave.save(tmp_path / place)
    assert (tmp_path / "photos/a.txt").read_text() == "mine"
    os.mknod(tmp_path / "socket", stat.S_IFSOCK | 0o600)  # no file and no folder
    with pytest.raises(prw.CheckpointError, match="exists and is not a weave"):
        weave.save(tmp_path / "socket")
    assert (tmp_path / "socket").is_socket()
    (tmp_path / "empty").mkdir()
    weave.save(tmp_path / "empty")
    weave.save(tmp_path / "new/deep/run")


WEIGHTS = "experts/0-one/adapter_model.safetensors"


def edit(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "prw.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-7])


def flip(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[-1] ^= 1
        (folder / name).write_bytes(data)

    return change


def link_out(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        outside = folder.parent / "outside"
        shutil.move(folder / name, outside)
        (folder / name).symlink_to(outside)

    return change


def rewrite(name: str, **tensors: Tensor) -> Callable[[Path], None]:
    """Another tensor file with a hash that fits: what a careful forger would do."""

    def change(folder: Path) -> None:
        safetensors.torch.save_file(tensors, folder / name)
        index = json.loads((folder / "prw.json").read_text())
        index["sha256"][name] = checkpoint._sha256(folder / name)
        (folder / "prw.json").write_text(json.dumps(index))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "there is no folder"),
        (lambda folder: (folder / "prw.json").unlink(), "holds no prw.json; it is not a weave"),
        (lambda folder: (folder / "prw.json").write_text("{"), "prw.json is damaged"),
        (lambda folder: (folder / "prw.json").write_text("[]"), "not a JSON object"),
        (lambda folder: (folder / "prw.json").write_bytes(b"\xff\xfe\xfd"), "is damaged"),
        (lambda folder: (folder / "prw.json").write_text("[" * 100_000), "is damaged"),
        (edit(fingerprint={"samples": ["x"]}), "is damaged: could not convert string to float"),
        (edit(schema_version=99), "schema version 99.*install a newer prw"),
        (edit(schema_version=None), "no schema version"),
        (edit(stages=[{"name": "../../x", "open": False}]), "cannot name a stage"),
        (edit(stages=[{"open": False}]), "it lacks 'name'"),
        (edit(stages=3), "prw.json is damaged"),
        (edit(config={"rank": 2}), "schema_version must be"),
        (lambda folder: (folder / WEIGHTS).unlink(), "the expert 'one' is missing"),
        (cut(WEIGHTS), "the expert 'one' was changed or truncated"),
        (flip(WEIGHTS), "the expert 'one' was changed or truncated"),
        (flip("experts/0-one/adapter_config.json"), "the expert 'one' was changed"),
        (lambda folder: (folder / "router.safetensors").unlink(), "the router is missing"),
        (cut("router.safetensors"), "the router was changed or truncated"),
        (link_out(WEIGHTS), "leads out of its folder"),
        (link_out("prw.json"), "leads out of its folder"),
        (rewrite(WEIGHTS, a=torch.zeros(1)), "holds no tensor 'base_model.model.0.lora_A"),
        (rewrite("router.safetensors", a=torch.zeros(1)), "holds no tensor 'live/0/signal'"),
        (
            rewrite(
                WEIGHTS,
                **{
                    f"base_model.model.{n}.lora_{f}.weight": torch.zeros(3, 8)
                    for n in "02"
                    for f in "AB"
                },
            ),
            r"lora_B.weight' is torch.float32 \[3, 8\], but the layer needs floats \[8, 3\]",
        ),
    ],
)
def test_damage_is_named_and_changes_nothing(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    model, weave = trained("one")
    weave.close()
    weave.save(tmp_path / "run")
    weave.unlock("two")
    before, wanted = state(weave), model(X)
    damage(tmp_path / "run")
    fresh = base()
    modules = dict(fresh.named_modules())
    with pytest.raises(prw.CheckpointError, match=message) as caught:
        prw.load(fresh, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert dict(fresh.named_modules()) == modules
    assert all(parameter.requires_grad for parameter in fresh.parameters())
    with pytest.raises(prw.CheckpointError, match=message):
        weave.load_state(tmp_path / "run")
    assert torch.equal(model(X), wanted)
    assert all(torch.equal(before[name], tensor) for name, tensor in state(weave).items())


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_a_folder_may_be_read_by_whom_the_umask_lets(tmp_path: Path, umask: int, mode: int) -> None:
    _, weave = trained("one")
    before = os.umask(umask)
    try:
        weave.save(tmp_path / "run")
        weave.export_expert("one", tmp_path / "lora")
    finally:
        os.umask(before)
    found = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {file.stat().st_mode & 0o777 for file in found} == {mode} and len(found) == 6


@pytest.mark.parametrize("name", ["prw.json", WEIGHTS])
def test_a_file_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    _, weave = trained("one")
    weave.save(tmp_path / "run")
    opened = Path.open

    def deny(path: Path, *args: Any, **options: Any) -> Any:
        if path == tmp_path / "run" / name:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", deny)
    with pytest.raises(prw.CheckpointError, match=f"{name} cannot be read: .*Permission denied"):
        prw.load(base(), tmp_path / "run")


@pytest.mark.parametrize("index", ["[" * 100_000, '{"extra": 3}', "{", "[]"])
def test_a_damaged_weave_is_replaced_by_a_save(tmp_path: Path, index: str) -> None:
    _, weave = trained("one")
    weave.save(tmp_path / "run")
    (tmp_path / "run/prw.json").write_text(index)
    weave.save(tmp_path / "run")
    assert prw.load(base(), tmp_path / "run").stages == weave.stages


def test_another_base_is_an_error_and_other_weights_are_a_warning(tmp_path: Path) -> None:
    _, weave = trained("one")
    weave.save(tmp_path / "run")
    with pytest.raises(prw.CheckpointError, match=r'modules is \[\["0", \[8, 8\]\]'):
        prw.load(base(width=9), tmp_path / "run")
    with pytest.raises(prw.CheckpointError, match="does not fit this model: target '2'"):
        prw.load(nn.Sequential(nn.Linear(8, 8)), tmp_path / "run")
    with pytest.raises(prw.CheckpointError, match='class is "Sequential"'):
        prw.load(nn.ModuleList(base().children()), tmp_path / "run")
    with pytest.warns(UserWarning, match=r"weights of this base differ by 1\d\d"):
        prw.load(base(seed=1), tmp_path / "run")
    prw.load(base().bfloat16(), tmp_path / "run")


def test_the_configuration_of_a_model_is_part_of_its_fingerprint(tmp_path: Path) -> None:
    def model(layers: int, dtype: str) -> nn.Module:
        net = base()
        net.config = {"layers": layers, "dtype": dtype, "_name_or_path": dtype}  # type: ignore[assignment]
        return net

    weave = prw.weave(model(2, "a"), prw.Config(target_modules=["0"], rank=2))
    weave.unlock("one")
    weave.save(tmp_path / "run")
    prw.load(model(2, "b"), tmp_path / "run")
    with pytest.raises(prw.CheckpointError, match=r'config is \{"layers": 2\}.*\{"layers": 3\}'):
        prw.load(model(3, "a"), tmp_path / "run")


def test_another_kind_of_routing_is_an_error(tmp_path: Path) -> None:
    _, weave = trained("one")
    weave.save(tmp_path / "run")
    _, other = trained("one", granularity="sample")
    with pytest.raises(prw.CheckpointError, match="granularity='token', this weave 'sample'"):
        other.load_state(tmp_path / "run")


def test_links_into_a_hub_cache_are_followed(tmp_path: Path) -> None:
    _, weave = trained("one")
    weave.save(tmp_path / "run")
    blobs, snapshot = tmp_path / "model/blobs", tmp_path / "model/snapshots/abc"
    blobs.mkdir(parents=True)
    for index, name in enumerate(files(tmp_path / "run")):
        shutil.move(tmp_path / "run" / name, blobs / str(index))
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blobs / str(index))
    assert prw.load(base(), snapshot).stages == weave.stages


def test_a_save_loses_nothing_that_no_save_wrote(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    weave = prw.weave(model, prw.Config(target_modules=["0"], rank=1))
    weave.unlock("a")
    weave.save(tmp_path / "run", extra={"notes.json": "{}"})
    weave.save(tmp_path / "run")  # what the save before wrote may go
    assert not (tmp_path / "run" / "notes.json").exists()
    (tmp_path / "run" / "diary.txt").write_text("mine")
    before = (tmp_path / "run" / "prw.json").read_bytes()
    with pytest.raises(prw.CheckpointError, match="'diary.txt' beside the weave, which would be"):
        weave.save(tmp_path / "run")
    assert (tmp_path / "run" / "diary.txt").read_text() == "mine"
    assert (tmp_path / "run" / "prw.json").read_bytes() == before
    (tmp_path / "run" / "diary.txt").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    weave.save(tmp_path / "link")  # a link stays one, and what it leads to is replaced
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "run" / "prw.json").is_file()


def test_a_replaced_file_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    """safetensors 0.8 writes 0600, whatever the umask says."""
    plain = tmp_path / "plain"
    plain.touch()
    with atomic.replace_file(tmp_path / "x.safetensors") as new:
        safetensors.torch.save_file({"x": torch.zeros(1)}, new)
    found = (tmp_path / "x.safetensors").stat().st_mode
    assert found == plain.stat().st_mode
