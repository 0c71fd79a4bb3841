"""The base model of tiny-flux: text encoders and transformer, pretrained together on ShapeWeave.

The transformer is the stock ``FluxTransformer2DModel``; CLIP and T5 are the stock encoder classes
at a small size. FLUX receives pretrained encoders, here they learn with the transformer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from prw_flux.encode import pack, position_ids
from prw_flux.tiny.autoencoder import to_tensor
from prw_flux.tiny.corpus import draw_content, paint, vocabulary
from prw_flux.tiny.text_pretraining import TaggingRecipe
from prw_flux.tiny.text_tokenizers import CLIP_LENGTH, T5_LENGTH, clip_tokenizer, t5_tokenizer

GRID = 6
"""Packed tokens per side at 96 pixels: 8 x 8 pixels a latent, 2 x 2 latents a token."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of pretraining that begins with a T5 which has just learnt to tag.

    Attributes:
        steps: of this phase; its rates fall along a cosine that ends there.
        lr, muon_lr: of AdamW and Muon, at their highest.
        text_learns: whether T5 learns along; it then slowly forgets which words belong together.
        seed: of the T5, the batches and the noise.
    """

    steps: int
    lr: float
    muon_lr: float
    text_learns: bool
    seed: int


@dataclass(frozen=True, kw_only=True)
class BaseRecipe:
    """How the base is pretrained.

    Attributes:
        pictures: size of the pre-encoded training set.
        phases: each goes on from the averaged weights of the one before.
        caption_dropout: share of the samples that train with the empty text.
        ema: decay of the averaged weights, which are the result.
    """

    width: int = 128
    heads: int = 4
    double_blocks: int = 2
    single_blocks: int = 6
    pictures: int = 50_000
    tagging: TaggingRecipe = TaggingRecipe()
    phases: tuple[Phase, ...] = (
        Phase(steps=12_000, lr=2e-3, muon_lr=4e-3, text_learns=True, seed=0),
        Phase(steps=3600, lr=1e-3, muon_lr=3e-3, text_learns=False, seed=1),
    )
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


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The scheduler configuration of FLUX.1-dev."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=True, base_shift=0.5,
        max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096,
    )  # fmt: skip
