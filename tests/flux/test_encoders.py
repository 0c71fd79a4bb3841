from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flux.conftest import word_tokenizer
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    ViTConfig,
    ViTModel,
)

from prw_flux.evaluation.encoders import (
    CLIP,
    DINO,
    ClipEncoder,
    DinoEncoder,
    EncoderError,
    OwnEncoder,
)

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
         "num_attention_heads": 2}  # fmt: skip


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3))
    return np.kron(noise, np.ones((8, 8, 1))).astype(np.uint8)


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = CLIPConfig(
        projection_dim=8,
        text_config={**SMALL, "vocab_size": 16, "max_position_embeddings": 6, "eos_token_id": 2,
                     "bos_token_id": 1, "pad_token_id": 0},
        vision_config={**SMALL, "image_size": 32, "patch_size": 16},
    )  # fmt: skip
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    word_tokenizer(6, "<bos>", "<eos>").save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.fixture
def dino_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    ViTModel(ViTConfig(**SMALL, image_size=224, patch_size=32)).save_pretrained(tmp_path / "dino")
    return tmp_path / "dino"


@pytest.mark.parametrize("size", [(224, 224), (240, 320), (400, 184), (264, 1000)])
def test_pictures_are_prepared_as_by_the_processors_on_pil(size: tuple[int, int]) -> None:
    image = picture(*size)
    theirs = {
        CLIP: CLIPImageProcessorPil(),
        DINO: BitImageProcessorPil(
            size={"shortest_edge": 256}, crop_size=224, resample=3, do_convert_rgb=True,
            image_mean=list(DINO.mean), image_std=list(DINO.std),
        ),
    }  # fmt: skip
    for ours, processor in theirs.items():
        expected = processor(image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(ours(image), expected, rtol=1e-5, atol=1e-5)


def test_clip_gives_the_features_of_transformers(clip_folder: Path) -> None:
    encoder = ClipEncoder(str(clip_folder))
    assert encoder.kind == "clip" and encoder.name == "local:clip"
    images = [picture(40, 80, seed) for seed in range(3)]
    model = CLIPModel.from_pretrained(clip_folder).eval()
    side = {"shortest_edge": 32}
    pixels = CLIPImageProcessorPil(size=side, crop_size=32)(images, return_tensors="pt")
    with torch.no_grad():
        expected = model.get_image_features(**pixels).pooler_output.numpy()
        tokens = word_tokenizer(6, "<bos>", "<eos>")(
            ["a red square", "blue"], padding=True, return_tensors="pt"
        )
        texts = model.get_text_features(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output.numpy()
    np.testing.assert_allclose(encoder.images(images), expected, atol=1e-5)
    np.testing.assert_allclose(encoder.texts(["a red square", "blue"]), texts, atol=1e-5)
    long = encoder.texts(["red " * 50])
    np.testing.assert_array_equal(long, encoder.texts(["red " * 60]))


def test_dino_gives_the_class_token(dino_folder: Path) -> None:
    encoder = DinoEncoder(str(dino_folder))
    assert encoder.kind == "dino"
    image = picture(256, 300)
    with torch.no_grad():
        state = ViTModel.from_pretrained(dino_folder).eval()(DINO(image)[None]).last_hidden_state
    np.testing.assert_allclose(encoder.images([image]), state[:, 0].numpy(), atol=1e-5)
    with pytest.raises(EncoderError, match="encodes no texts"):
        encoder.texts(["a"])


def test_an_encoder_that_is_not_there_is_one_sentence(
    clip_folder: Path, dino_folder: Path, tmp_path: Path
) -> None:
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: ClipEncoder(str(tmp_path / "gone")), "There is no encoder at"),
        (lambda: ClipEncoder(str(tmp_path)), "holds no config.json"),
        (lambda: ClipEncoder(str(dino_folder)), "is a 'vit' model, not a CLIP"),
        (lambda: DinoEncoder(str(clip_folder)), "is a 'clip' model, not a DINO"),
        (lambda: ClipEncoder("nobody/nothing"), "cannot be loaded"),
        (lambda: OwnEncoder("squeeze"), "write package.module:object"),
        (lambda: OwnEncoder("no_such_module:x"), "cannot import"),
        (lambda: OwnEncoder("math:sinn"), "did you mean 'sin'"),
        (lambda: OwnEncoder("math:pi"), "must name a callable"),
        (lambda: OwnEncoder("builtins:len").images([picture(32, 32)]), r"\[1, D\]"),
    ]
    for make, said in cases:
        with pytest.raises(EncoderError, match=said):
            make()


def test_own_encoders_are_named_after_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_encoder.py").write_text(
        "def mean(images):\n    return [image.mean((0, 1)) for image in images]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    encoder = OwnEncoder("mine_encoder:mean")
    assert encoder.name == "mine_encoder:mean" and encoder.kind == "own"
    assert encoder.images([picture(32, 32), picture(40, 48)]).shape == (2, 3)
