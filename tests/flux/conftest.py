"""A FLUX.1 small enough for a test, random everywhere, and an adapter with trained-like experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from prw_flux import CoLoGenPipeline, PRWAdapter

WORDS = ["a", "red", "blue", "square", "circle", "the", "make"]
SENTENCES = {
    "edit": {"sentence": "Change the picture.", "aligned": True},
    "customise": {"sentence": "Show this thing elsewhere.", "aligned": False},
}


@pytest.fixture(autouse=True)
def quiet_diffusers() -> Iterator[None]:
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


@pytest.fixture
def make_transformer() -> Callable[..., FluxTransformer2DModel]:
    """One double and two single blocks of width 32; its weights are random, none is zero."""

    def make(*, guidance: bool = True, dtype: torch.dtype = torch.float32) -> Any:
        torch.manual_seed(0)
        model = FluxTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=guidance,
            axes_dims_rope=(4, 6, 6),
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return model.to(dtype).eval()

    return make


@pytest.fixture
def make_adapter() -> Callable[..., PRWAdapter]:
    """An adapter of rank 4 whose experts act and whose routers choose between them."""

    def make(transformer: FluxTransformer2DModel, stages: int = 2, **settings: Any) -> PRWAdapter:
        torch.manual_seed(1)
        adapter = PRWAdapter.for_transformer(
            transformer, **{"rank": 4, "tasks": SENTENCES, "resolution": 32, **settings}
        )
        for index in range(stages):
            adapter.weave.unlock(f"stage{index}")
            with torch.no_grad():
                for parameter in adapter.weave.parameters():
                    parameter.add_(0.3 * torch.randn_like(parameter))
        return adapter.to(transformer.dtype).eval()

    return make


@pytest.fixture(autouse=True)
def silent_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FluxPipeline, "_progress_bar_config", {"disable": True}, raising=False)


def word_tokenizer(length: int, begin: str, end: str) -> Tokenizer:
    vocabulary = {word: i for i, word in enumerate(["<pad>", begin, end, "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", special_tokens=[(begin, 1), (end, 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token=end,
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=length,
    )


@pytest.fixture
def make_base(make_transformer: Any) -> Callable[..., FluxPipeline]:
    """A FluxPipeline with an autoencoder of factor 8, CLIP and T5 of width 16 and 32."""

    def make(tiny_vae: bool = False) -> FluxPipeline:
        torch.manual_seed(3)
        clip = CLIPTextConfig(
            vocab_size=16,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=12,
            eos_token_id=2,
            bos_token_id=1,
            pad_token_id=0,
        )
        t5 = T5Config(vocab_size=16, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        kl = {
            "block_out_channels": (4, 4, 4, 4),
            "norm_num_groups": 2,
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "latent_channels": 16,
            "scaling_factor": 0.36,
            "shift_factor": 0.12,
        }
        tiny = {
            "latent_channels": 16,
            "encoder_block_out_channels": (4, 4, 4, 4),
            "decoder_block_out_channels": (4, 4, 4, 4),
        }
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=AutoencoderTiny(**tiny) if tiny_vae else AutoencoderKL(**kl),
            text_encoder=CLIPTextModel(clip).eval(),
            tokenizer=word_tokenizer(12, "<bos>", "<eos>"),
            text_encoder_2=T5EncoderModel(t5).eval(),
            tokenizer_2=word_tokenizer(10, "<s>", "</s>"),
            transformer=make_transformer(),
        )

    return make


@pytest.fixture
def make_pipe(make_base: Any, make_adapter: Any) -> Callable[..., CoLoGenPipeline]:
    def make(tiny_vae: bool = False, **settings: Any) -> CoLoGenPipeline:
        base = make_base(tiny_vae)
        adapter = make_adapter(base.transformer, **settings)
        return CoLoGenPipeline.from_pipe(base, prw=adapter)

    return make


@pytest.fixture
def photo() -> Callable[..., Image.Image]:
    """A random picture, of its seed."""

    def make(height: int = 32, width: int = 32, seed: int = 0) -> Image.Image:
        rng = np.random.default_rng(seed)
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))

    return make


@pytest.fixture
def run() -> Callable[..., Any]:
    """Three steps of a pipeline from a fixed seed, as latents unless the call says otherwise."""

    def call(pipe: Any, prompt: Any = None, **kwargs: Any) -> Any:
        settings = {"num_inference_steps": 3, "output_type": "latent"}
        settings["generator"] = torch.Generator().manual_seed(5)
        return pipe(prompt=prompt, **(settings | kwargs)).images

    return call


@pytest.fixture
def make_batch() -> Callable[..., dict[str, Tensor]]:
    """Inputs of `TwoPass.forward`: a 2 x 2 token grid, a 2 x 3 source, 5 text tokens."""

    def make(batch: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        from prw_flux.encode import position_ids

        generator = torch.Generator().manual_seed(2)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        return {
            "noisy_BNC": draw(batch, 4, 64),
            "noisy_ids_N3": position_ids(2, 2, dtype=dtype),
            "text_BLE": draw(batch, 5, 32),
            "pooled_BP": draw(batch, 16),
            "timestep_B": torch.linspace(0.3, 0.8, batch, dtype=dtype),
            "source_BSC": draw(batch, 6, 64),
            "source_ids_S3": position_ids(2, 3, offset=(0, -3), dtype=dtype),
            "source_pooled_BP": draw(1, 16),
        }

    return make


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole pipeline folder in FLUX.1's layout: tiny-flux's parts, smaller and random."""
    from prw_flux.tiny.autoencoder import new_autoencoder
    from prw_flux.tiny.base import BaseRecipe
    from prw_flux.tiny.build import new_base, write_folder

    torch.manual_seed(0)
    recipe = BaseRecipe(width=32, heads=2, double_blocks=1, single_blocks=1)
    model, clip, t5 = new_base(recipe)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("tiny") / "base"
    write_folder(folder, new_autoencoder(8), model, clip, t5)
    return folder


