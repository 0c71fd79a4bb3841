"""The base model of tiny-flux: text encoders and transformer, pretrained together on ShapeWeave.

The transformer is the stock ``FluxTransformer2DModel``; CLIP and T5 are the stock encoder classes
at a small size. FLUX receives pretrained encoders, here they learn with the transformer.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from prw_flux.arithmetic import arithmetic
from prw_flux.encode import pack, position_ids
from prw_flux.flow import interpolate, resolution_shift, sample_times, velocity_target
from prw_flux.tiny.autoencoder import to_tensor, warmup_cosine
from prw_flux.tiny.corpus import draw_content, paint, vocabulary
from prw_flux.tiny.text_pretraining import TaggingRecipe
from prw_flux.tiny.text_tokenizers import CLIP_LENGTH, T5_LENGTH, clip_tokenizer, t5_tokenizer

logger = logging.getLogger(__name__)

GRID = 6
"""Packed tokens per side at 96 pixels: 8 x 8 pixels a latent, 2 x 2 latents a token."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of pretraining from the averaged weights of the one before.

    Rates fall along a cosine that would end at step ``horizon``; training stops after ``steps``.
    """

    steps: int
    horizon: int
    lr: float
    muon_lr: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class BaseRecipe:
    """How the base is pretrained. ``pictures`` is the size of the pre-encoded training set."""

    width: int = 128
    heads: int = 4
    double_blocks: int = 2
    single_blocks: int = 6
    pictures: int = 50_000
    phases: tuple[Phase, ...] = (
        Phase(steps=4000, horizon=11_500, lr=2e-3, muon_lr=4e-3, seed=0),
        Phase(steps=4500, horizon=4500, lr=1.5e-3, muon_lr=3e-3, seed=1),
    )
    tagging: TaggingRecipe = TaggingRecipe()
    batch_size: int = 64
    caption_dropout: float = 0.05
    ema: float = 0.999
    seed: int = 0


class BaseModel(nn.Module):
    """Everything that learns: T5 and CLIP encoders and the transformer, as one module."""

    def __init__(self, recipe: BaseRecipe, clip_vocab: int, t5_vocab: int, clip_end: int) -> None:
        super().__init__()
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=clip_vocab, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=CLIP_LENGTH, projection_dim=64,
                bos_token_id=clip_end - 1, eos_token_id=clip_end, pad_token_id=clip_end,
            )
        )  # fmt: skip
        self.text_encoder_2 = T5EncoderModel(
            T5Config(
                vocab_size=t5_vocab, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4,
                feed_forward_proj="gated-gelu", dropout_rate=0.0,
            )
        )  # fmt: skip
        head = recipe.width // recipe.heads
        axes = (head // 4, 3 * head // 8, 3 * head // 8)
        self.transformer = FluxTransformer2DModel(
            patch_size=1, in_channels=64, num_layers=recipe.double_blocks,
            num_single_layers=recipe.single_blocks, attention_head_dim=head,
            num_attention_heads=recipe.heads, joint_attention_dim=128, pooled_projection_dim=64,
            guidance_embeds=True, axes_dims_rope=axes,
        )  # fmt: skip

    def encode(self, clip_ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids to (text [B, L, 128], pooled [B, 64])."""
        text = self.text_encoder_2(t5_ids)[0]
        return text, self.text_encoder(clip_ids).pooler_output

    def forward(self, noisy: Tensor, time: Tensor, guidance: Tensor,
                clip_ids: Tensor, t5_ids: Tensor) -> Tensor:  # fmt: skip
        """Velocity [B, 36, 64] of packed noisy latents at ``time`` [B] in [0, 1]."""
        text, pooled = self.encode(clip_ids, t5_ids)
        velocity: Tensor = self.transformer(
            hidden_states=noisy, encoder_hidden_states=text, pooled_projections=pooled,
            timestep=time, guidance=guidance, img_ids=position_ids(GRID, GRID),
            txt_ids=torch.zeros(text.shape[1], 3), return_dict=False,
        )[0]  # fmt: skip
        return velocity


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Pre-encoded training pairs: packed latents [N, 36, 64] (bf16) and token ids."""

    tokens: Tensor
    clip_ids: Tensor
    t5_ids: Tensor


def build_corpus(recipe: BaseRecipe, vae: AutoencoderTiny) -> Corpus:
    """Draw, paint, encode and tokenise ``recipe.pictures`` pairs."""
    rng = np.random.default_rng(recipe.seed + 1)
    words = vocabulary()
    clip, t5 = clip_tokenizer(words), t5_tokenizer(words)
    tokens: list[Tensor] = []
    clip_ids: list[Tensor] = []
    t5_ids: list[Tensor] = []
    for start in range(0, recipe.pictures, 256):
        contents = [draw_content(rng) for _ in range(min(256, recipe.pictures - start))]
        image = to_tensor(np.stack([paint(content) for content in contents]))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            tokens.append(pack(vae.encoder(image)).to(torch.bfloat16))
        texts = [vary(content.text, rng) for content in contents]
        for tokenizer, ids, length in ((clip, clip_ids, CLIP_LENGTH), (t5, t5_ids, T5_LENGTH)):
            encoded = tokenizer(texts, padding="max_length", max_length=length, truncation=True)
            ids.append(torch.tensor(encoded.input_ids))
    return Corpus(tokens=torch.cat(tokens), clip_ids=torch.cat(clip_ids), t5_ids=torch.cat(t5_ids))


def vary(text: str, rng: np.random.Generator) -> str:
    """A capital first letter one time in five, a final full stop one time in ten."""
    if rng.random() < 0.2:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.1 else text


def optimizers(model: BaseModel, phase: Phase) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for all else."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        inside = "blocks." in name and "norm" not in name and parameter.ndim == 2
        (matrices if inside else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=phase.muon_lr, weight_decay=0.0,
                         adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=phase.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]  # fmt: skip


def pretrain(
    recipe: BaseRecipe,
    phase: Phase,
    corpus: Corpus,
    model: BaseModel,
    unconditional: tuple[Tensor, Tensor],
    on_save: Callable[[BaseModel, int], None] = lambda model, step: None,
    save_every: int = 1000,
) -> BaseModel:
    """One phase of flow matching with the velocity as target; returns the averaged weights.

    Args:
        recipe: batch size, caption dropout, averaging.
        phase: steps and rates.
        corpus: what is learnt.
        model: the weights at the start; trained in place.
        unconditional: CLIP and T5 token ids of the empty text, for dropped captions.
        on_save: called with the averaged weights and the number of steps taken.
        save_every: how often it is called.
    """
    generator = torch.Generator().manual_seed(phase.seed)
    average = copy.deepcopy(model).requires_grad_(False)
    steppers = optimizers(model, phase)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda s: warmup_cosine(s, phase.horizon))
                 for o in steppers]  # fmt: skip
    running, started = math.nan, time.time()
    for step in range(phase.steps):
        loss = batch_loss(model, corpus, recipe, generator, unconditional)
        for optimizer in steppers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(steppers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        update_average(average, model, min(recipe.ema, (step + 1) / (step + 10)))
        value = float(loss.detach())
        running = value if math.isnan(running) else 0.99 * running + 0.01 * value
        if step % 100 == 0:
            seconds = (time.time() - started) / (step + 1)
            logger.info("base step %d/%d: loss %.4f, %.3f s a step", step, phase.steps, running,
                        seconds)  # fmt: skip
        if (step + 1) % save_every == 0:
            on_save(average, step + 1)
    return average.eval()


def batch_loss(
    model: BaseModel,
    corpus: Corpus,
    recipe: BaseRecipe,
    generator: torch.Generator,
    unconditional: tuple[Tensor, Tensor],
) -> Tensor:
    """Mean squared error of the velocity on one random batch."""
    size = recipe.batch_size
    index = torch.randint(len(corpus.tokens), (size,), generator=generator)
    clean = corpus.tokens[index].float()
    clip_ids, t5_ids = corpus.clip_ids[index], corpus.t5_ids[index]
    dropped = torch.rand(size, generator=generator) < recipe.caption_dropout
    clip_ids = torch.where(dropped[:, None], unconditional[0], clip_ids)
    t5_ids = torch.where(dropped[:, None], unconditional[1], t5_ids)
    time = sample_times(size, generator, shift=resolution_shift(GRID * GRID))
    guidance = 1 + 4 * torch.rand(size, generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    noisy = interpolate(clean, noise, time)
    with arithmetic("cpu", "bf16"):
        velocity = model(noisy, time, guidance, clip_ids, t5_ids)
    return nn.functional.mse_loss(velocity.float(), velocity_target(clean, noise))


def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Exponential moving average of the parameters, in place."""
    with torch.no_grad():
        ours: list[Tensor] = list(average.parameters())
        torch._foreach_lerp_(ours, list(model.parameters()), 1 - decay)


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The scheduler configuration of FLUX.1-dev."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=True, base_shift=0.5,
        max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096,
    )  # fmt: skip
