"""Condition extractors by name: networks from local weights, classical ones, what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import save_file

from prw import ConfigError
from prw_flux.cli import main
from prw_flux.data import conditions, edge_networks
from prw_flux.data.choose import open_data
from prw_flux.data.conditions import SHORT, near_white, open_extractors
from prw_flux.data.on_disk import OnDisk
from prw_flux.data.photos import PhotoFolder
from prw_flux.data.with_maps import WithMaps
from prw_flux.tasks import TASKS

SIDE = {"height": 32, "width": 32}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny random models of transformers, and random weights of the two line networks."""
    import transformers as t

    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    depth = t.DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
        image_size=32, patch_size=8, backbone_out_indices=[0, 1, 2, 3], is_hybrid=False,
        neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, reassemble_factors=[4, 2, 1, 0.5],
    )  # fmt: skip
    t.DPTForDepthEstimation(depth).save_pretrained(root / "depth")
    t.DPTImageProcessorPil(size=SIDE).save_pretrained(root / "depth")
    classes = t.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16],
        patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
        decoder_hidden_size=16, num_labels=5,
    )  # fmt: skip
    t.SegformerForSemanticSegmentation(classes).save_pretrained(root / "segmentation")
    t.SegformerImageProcessorPil(size=SIDE).save_pretrained(root / "segmentation")
    for name, shapes in (
        ("softedge", edge_networks.hed_shapes()),
        ("lineart", edge_networks.drawing_shapes()),
    ):
        weights = {key: torch.randn(shape) * 0.02 for key, shape in shapes.items()}
        save_file(weights, root / f"{name}.safetensors")
    return root


