"""tiny-flux: vocabularies, corpus, autoencoder and base, trained for a few steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor
from torch.testing import assert_close
from transformers import T5Config, T5EncoderModel

from prw import CheckpointError
from prw_flux import tiny
from prw_flux.shapeweave.scene import COLOURS, HELD_OUT_TRIPLES
from prw_flux.tasks import TASKS
from prw_flux.tiny import pretraining
from prw_flux.tiny.autoencoder import (
    AutoencoderRecipe,
    fold_normalisation,
    new_autoencoder,
    pixel_weight,
    to_tensor,
)
from prw_flux.tiny.base import BaseModel, BaseRecipe, Corpus
from prw_flux.tiny.build import build, new_base, token_ids
from prw_flux.tiny.corpus import FORMS, draw_content, paint, vocabulary
from prw_flux.tiny.measure import measure
from prw_flux.tiny.pretraining import pretrain
from prw_flux.tiny.text_pretraining import TaggingRecipe, tagging_batch, train_tagging
from prw_flux.tiny.text_tokenizers import CLIP_LENGTH, T5_LENGTH, clip_tokenizer, t5_tokenizer

WORDS = vocabulary()
TAGGING = TaggingRecipe(steps=1, batch_size=2)


def test_known_words_are_single_tokens() -> None:
    clip, t5 = clip_tokenizer(WORDS), t5_tokenizer(WORDS)
    for word in WORDS:
        assert clip.tokenize(word) == [word + "</w>"]
        assert t5.tokenize(word) == ["▁" + word]


@pytest.mark.parametrize("text", ["a Käfer's hat, 3 x 4!", "ünïcode 日本", ""])
def test_unknown_words_fall_apart_without_loss_in_clip(text: str) -> None:
    clip = clip_tokenizer(WORDS)
    ids = clip(text).input_ids
    assert clip.unk_token_id not in ids[1:-1]
    squeezed = clip.decode(ids, skip_special_tokens=True).replace(" ", "")
    assert squeezed == text.lower().replace(" ", "")


def test_tokenizers_survive_saving(tmp_path: Path) -> None:
    for name, tokenizer in (("clip", clip_tokenizer(WORDS)), ("t5", t5_tokenizer(WORDS))):
        tokenizer.save_pretrained(tmp_path / name)
        loaded = type(tokenizer).from_pretrained(tmp_path / name)
        text = "A small red striped circle, cap."
        assert loaded(text).input_ids == tokenizer(text).input_ids
        assert loaded.model_max_length == tokenizer.model_max_length


@pytest.mark.parametrize("form", sorted(FORMS))
def test_corpus_forms_fit_the_text_length_and_the_split(form: str) -> None:
    rng = np.random.default_rng(0)
    t5 = t5_tokenizer(WORDS)
    for _ in range(50):
        content = draw_content(rng, form)
        assert not content.scene.held_out()
        assert not {i.triple for i in content.scene.items if not i.glyph} & HELD_OUT_TRIPLES
        assert len(t5(content.text).input_ids) <= T5_LENGTH
        assert paint(content).shape == (96, 96, 3)


def test_task_sentences_are_known_words() -> None:
    t5 = t5_tokenizer(WORDS)
    for task in TASKS.values():
        pieces = [piece for piece in t5.tokenize(task.sentence) if piece not in (".", ",")]
        assert all(piece.startswith("▁") and len(piece) > 1 for piece in pieces), pieces


def test_folding_the_normalisation_standardises_the_latents() -> None:
    torch.manual_seed(0)
    vae = new_autoencoder(8)
    norm = torch.nn.BatchNorm2d(16, affine=False, momentum=None)
    image = torch.rand(8, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = norm(vae.encoder(image))
        norm.eval()
        expected = norm(vae.encoder(image))
        fold_normalisation(vae, norm)
        # two orders of the same affine map: rounding only
        assert_close(vae.encoder(image), expected, rtol=1e-4, atol=1e-4)


def test_pixel_weight_marks_objects_of_scenes_and_spares_photos() -> None:
    recipe = AutoencoderRecipe(batch_size=4, photo_share=0.25, object_weight=8.0)
    rng = np.random.default_rng(0)
    pictures = [paint(draw_content(rng, "places")) for _ in range(3)]
    photo = rng.integers(0, 256, (96, 96, 3)).astype(np.uint8)
    weight = pixel_weight(to_tensor(np.stack([*pictures, photo])), recipe)
    assert set(weight.unique().tolist()) == {1.0, 8.0}
    assert float(weight[3].max()) == 1.0
    assert 0.005 < float((weight[:3] == 8.0).float().mean()) < 0.3


def test_build_writes_a_flux_pipeline_that_runs_and_is_measured(tmp_path: Path) -> None:
    phase = AutoencoderRecipe(channels=8, steps=2, batch_size=4, scenes=8)
    recipe = BaseRecipe(
        width=32,
        heads=1,
        double_blocks=1,
        single_blocks=1,
        pictures=8,
        steps=2,
        tagging=TAGGING,
        batch_size=4,
    )
    folder = build(tmp_path / "tiny", phases=(phase,), recipe=recipe, compile_base=False)
    pipeline = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
    assert pipeline.transformer.config.in_channels == 64
    assert (folder / "recipe.json").is_file()
    sheet = tmp_path / "sheet.png"
    report = measure(folder, captions=2, steps=2, sheet=sheet, batch_size=2)
    assert 0.0 <= report["base"]["C"] <= 1.0
    assert sheet.is_file()


def test_building_again_keeps_the_trained_autoencoder(tmp_path: Path) -> None:
    phase = AutoencoderRecipe(channels=8, steps=1, batch_size=4, scenes=4)
    recipe = BaseRecipe(
        width=32,
        heads=1,
        double_blocks=1,
        single_blocks=1,
        pictures=4,
        steps=2,
        tagging=TAGGING,
        batch_size=2,
    )
    folder = build(tmp_path / "tiny", phases=(phase,), recipe=recipe, compile_base=False)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    before = weights.stat().st_size
    build(folder, phases=(phase,), recipe=recipe, compile_base=False)
    assert weights.stat().st_size == before


def small_base(steps: int = 6) -> tuple[BaseRecipe, BaseModel, Corpus, tuple[Tensor, Tensor]]:
    """A base of one block of each kind and sixteen random pictures."""
    recipe = BaseRecipe(
        width=32, heads=1, double_blocks=1, single_blocks=1, steps=steps, batch_size=4
    )
    torch.manual_seed(0)
    model, clip, t5 = new_base(recipe)
    corpus = Corpus(
        tokens=torch.randn(16, 36, 64).bfloat16(),
        clip_ids=torch.randint(5, len(clip), (16, CLIP_LENGTH)),
        t5_ids=torch.randint(5, len(t5), (16, T5_LENGTH)),
    )
    return recipe, model, corpus, (token_ids(clip, CLIP_LENGTH), token_ids(t5, T5_LENGTH))


def weights_of(model: BaseModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_pretraining_continues_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "state.safetensors"
    recipe, model, corpus, nothing = small_base()
    whole = weights_of(pretrain(recipe, corpus, model, nothing))

    monkeypatch.setattr(pretraining, "SAVE_EVERY", 3)
    original = pretraining.descend

    def interrupted(now: Any, *rest: Any) -> float:
        if now.step == 5:
            raise KeyboardInterrupt
        return original(now, *rest)

    monkeypatch.setattr(pretraining, "descend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe, corpus, small_base()[1], nothing, state)
    assert state.is_file()
    steps = []

    def counted(now: Any, *rest: Any) -> float:
        steps.append(now.step)
        return original(now, *rest)

    monkeypatch.setattr(pretraining, "descend", counted)
    again = weights_of(pretrain(recipe, corpus, small_base()[1], nothing, state))
    assert steps == [3, 4, 5]
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_state_of_another_recipe_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    recipe, model, corpus, nothing = small_base()
    now = pretraining.Pretraining.begin(model, recipe)
    pretraining.save_state(now, state, pretraining.origin(recipe, corpus))
    with pytest.raises(CheckpointError, match="under another recipe"):
        pretrain(replace(recipe, lr=1.0), corpus, model, nothing, state)
    with pytest.raises(CheckpointError, match="under another corpus"):
        pretrain(recipe, replace(corpus, tokens=corpus.tokens * 2), model, nothing, state)
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is damaged, remove it to begin anew"):
        pretrain(recipe, corpus, model, nothing, state)


def test_shipped_folder_is_small_and_complete() -> None:
    folder = tiny.path()
    total = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    assert total <= 10_000_000
    assert (folder / "quality.json").is_file()


def test_tags_lie_on_the_words_of_their_item() -> None:
    t5 = t5_tokenizer(WORDS)
    ids, tags = tagging_batch(t5, np.random.default_rng(0), 16)
    for row_ids, row_tags in zip(ids, tags, strict=True):
        words = [word.strip("▁") for word in t5.convert_ids_to_tokens(row_ids.tolist())]
        for word, tag in zip(words, row_tags.tolist(), strict=True):
            if word in COLOURS and tag[0] >= 0:
                assert tag[2] == list(COLOURS).index(word)
            if word in ("and", "background", "on", "<pad>", "</s>"):
                assert tag == [-100] * 5


def test_t5_learns_to_tag() -> None:
    t5 = t5_tokenizer(WORDS)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(t5),
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
    )
    recipe = TaggingRecipe(steps=40, batch_size=16, lr=1e-2)
    # chance, with every class equally frequent, is 0.27
    assert train_tagging(T5EncoderModel(config), t5, recipe) > 0.33