@pytest.fixture(scope="session")
def short_config(tiny_base: Path) -> Any:
    """Three stages of three steps on `tiny_base`: a run of a second."""
    from prw_flux.recipes import demo

    config = demo().with_settings(
        [f"base.path={tiny_base}", "size=64", "data.samples=6", "log_every=2", "save_every=2",
         "adapter.rank=2", "adapter.alpha=none", "precision=fp32", "stages.*.steps=3",
         "stages.*.batch_size=2", "optimizer.warmup=1", "remember=3", "held_out.samples=0"]
    )  # fmt: skip
    return replace(config, stages=config.stages[:3])


@pytest.fixture
def make_bare_pipe(make_transformer: Any, make_adapter: Any) -> Callable[..., Any]:
    """A CoLoGenPipeline without text encoders, for `embedded` calls."""

    def make(transformer: Any = None, **settings: Any) -> Any:
        from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler

        from prw_flux import CoLoGenPipeline

        transformer = make_transformer() if transformer is None else transformer
        adapter = make_adapter(transformer, **settings)
        torch.manual_seed(4)
        pipe = CoLoGenPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=AutoencoderTiny(
                latent_channels=16,
                encoder_block_out_channels=(4, 4, 4, 4),
                decoder_block_out_channels=(4, 4, 4, 4),
            ),
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=transformer,
            prw=adapter,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def edited() -> Callable[..., Tensor]:
    """Latents of a pipeline with a fixed source, text, pooled sentence and noise."""

    def run(pipe: Any, **call: Any) -> Tensor:
        generator = torch.Generator().manual_seed(6)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(pipe.transformer.dtype)

        call = {
            "prompt_embeds": draw(1, 5, 32),
            "pooled_prompt_embeds": draw(1, 16),
            "latents": draw(1, 4, 64),
            "image": draw(1, 16, 4, 4),
            "source_pooled_embeds": draw(1, 16),
            "task": "edit",
            "height": 32,
            "width": 32,
            "num_inference_steps": 3,
            "output_type": "latent",
        } | call
        out: Tensor = pipe(**{k: v for k, v in call.items() if v is not None}).images
        return out

    return run
