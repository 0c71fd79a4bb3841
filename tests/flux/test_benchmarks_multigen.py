"""Control maps: the layout of the public scripts, and every number from its own definition."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import f1_score, jaccard_score

from prw_flux.cli import main
from prw_flux.evaluation.benchmarks import (
    BenchmarkError,
    Encoders,
    MultiGen,
    score_folder,
)
from prw_flux.evaluation.encoders import Encoder, EncoderError
from prw_flux.evaluation.map_models import DepthModel, SegmentationModel, map_model
from prw_flux.evaluation.metrics import frechet_distance
from prw_flux.evaluation.published import compare, load

SIDE = 512


def picture(seed: int, side: int = SIDE) -> np.ndarray:
    """Blocks of a few colours, with edges that Canny finds."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.kron(blocks, np.ones((side // 8, side // 8, 1), np.uint8))


def grey(image: np.ndarray) -> np.ndarray:
    return np.asarray(image[..., 0])


def bright(image: np.ndarray) -> np.ndarray:
    return (image[..., 0] > 127).astype(np.int64)


def small(image: np.ndarray) -> np.ndarray:
    return grey(image)[::2, ::2].astype(np.float64)


def flat(image: np.ndarray) -> np.ndarray:
    return np.zeros((3, 3, 3))


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


