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
from prw_flux.tiny.base import BaseModel, BaseRecipe, Corpus, Phase
from prw_flux.tiny.build import build, new_base
from prw_flux.tiny.corpus import FORMS, draw_content, paint, vocabulary
from prw_flux.tiny.measure import measure
from prw_flux.tiny.pretraining import pretrain
from prw_flux.tiny.text_pretraining import TaggingRecipe, tagging_batch, train_tagging
from prw_flux.tiny.text_tokenizers import CLIP_LENGTH, T5_LENGTH, clip_tokenizer, t5_tokenizer

WORDS = vocabulary()
PHASE = Phase(steps=2, lr=1e-3, muon_lr=1e-3, text_learns=True, seed=0)
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
        phases=(PHASE,),
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
        phases=(PHASE,),
        tagging=TAGGING,
        batch_size=2,
    )
    folder = build(tmp_path / "tiny", phases=(phase,), recipe=recipe, compile_base=False)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    before = weights.stat().st_size
    build(folder, phases=(phase,), recipe=recipe, compile_base=False)
    assert weights.stat().st_size == before


Small = tuple[BaseRecipe, Corpus, BaseModel, tuple[Any, Any]]


def small_base() -> Small:
    """A base of one block of each kind and sixteen random pictures."""
    recipe = BaseRecipe(
        width=32, heads=1, double_blocks=1, single_blocks=1, batch_size=4, tagging=TAGGING,
        phases=(replace(PHASE, steps=4), replace(PHASE, steps=4, text_learns=False, seed=1)),
    )  # fmt: skip
    torch.manual_seed(0)
    model, clip, t5 = new_base(recipe)
    corpus = Corpus(
        tokens=torch.randn(16, 36, 64).bfloat16(),
        clip_ids=torch.randint(5, len(clip), (16, CLIP_LENGTH)),
        t5_ids=torch.randint(5, len(t5), (16, T5_LENGTH)),
    )
    return recipe, corpus, model, (clip, t5)


def weights_of(model: BaseModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("stopped", "left"), [(3, 6), (4, 4), (7, 2)])
def test_pretraining_continues_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: int, left: int
) -> None:
    state = tmp_path / "state.safetensors"
    whole = weights_of(pretrain(*small_base()))
    taken = 0
    original = pretraining.descend

    def counted(*given: Any) -> float:
        nonlocal taken
        if taken == stopped:
            raise KeyboardInterrupt
        taken += 1
        return original(*given)

    monkeypatch.setattr(pretraining, "SAVE_EVERY", 2)
    monkeypatch.setattr(pretraining, "descend", counted)
    with pytest.raises(KeyboardInterrupt):
        pretrain(*small_base(), state)
    assert state.is_file()
    taken, stopped = 0, 99
    again = weights_of(pretrain(*small_base(), state))
    assert taken == left
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_t5_stays_what_tagging_made_it_where_it_does_not_learn() -> None:
    recipe, corpus, model, tokenizers = small_base()
    frozen = replace(recipe, phases=recipe.phases[1:])
    pretraining.teach_text(model, tokenizers[1], frozen, frozen.phases[0])
    taught = weights_of(model)
    after = weights_of(pretrain(frozen, corpus, model, tokenizers))
    moved = {name for name in taught if not torch.equal(taught[name], after[name])}
    assert moved and not any(name.startswith("text_encoder_2.") for name in moved)


def test_a_state_of_another_recipe_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    recipe, corpus, model, tokenizers = small_base()
    pretrain(recipe, corpus, model, tokenizers, state)
    with pytest.raises(CheckpointError, match="under another recipe"):
        pretrain(replace(recipe, ema=0.9), corpus, model, tokenizers, state)
    with pytest.raises(CheckpointError, match="under another corpus"):
        other = replace(corpus, tokens=corpus.tokens * 2)
        pretrain(recipe, other, model, tokenizers, state)
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is damaged, remove it to begin anew"):
        pretrain(recipe, corpus, model, tokenizers, state)


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
