"""Sharing a weave: what is uploaded, what is downloaded, what is refused. No network."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file
from torch import Tensor, nn

import prw
from prw import hub
from prw.card import digest, model_card

X = torch.linspace(-2, 2, 5 * 8).sin().reshape(5, 8)
EXAMPLE = """
import torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 4))
x = torch.ones(2, 8)
"""


class Model(nn.Module):
    """One layer with a name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def trained(*names: str) -> tuple[Model, prw.Weave]:
    """A woven model whose stages are closed, and whose first one remembers three rows."""
    model = Model().eval()
    weave = prw.weave(model, prw.Config(target_modules=["layer"], rank=2))
    for name in names:
        weave.unlock(name)
        for parameter in weave.parameters():
            nn.init.normal_(parameter)
    weave.close()
    with weave.remember(names[0], rows=3):
        model(X)
    return model, weave


class Hub:
    """What the Hub would do, in a folder laid out like huggingface_hub's cache."""

    def __init__(self, place: Path) -> None:
        self.repo = place / "models--me--woven"
        self.asked: dict[str, dict[str, Any]] = {}

    @property
    def snapshot(self) -> Path:
        return self.repo / "snapshots" / "abc"

    def create_repo(self, repo_id: str, **asked: Any) -> None:
        self.asked["create"] = {"repo_id": repo_id, **asked}

    def upload_folder(self, *, folder_path: Path, **asked: Any) -> SimpleNamespace:
        self.asked["upload"] = asked
        shutil.rmtree(self.repo, ignore_errors=True)
        for index, file in enumerate(p for p in folder_path.rglob("*") if p.is_file()):
            blob = self.repo / "blobs" / str(index)
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, blob)
            link = self.snapshot / file.relative_to(folder_path)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
        return SimpleNamespace(commit_url="https://huggingface.co/me/woven/commit/abc")

    def snapshot_download(self, repo_id: str, **asked: Any) -> str:
        self.asked["download"] = {"repo_id": repo_id, **asked}
        return str(self.snapshot)


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub(tmp_path / "cache")
    for name in ("create_repo", "upload_folder", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(found, name))
    return found


def test_what_is_pushed_comes_back_bit_for_bit(web: Hub) -> None:
    model, weave = trained("one", "two")
    address = weave.push_to_hub("me/woven", license="mit", private=True, token="t", revision="dev")
    assert address == "https://huggingface.co/me/woven/commit/abc"
    assert web.asked["create"] == {
        "repo_id": "me/woven", "private": True, "exist_ok": True, "token": "t",
    }  # fmt: skip
    assert web.asked["upload"]["revision"] == "dev" and web.asked["upload"]["token"] == "t"
    assert web.asked["upload"]["delete_patterns"] == ["experts/*"], "experts that are gone must go"
    twin = Model().eval()
    loaded = prw.from_pretrained(twin, "me/woven", revision="abc")
    assert web.asked["download"]["revision"] == "abc"
    assert loaded.stages == weave.stages
    assert torch.equal(twin(X), model(X)) and not torch.equal(twin(X), Model()(X))
    with loaded.at_stage("one"), weave.at_stage("one"):
        assert torch.equal(twin(X), model(X))


def test_only_safetensors_and_json_travel(web: Hub) -> None:
    trained("one")[1].push_to_hub("me/woven", license="mit")
    names = {p.relative_to(web.snapshot).as_posix() for p in web.snapshot.rglob("*")}
    files = {name for name in names if (web.snapshot / name).is_file()}
    lora = {f"experts/0-one/adapter_{n}" for n in ("model.safetensors", "config.json")}
    assert files == {"README.md", "prw.json", "router.safetensors"} | lora
    prw.from_pretrained(Model(), "me/woven")
    patterns = web.asked["download"]["allow_patterns"]
    kept = huggingface_hub.utils.filter_repo_objects(
        [*files, "pytorch_model.bin", "experts/0-one/evil.pkl", "run.py"], allow_patterns=patterns
    )
    assert set(kept) == files - {"README.md"}
    uploaded = web.asked["upload"]["allow_patterns"]
    assert set(huggingface_hub.utils.filter_repo_objects(files, allow_patterns=uploaded)) == files