def photo(height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray[Any, Any]:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.array(PILImage.fromarray(coarse).resize((width, height)))


def specs(models: Path) -> list[str]:
    return [
        "canny",
        f"softedge:{models / 'softedge.safetensors'}",
        f"lineart:{models / 'lineart.safetensors'}",
        f"depth:{models / 'depth'}",
        f"segmentation:{models / 'segmentation'}",
    ]


def test_every_condition_gives_a_map_of_the_pictures_size(models: Path) -> None:
    extractors = open_extractors(specs(models))
    assert [one.condition for one in extractors] == [
        "canny", "softedge", "lineart", "depth", "segmentation",
    ]  # fmt: skip
    assert len({one.method for one in extractors}) == 5
    for extractor in extractors:
        for height, width in ((48, 64), (37, 51)):
            image = photo(height, width)
            found = extractor(image)
            assert found.shape == (height, width) and found.dtype == np.uint8
            np.testing.assert_array_equal(found, extractor(image))
    by_name = {one.condition: one for one in extractors}
    depth = by_name["depth"](photo())
    assert depth.min() == 0 and depth.max() == 255
    classes = by_name["segmentation"](photo())
    assert 1 <= classes.min() and classes.max() <= 5


def test_large_pictures_are_looked_at_small(models: Path) -> None:
    (edges,) = open_extractors(specs(models)[1:2])
    wide = np.zeros((SHORT + 8, SHORT + 40, 3), np.uint8)
    assert edges(wide).shape == wide.shape[:2]


def test_two_trainings_of_one_model_are_told_apart(models: Path, tmp_path: Path) -> None:
    from transformers import DPTForDepthEstimation, DPTImageProcessorPil

    model = DPTForDepthEstimation.from_pretrained(models / "depth")
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(tmp_path)
    DPTImageProcessorPil(size=SIDE).save_pretrained(tmp_path)
    one, again, other = (
        open_extractors([f"depth:{where}"])[0].method
        for where in (models / "depth", models / "depth", tmp_path)
    )
    assert one == again != other
    assert one.startswith("dpt ")


def test_near_is_white() -> None:
    np.testing.assert_array_equal(near_white(np.array([[1.0, 2.0, 3.0]])), [[0, 128, 255]])
    assert not near_white(np.full((3, 3), 7.0)).any()


@pytest.mark.parametrize(
    ("kind", "settings", "first"),
    [
        ("dpt", {}, 0),
        ("depth_anything", {"depth_estimation_type": "relative"}, 0),
        ("depth_anything", {"depth_estimation_type": "metric"}, 255),
        ("zoedepth", {}, 255),
    ],
)
def test_distances_are_turned_round(
    monkeypatch: pytest.MonkeyPatch, kind: str, settings: dict[str, str], first: int
) -> None:
    """The model answers 1, 2, 4 from left to right: nearness, or metres."""

    def answer(picture: PILImage.Image) -> dict[str, torch.Tensor]:
        return {"predicted_depth": torch.tensor([1.0, 2.0, 4.0]).expand(3, 3)}

    model = torch.nn.Linear(2, 2)
    model.config = SimpleNamespace(model_type=kind, **settings)  # type: ignore[assignment]
    answer.model = model  # type: ignore[attr-defined]
    monkeypatch.setattr(conditions, "_pipeline", lambda *_: answer)
    (depth,) = open_extractors(["depth:any"])
    found = depth(np.zeros((3, 3, 3), np.uint8))
    assert found[0].tolist() == [first, 85, 255 - first]


def test_hed_finds_the_edge_that_its_weights_look_for() -> None:
    """With weights that take a horizontal difference in the first stage, only that edge is lit."""
    weights = {key: torch.zeros(shape) for key, shape in edge_networks.hed_shapes().items()}
    weights["block1.convs.0.weight"][0, 0, 1] = torch.tensor([-1.0, 0.0, 1.0])
    weights["block1.convs.1.weight"][0, 0, 1, 1] = 1
    weights["block1.projection.weight"][0, 0] = 1
    image = torch.zeros(1, 3, 32, 32)
    image[..., 16:] = 100
    edges = edge_networks.hed(weights, image)[0]
    assert edges.shape == (32, 32)
    assert (edges[:, 15:17] > 0.99).all()
    torch.testing.assert_close(edges[:, :14], torch.full((32, 14), 0.5))


def test_drawing_is_cropped_to_the_picture_and_depends_on_every_weight() -> None:
    torch.manual_seed(0)
    shapes = edge_networks.drawing_shapes()
    weights = {key: (torch.randn(s) * 0.05).requires_grad_() for key, s in shapes.items()}
    found = edge_networks.drawing(weights, torch.rand(1, 3, 21, 30))
    assert found.shape == (1, 21, 30) and 0 <= found.min() and found.max() <= 1
    found.square().sum().backward()
    kernels = [name for name in shapes if name.endswith("weight")]
    assert all(weights[name].grad.abs().max() > 0 for name in kernels)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("depth", "'depth' needs weights: depth:WEIGHTS, a folder, a file or a Hub id"),
        ("softedge", "needs weights.*or take softedge_classical"),
        ("soft_edge_classical", "did you mean 'softedge_classical'"),
        ("nonsense", "no condition 'nonsense'; known: canny, softedge_classical, "),
        ("canny:x", "canny takes no weights"),
        ("depth:{0}/nowhere", "depth weights: there is no folder .*nowhere"),
        ("depth:{0}/segmentation", "are a SegformerForSemanticSegmentation, no model for depth"),
        ("depth:{0}", "depth weights .* cannot be loaded"),
        ("lineart:{0}/nowhere.safetensors", "lineart weights: there is no file"),
        ("softedge:{0}/lineart.safetensors", "other weights: norm is nothing, not .1, 3, 1, 1."),
        ("softedge:{0}/depth/config.json", "is not a safetensors file, or is damaged"),
        ("softedge:{0}/hed.pth", "are a pickle, which is not opened here; convert them once: "),
        ("softedge:no-one/has-this", "softedge weights 'no-one/has-this' cannot be loaded"),
    ],
)
def test_missing_weights_are_one_sentence(models: Path, spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as found:
        open_extractors([spec.format(models)])
    assert "\n" not in str(found.value)


def test_one_extractor_per_condition() -> None:
    with pytest.raises(ConfigError, match="'canny' is a second canny"):
        open_extractors(["canny", "canny"])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(4):
        PILImage.fromarray(photo(seed=i)).save(folder / f"p{i}.png")
        (folder / f"p{i}.txt").write_text(f"picture {i}")
    return folder


def test_conditions_are_built_once_and_train_from_disk(
    models: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    PILImage.new("RGB", (64, 48), "grey").save(photos / "flat.png")
    (photos / "flat.txt").write_text("nothing")
    named = f"canny,softedge_classical,depth:{models / 'depth'}"
    command = ["data", "build", "control", "--from", "photos", str(photos), "--out",
               str(tmp_path / "out"), "--conditions", named, "--json"]  # fmt: skip
    assert main(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kept"] == 5 and told["made_from"]["method of depth"].startswith("dpt ")
    assert told["converted"] == {"left out a blank canny": 1, "left out a blank softedge": 1}
    data = OnDisk(str(tmp_path / "out"), 48, split="all", cache=tmp_path / "cache")
    seen = set()
    for index in range(30):
        example = data.example("control", index)
        if not example.key.startswith("out:flat"):
            assert set(example.maps) == {"canny", "softedge", "depth"}
        triple = TASKS["control"](example, index)
        seen.add((triple.metadata["condition"], triple.metadata["method"].split()[0]))
    assert seen == {
        ("canny", "cv2-rgb-100-200"), ("softedge", "classical-multiscale-sobel"), ("depth", "dpt"),
    }  # fmt: skip
    assert main(["data", "check", str(tmp_path / "out")]) == 0


def test_a_flat_picture_without_any_map_is_rejected(photos: Path, tmp_path: Path) -> None:
    PILImage.new("RGB", (64, 48), "grey").save(photos / "flat.png")
    (photos / "flat.txt").write_text("nothing")
    command = ["data", "build", "control", "--from", "photos", str(photos), "--out",
               str(tmp_path / "out"), "--conditions", "canny"]  # fmt: skip
    assert main([*command, "--max-rejected", "0.1"]) != 0
    assert main([*command, "--max-rejected", "0.3"]) == 0
    rejected = json.loads((tmp_path / "out" / "build.json").read_text())["rejected"]
    assert rejected == {"no conditions": 1}


def test_other_tasks_have_no_conditions(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["data", "build", "inpaint", "--from", "photos", str(photos), "--out",
               str(tmp_path / "out"), "--conditions", "canny"]  # fmt: skip
    assert main(command) != 0
    assert "--conditions belong to the task 'control', not 'inpaint'" in capsys.readouterr().err


def test_maps_can_be_made_while_training(models: Path, photos: Path) -> None:
    plain = PhotoFolder(photos, 48, "all")
    (classical,) = open_extractors(["lineart_classical"])
    made = WithMaps(plain, [classical, *open_extractors([f"depth:{models / 'depth'}"])])
    assert made.fingerprint() != plain.fingerprint()
    assert made.fingerprint() != WithMaps(plain, [classical]).fingerprint()
    assert made.tasks() == plain.tasks() and len(made) == len(plain)
    drawn = [TASKS["control"](made.example("control", i), i) for i in range(12)]
    assert {t.metadata["condition"] for t in drawn} == {"lineart", "depth"}
    again = TASKS["control"](made.example("control", 3), 3)
    np.testing.assert_array_equal(again.source, drawn[3].source)
    assert not made.example("inpaint", 0).maps
    opened = open_data("photos", size=48, split="all", photos=str(photos), conditions=["canny"])
    kinds = {TASKS["control"](opened.example("control", i), i).metadata["kind"] for i in range(8)}
    assert kinds == {"canny"}