class Means(Encoder):
    """Pictures by the means of their quarters, texts by their length."""

    name = "means"

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def images(self, images: Any) -> Any:
        return np.stack([
            image.reshape(2, image.shape[0] // 2, 2, -1, 3).mean((1, 3)).ravel() for image in images
        ]).astype(np.float32)  # fmt: skip

    def texts(self, texts: Any) -> Any:
        return np.array([np.arange(12) + len(text) for text in texts], np.float32)


def folder(path: Path, condition: str, /, count: int = 3, **more: Any) -> Path:
    items = []
    for i in range(count):
        save(path / f"{i}.png", picture(i))
        row = {"id": str(i), "image": f"{i}.png", "text": f"caption {i}"}
        if condition in ("depth", "seg"):
            save(path / f"control-{i}.png", picture(50 + i))
            row["control"] = f"control-{i}.png"
        if condition == "seg":
            save(path / f"label-{i}.png", bright(picture(i)).astype(np.uint8) + 1)
            row["label"] = f"label-{i}.png"
        items.append(row)
    if condition == "seg":
        more = {"classes": 2, "first": 1, "ignore": 0, **more}
    index = {"version": 1, "condition": condition, "name": "trial", "items": items, **more}
    (path / "multigen.json").write_text(json.dumps(index))
    return path


def results(path: Path, count: int = 3, groups: int = 2) -> Path:
    for g in range(groups):
        for i in range(count):
            save(path / f"images/group_{g}/{i}.png", picture(i + 10 * g + 1))
    return path


def measured(bench: MultiGen, made: Path, out: Path, **encoders: Any) -> dict[str, float]:
    scores = score_folder(bench, made, Encoders(**encoders), out)
    assert not scores.problems, scores.problems
    return dict(scores.lines[0].metrics)


# Numbers ------------------------------------------------------------------------------------------


def test_canny_f1_is_that_of_the_stack_of_a_prompts_pictures(tmp_path: Path) -> None:
    from torchmetrics.classification import BinaryF1Score

    bench = MultiGen(folder(tmp_path / "data", "canny"), map_model("canny", None), groups=2)
    found = measured(bench, results(tmp_path / "gen"), tmp_path / "s.json")
    values = []
    for i in range(3):
        wanted = np.stack([cv2.Canny(picture(i), 100, 200) > 0] * 2)
        got = np.stack([cv2.Canny(picture(i + 10 * g + 1), 100, 200) > 0 for g in range(2)])
        values.append(f1_score(wanted.ravel(), got.ravel()))
        theirs = BinaryF1Score()(torch.from_numpy(got).int(), torch.from_numpy(wanted).int())
        assert values[-1] == pytest.approx(float(theirs), abs=1e-6)
    assert 0 < found["canny F1"] < 100
    assert found["canny F1"] == pytest.approx(100 * np.mean(values), abs=1e-4)


def test_ssim_is_torchmetrics_multi_scale_one_over_the_stack(tmp_path: Path) -> None:
    from torchmetrics.image import MultiScaleStructuralSimilarityIndexMeasure

    maps = map_model("hed", f"hed={__name__}:grey")
    bench = MultiGen(folder(tmp_path / "data", "hed", count=2), maps, groups=2)
    found = measured(bench, results(tmp_path / "gen", count=2), tmp_path / "s.json")
    theirs = MultiScaleStructuralSimilarityIndexMeasure(data_range=1.0)
    values = []
    for i in range(2):
        wanted = torch.from_numpy(np.stack([grey(picture(i))] * 2)[:, None]).float() / 255
        got = np.stack([grey(picture(i + 10 * g + 1)) for g in range(2)])[:, None]
        values.append(float(theirs(torch.from_numpy(got).float() / 255, wanted)))
    assert found["hed SSIM"] == pytest.approx(100 * np.mean(values), abs=1e-4)


def test_depth_rmse_is_the_mean_over_pictures_on_0_to_255(tmp_path: Path) -> None:
    bench = MultiGen(
        folder(tmp_path / "data", "depth"), map_model("depth", f"{__name__}:grey"), groups=2
    )
    found = measured(bench, results(tmp_path / "gen"), tmp_path / "s.json")
    values = []
    for i in range(3):
        label = np.asarray(Image.fromarray(picture(50 + i)).convert("L"), np.float64)
        label = np.floor((label - label.min()) / (label.max() - label.min()) * 255)
        for g in range(2):
            got = grey(picture(i + 10 * g + 1)).astype(np.float64)
            values.append(np.sqrt(((np.floor(got / got.max() * 255) - label) ** 2).mean()))
    assert found["depth RMSE"] == pytest.approx(np.mean(values), abs=1e-4)


def test_miou_is_from_one_matrix_and_leaves_the_ignored_out(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", "seg")
    label = bright(picture(0)).astype(np.uint8) + 1
    label[:200] = 0  # does not count
    save(data / "label-0.png", label)
    bench = MultiGen(data, map_model("seg", f"{__name__}:bright"), groups=2)
    found = measured(bench, results(tmp_path / "gen"), tmp_path / "s.json")
    pairs = []
    for i in range(3):
        wanted = np.asarray(Image.open(data / f"label-{i}.png")).astype(int) - 1
        for g in range(2):
            got = bright(picture(i + 10 * g + 1))
            pairs.append((wanted[wanted >= 0], got[wanted >= 0]))
    wanted, got = (np.concatenate(part) for part in zip(*pairs, strict=True))
    expected = jaccard_score(wanted, got, average="macro")
    assert found["seg mIoU trial"] == pytest.approx(100 * expected, abs=1e-6)


def test_clip_score_and_distances(tmp_path: Path) -> None:
    bench = MultiGen(folder(tmp_path / "data", "canny"), map_model("canny", None), groups=2)
    clip, own, inception = Means("clip"), Means("own"), Means("inception")
    made = results(tmp_path / "gen")
    found = measured(bench, made, tmp_path / "s.json", clip=clip, own=own, inception=inception)
    real = clip.images([picture(i) for i in range(3)])
    groups = [clip.images([picture(i + 10 * g + 1) for i in range(3)]) for g in range(2)]
    expected = np.mean([frechet_distance(group, real) for group in groups])
    assert found["canny frechet[means]"] == pytest.approx(expected)
    assert found["canny FID"] == pytest.approx(expected)
    texts = clip.texts(["caption 0"])[0]
    units = np.concatenate(groups) / np.linalg.norm(np.concatenate(groups), axis=1, keepdims=True)
    assert found["canny CLIP-S"] == pytest.approx(
        100 * float((units @ (texts / np.linalg.norm(texts))).mean()), abs=1e-4
    )
    alone = MultiGen(folder(tmp_path / "other", "canny"), map_model("canny", None), groups=2)
    assert set(measured(alone, made, tmp_path / "s.json", own=own)) == {
        "canny F1", "canny frechet[means]"
    }  # fmt: skip


def test_fid_is_the_name_of_inceptions_distance_alone() -> None:
    encoders = Encoders(clip=Means("clip"), own=Means("own"))
    assert list(encoders.distances()) == ["frechet[means]"]
    assert "FID" in Encoders(inception=Means("inception")).distances()


def test_inception_is_that_of_torch_fidelity(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from prw_flux.evaluation.inception import InceptionEncoder

    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(EncoderError, match="FID needs Inception-v3 of torch-fidelity"):
        InceptionEncoder("torch-fidelity")

    class Stub(torch.nn.Module):
        def __init__(self, name: str, features: list[str], **more: Any) -> None:
            super().__init__()
            assert features == ["2048"] and more == {"feature_extractor_weights_path": None}

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            assert x.dtype == torch.uint8 and x.shape[:2] == (1, 3)
            return (x.float().mean((2, 3)).repeat(1, 683)[:, :2048],)

    module = ModuleType("stub")
    module.FeatureExtractorInceptionV3 = Stub  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    encoder = InceptionEncoder("torch-fidelity")
    assert encoder.kind == "inception" and encoder.images([picture(0), picture(1)]).shape == (
        2, 2048
    )  # fmt: skip
    with pytest.raises(EncoderError, match="no Inception weights at"):
        InceptionEncoder(str(tmp_path / "gone.pth"))


# What is generated, and how it is laid out --------------------------------------------------------


@pytest.mark.parametrize(
    ("condition", "ending"),
    [
        ("canny", "edge"),
        ("hed", "lineart"),
        ("lineart", "lineart"),
        ("depth", "depth"),
        ("seg", ""),
    ],
)
def test_the_public_scripts_find_their_files(tmp_path: Path, condition: str, ending: str) -> None:
    specs = {"depth": f"{__name__}:grey", "seg": f"{__name__}:bright"}
    data = folder(tmp_path / "data", condition)
    bench = MultiGen(data, map_model(condition, specs.get(condition)), groups=4)
    asks = bench.asks()
    assert len(asks) == 12 and asks[5].output == "images/group_1/1.png"
    assert asks[0].task == "control" and asks[0].prompt == "caption 0" and asks[0].square
    source = bench.source(asks[0])
    assert source.shape == (SIDE, SIDE, 3) and bench.source_size(asks[0]) == (SIDE, SIDE)
    written = bench.beside(asks[5], source, picture(3, side=96))
    maps = {f"images/group_1/1_{ending}.png"} if ending else set()
    assert set(written) == {"annotations/1.png"} | maps
    assert all(map_.shape == (SIDE, SIDE) and map_.dtype == np.uint8 for map_ in written.values())
    assert set(written) <= bench.allowed
    if condition == "canny":
        np.testing.assert_array_equal(grey(source), cv2.Canny(picture(0), 100, 200))
        np.testing.assert_array_equal(written["annotations/1.png"], grey(source))
    if condition == "lineart":  # dark lines on white, as the public script stores them
        assert written["images/group_1/1_lineart.png"].mean() > 128 > grey(source).mean()
    if condition == "seg":
        np.testing.assert_array_equal(source, picture(50))


def test_the_stored_depth_maps_have_the_rmse_that_is_printed(tmp_path: Path) -> None:
    """The public script compares the two files as they are; the label must lie there stretched."""
    data = folder(tmp_path / "data", "depth", count=1)
    low = (60 + picture(50)[..., 0] // 4).astype(np.uint8)
    Image.fromarray(low).save(data / "control-0.png")
    bench = MultiGen(data, map_model("depth", f"{__name__}:small"), groups=1)
    output = picture(7)
    written = bench.beside(bench.asks()[0], bench.source(bench.asks()[0]), output)
    wanted, found = (written[f].astype(np.float64) for f in sorted(written))
    assert wanted.min() == 0 and wanted.max() == 255
    row = bench.score(bench.items[0], output, Encoders())
    assert row["RMSE"] == pytest.approx(np.sqrt(((found - wanted) ** 2).mean()), abs=1e-9)
    black = bench.beside(bench.asks()[0], bench.source(bench.asks()[0]), np.zeros_like(output))
    assert black["images/group_0/0_depth.png"].max() == 0


def test_line_art_is_inverted_as_the_script_does_it_and_as_it_should_be(tmp_path: Path) -> None:
    from torchmetrics.image import MultiScaleStructuralSimilarityIndexMeasure

    bench = MultiGen(
        folder(tmp_path / "data", "lineart", count=1),
        map_model("lineart", f"informative-drawings={__name__}:grey"),
        groups=1,
    )
    output = picture(0)
    output[:64] = 255  # lines at full strength, which the script turns into 1
    written = bench.beside(bench.asks()[0], bench.source(bench.asks()[0]), output)
    wanted, stored = (torch.from_numpy(written[f])[None, None] for f in sorted(written))
    theirs = MultiScaleStructuralSimilarityIndexMeasure(data_range=1.0)
    row = bench.score(bench.items[0], output, Encoders())
    assert row["SSIM"] == pytest.approx(100 * float(theirs((1 - stored) / 255, wanted / 255)))
    whole = 100 * float(theirs((255 - stored) / 255, wanted / 255))
    assert row["SSIM unwrapped"] == pytest.approx(whole) and abs(row["SSIM"] - whole) > 1


# Models that read maps ----------------------------------------------------------------------------


def test_a_depth_model_of_transformers(tmp_path: Path) -> None:
    from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessorPil

    config = DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16,
        image_size=32, patch_size=16, backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, is_hybrid=False,
        reassemble_factors=[4, 2, 1, 0.5],
    )  # fmt: skip
    torch.manual_seed(0)
    model = DPTForDepthEstimation(config).eval()
    processor = DPTImageProcessorPil(size={"height": 32, "width": 32})
    model.save_pretrained(tmp_path / "dpt")
    processor.save_pretrained(tmp_path / "dpt")
    ours = DepthModel(str(tmp_path / "dpt"))
    assert (ours.kind, ours.name) == ("dpt", "local:dpt")
    with torch.no_grad():
        inputs = processor(images=Image.fromarray(picture(0)), return_tensors="pt")
        expected = model(**inputs).predicted_depth[0]
    np.testing.assert_allclose(ours(picture(0)), expected.numpy(), rtol=1e-5, atol=1e-6)


def test_a_segmentation_model_of_transformers(tmp_path: Path) -> None:
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessorPil,
        SwinConfig,
    )

    backbone = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=8, encoder_layers=1, decoder_layers=2, num_attention_heads=2,
        dim_feedforward=8, num_queries=4, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(config).eval()
    processor = Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}, num_labels=3)
    model.save_pretrained(tmp_path / "m2f")
    processor.save_pretrained(tmp_path / "m2f")
    ours = SegmentationModel(str(tmp_path / "m2f"))
    assert ours.kind == "mask2former"
    found = ours(picture(0, side=128))
    with torch.no_grad():
        outputs = model(**processor(images=Image.fromarray(picture(0, 128)), return_tensors="pt"))
    (expected,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(128, 128)])
    np.testing.assert_array_equal(found, expected.numpy())
    assert found.shape == (128, 128) and set(np.unique(found)) <= {0, 1, 2}