@pytest.mark.parametrize("memories", [False, True])
def test_remembered_inputs_stay_behind_unless_asked_for(web: Hub, memories: bool) -> None:
    weave = trained("one")[1]
    kept_MD = weave.pools["layer"].columns.memory(0)
    weave.push_to_hub("me/woven", license="mit", memories=memories)
    told = (web.snapshot / "README.md").read_text("utf-8")
    assert ("remember some of their inputs" in told) == memories
    router = load_file(web.snapshot / "router.safetensors")
    assert any(name.endswith("memory") for name in router) == memories
    loaded = prw.from_pretrained(Model(), "me/woven")
    assert len(loaded.pools["layer"].columns.memory(0)) == (3 if memories else 0)
    assert torch.equal(weave.pools["layer"].columns.memory(0), kept_MD), "the weave is untouched"


def test_a_folder_is_read_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    model, weave = trained("one")
    weave.save(tmp_path / "woven")
    twin = Model().eval()
    prw.from_pretrained(twin, tmp_path / "woven")
    assert torch.equal(twin(X), model(X))
    with pytest.raises(prw.ConfigError, match="has no revision 'main'"):
        prw.from_pretrained(Model(), tmp_path / "woven", revision="main")
    with pytest.raises(prw.ConfigError, match=r'pip install "prw\[hub\]"'):
        prw.from_pretrained(Model(), "me/woven")
    with pytest.raises(prw.ConfigError, match=r'pip install "prw\[hub\]"'):
        weave.push_to_hub("me/woven", license="mit")


def front_matter(card: str) -> dict[str, Any]:
    data = huggingface_hub.ModelCard(card).data.to_dict()
    assert isinstance(data, dict)
    return data


def test_the_card_says_what_is_inside() -> None:
    weave = trained("one", "two")[1]
    card = model_card(weave, "me/woven", license="apache-2.0", base_model="them/base")
    front = front_matter(card)
    assert front["license"] == "apache-2.0" and front["base_model"] == "them/base"
    assert front["library_name"] == "prw" and "lora" in front["tags"]
    # rank 2 of a layer 8 -> 4: A has 2 * 8 numbers, B 4 * 2.
    assert "| one | closed | `experts/0-one` | 2 | 24 |" in card
    assert "| two | closed | `experts/1-two` | 2 | 24 |" in card
    assert "1 routers" not in card and "`layer`" in card
    assert f"`{digest(weave.fingerprint)}`" in card and "`Model`" in card
    assert "base_model" not in front_matter(model_card(weave, "me/woven", license="mit"))


def test_another_base_has_another_digest() -> None:
    found = prw.weave(Model(), prw.Config(target_modules=["layer"], rank=2)).fingerprint
    wider = {**found, "modules": [["layer", [4, 9]]]}
    cast = {**found, "samples": [0.0]}
    assert digest(found) != digest(wider)
    assert digest(found) == digest(cast), "rounding does not make another base"