def test_models_that_are_not_there_are_one_sentence(tmp_path: Path) -> None:
    for build in (DepthModel, SegmentationModel):
        with pytest.raises(EncoderError, match="There is no encoder at"):
            build(str(tmp_path / "gone"))
    with pytest.raises(EncoderError, match="for hed name a callable"):
        map_model("hed", "lllyasviel/Annotators")
    with pytest.raises(EncoderError, match="gone_module"):
        map_model("hed", "gone_module:f")
    with pytest.raises(EncoderError, match=r"must return finite \[H, W\]"):
        map_model("hed", f"{__name__}:flat")(picture(0))


# Beside the paper ---------------------------------------------------------------------------------


def test_the_papers_columns_are_kept_apart() -> None:
    ours = {"bench": "multigen", "items": "all", "groups": "4"}
    table = load("multigen")
    for metric, more, shown in (
        ("depth RMSE", {"depth maps": "dpt:Intel/dpt-large"}, "30.00"),
        ("depth RMSE", {"depth maps": "depth_anything:x"}, "refused"),
        ("lineart SSIM", {"lineart maps": "xdog:prw"}, "refused"),
        ("lineart SSIM", {"lineart maps": "informative-drawings:m:f"}, "30.00"),
        ("seg mIoU ADE20K", {"seg maps": "mask2former:x"}, "30.00"),
        ("seg mIoU ADE20K", {"seg maps": "mask2former:x", "items": "1 of 8000"}, "refused"),
        ("canny CLIP-S", {"clip": "clip:openai/clip-vit-base-patch16"}, "30.00"),
        ("canny CLIP-S", {"clip": "own:x"}, "refused"),
        ("canny CLIP-S", {"canny maps": "anything", "clip": "clip:x"}, "30.00"),
    ):
        found = compare(table, "mine", {metric: 30.0}, {**ours, **more})
        own = dict(zip(found.columns, found.rows[-1], strict=True))
        assert own[metric] == shown, (metric, more, found.notes)


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "expected version 1 and items, got version 2"),
        ({"condition": "pose"}, "unknown condition 'pose'; known: canny"),
        ({"condition": "depth"}, "item '0' needs a control"),
        ({"items": [{"id": "0", "image": "0.png"}]}, "item 0 needs id, image and text"),
        ({"items": [{"id": "0", "image": "../0.png", "text": "a"}]}, "leaves the folder"),
        ({"items": [{"id": "0", "image": "0.png", "text": "a", "label": "l"}]}, "not take a label"),
    ],
)
def test_bad_files(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    data = folder(tmp_path / "data", "canny", **change)
    with pytest.raises(BenchmarkError, match=said):
        MultiGen(data, map_model("canny", None))


def test_classes_are_needed_and_labels_have_one_channel(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", "seg")
    index = json.loads((data / "multigen.json").read_text())
    maps = map_model("seg", f"{__name__}:bright")
    (data / "multigen.json").write_text(json.dumps({**index, "first": None}))
    with pytest.raises(BenchmarkError, match="needs classes and first"):
        MultiGen(data, maps)
    (data / "multigen.json").write_text(json.dumps(index))
    save(data / "label-1.png", picture(0))
    save(data / "label-2.png", np.full((SIDE, SIDE), 9, np.uint8))
    made = results(tmp_path / "gen", groups=1)
    scores = score_folder(MultiGen(data, maps, groups=1), made, Encoders(), tmp_path / "s.json")
    assert [row["key"] for row in scores.rows] == ["0/0"] and len(scores.problems) == 2
    assert "labels have one channel" in scores.problems[0]
    assert "wanted has class 8, known are 0 .. 1" in scores.problems[1]


def test_the_command_scores_pictures_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, made = folder(tmp_path / "data", "canny"), results(tmp_path / "gen")
    words = ["evaluate", "--bench", "multigen", "--benchmark-folder", str(data), "--results",
             str(made), "--samples", "2", "--clip", "none", "--json"]  # fmt: skip
    assert main(words) == 0
    (line,) = json.loads(capsys.readouterr().out)["lines"]
    assert line["protocol"]["groups"] == "2" and line["n"] == 6
    (made / "images/group_1/2.png").unlink()
    assert main(words) == 1
    assert "group_1/2.png: no such file" in capsys.readouterr().err
    assert json.loads((made / "scores.json").read_text())["lines"][0]["n"] == 5