def test_the_example_of_the_card_runs(web: Hub) -> None:
    made: dict[str, Any] = {}
    exec(EXAMPLE, made)
    weave = prw.weave(made["model"], prw.Config(target_modules=["0"], rank=2))
    weave.unlock("one")
    weave.push_to_hub("me/woven", license="mit", example=EXAMPLE)
    card = (web.snapshot / "README.md").read_text("utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    namespace: dict[str, Any] = {}
    exec(block, namespace)
    assert torch.equal(namespace["y"], made["model"](made["x"]))
    assert isinstance(namespace["weave"], prw.Weave)


@pytest.mark.parametrize("license", ["", "Apache 2.0", "mit\nevil: 1"])
def test_a_licence_is_an_identifier(web: Hub, license: str) -> None:
    with pytest.raises(prw.ConfigError, match="license is an identifier like 'apache-2.0'"):
        trained("one")[1].push_to_hub("me/woven", license=license)
    assert not web.asked


def test_nothing_to_share_is_refused_before_the_hub_is_asked(web: Hub) -> None:
    weave = prw.weave(Model(), prw.Config(target_modules=["layer"], rank=2))
    with pytest.raises(prw.ConfigError, match="there is no stage to share"):
        weave.push_to_hub("me/woven", license="mit")
    assert not web.asked


def answer(kind: type[Exception], text: str = "no") -> Exception:
    """An error of the Hub; those of its server carry a response."""
    if not issubclass(kind, errors.HfHubHTTPError):
        return kind(text)
    found = kind.__new__(kind)
    Exception.__init__(found, text)
    return found


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (answer(errors.RepositoryNotFoundError), "neither a folder here nor a repository"),
        (answer(errors.GatedRepoError), "is gated: ask for access at"),
        (answer(errors.RevisionNotFoundError), "'me/woven' has no revision 'v9'"),
        (errors.LocalTokenNotFoundError("no"), "needs a login: run `hf auth login`"),
        (errors.LocalEntryNotFoundError("no"), "cannot be reached for 'me/woven'"),
        (errors.OfflineModeIsEnabled("no"), "cannot be reached for 'me/woven'"),
        (ConnectionError("no"), "cannot be reached for 'me/woven'"),
        (errors.HTTPError("no"), "cannot be reached for 'me/woven'"),
        (answer(errors.HfHubHTTPError, "403 Forbidden\nmore"), "refused 'me/woven': 403 Forbidden"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_one_sentence_per_mistake(
    web: Hub, monkeypatch: pytest.MonkeyPatch, raised: Exception, told: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    model, weave = Model(), trained("one")[1]
    for name in ("create_repo", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, fail)
    with pytest.raises(prw.CheckpointError, match=re.escape(told)) as caught:
        prw.from_pretrained(model, "me/woven", revision="v9")
    assert "\n" not in str(caught.value)
    assert type(model.layer) is nn.Linear, "the model is untouched"
    with pytest.raises(prw.CheckpointError, match=re.escape(told)):
        weave.push_to_hub("me/woven", license="mit", revision="v9")


@pytest.mark.parametrize("name", ["./gone", "/gone/woven", "~/gone", Path("gone")])
def test_a_path_that_is_missing_is_not_asked_of_the_hub(web: Hub, name: str | Path) -> None:
    with pytest.raises(prw.CheckpointError, match="there is no folder"):
        prw.from_pretrained(Model(), name)
    assert not web.asked


def test_what_cannot_name_a_repository() -> None:
    with pytest.raises(prw.ConfigError, match="'a/b/c' is no folder here and cannot name"):
        prw.from_pretrained(Model(), "a/b/c")


def test_a_repository_without_a_weave(web: Hub) -> None:
    web.snapshot.mkdir(parents=True)
    with pytest.raises(prw.CheckpointError, match=r"'me/woven' holds no prw.json; it is not a"):
        prw.from_pretrained(Model(), "me/woven")


@pytest.mark.parametrize("name", ["router.safetensors", "experts/0-one/adapter_model.safetensors"])
def test_a_link_out_of_the_repository_is_refused(web: Hub, tmp_path: Path, name: str) -> None:
    trained("one")[1].push_to_hub("me/woven", license="mit")
    outside = shutil.copy(web.snapshot / name, tmp_path / "outside")
    (web.snapshot / name).unlink()
    (web.snapshot / name).symlink_to(outside)
    with pytest.raises(prw.CheckpointError, match="leads out of its folder"):
        prw.from_pretrained(Model(), "me/woven")


def test_a_changed_file_is_refused(web: Hub) -> None:
    trained("one")[1].push_to_hub("me/woven", license="mit")
    blob = (web.snapshot / "router.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"\1")
    with pytest.raises(prw.CheckpointError, match="was changed or truncated"):
        prw.from_pretrained(Model(), "me/woven")


def test_the_patterns_cover_what_a_checkpoint_needs(tmp_path: Path) -> None:
    trained("one", "two")[1].save(tmp_path / "woven")
    found = [p.relative_to(tmp_path / "woven").as_posix()
             for p in (tmp_path / "woven").rglob("*") if p.is_file()]  # fmt: skip
    kept = huggingface_hub.utils.filter_repo_objects(found, allow_patterns=list(hub.FILES))
    assert set(kept) == set(found)
