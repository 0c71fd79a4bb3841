"""Teaching T5 which words belong together, before it learns with the transformer.

FLUX's T5 has read a large part of the web; ours has read nothing, and learning from pictures alone
it does not find out in thousands of steps that "red" belongs to "circle at the left" and not to
"star at the right". So it is first trained to tag: from the output at every word of an item, linear
heads name the item's place, size, colour, texture and shape. The heads are thrown away.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from transformers import T5EncoderModel

from prw_flux.shapeweave.caption import located
from prw_flux.shapeweave.scene import COLOURS, PLACES, SHAPES, SIZES, TEXTURES, Item, draw_scene
from prw_flux.tiny.autoencoder import warmup_cosine
from prw_flux.tiny.text_tokenizers import T5_LENGTH

logger = logging.getLogger(__name__)

IGNORED: Final = -100
CLASSES: Final = (len(PLACES), len(SIZES), len(COLOURS), len(TEXTURES), len(SHAPES))


@dataclass(frozen=True, kw_only=True)
class TaggingRecipe:
    """How long T5 learns to tag."""

    steps: int = 500
    batch_size: int = 128
    lr: float = 3e-3
    seed: int = 0


def train_tagging(encoder: T5EncoderModel, tokenizer: Any, recipe: TaggingRecipe) -> float:
    """Train the encoder in place; returns the share of correct tags over the last tenth."""
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed + 2)
    heads = nn.Linear(encoder.config.d_model, sum(CLASSES))
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, recipe.steps)
    )
    correct: list[float] = []
    for step in range(recipe.steps):
        ids, tags = tagging_batch(tokenizer, rng, recipe.batch_size)
        logits = heads(encoder(ids)[0]).split(CLASSES, dim=-1)
        losses = [
            nn.functional.cross_entropy(part.flatten(0, 1), tags[..., i].flatten())
            for i, part in enumerate(logits)
        ]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step >= 0.9 * recipe.steps or step % 100 == 0:
            correct.append(accuracy(logits, tags))
            if step % 100 == 0:
                logger.info("tagging step %d/%d: %.3f", step, recipe.steps, correct[-1])
    return float(np.mean(correct[-max(1, recipe.steps // 10) :]))


def tagging_batch(tokenizer: Any, rng: np.random.Generator, size: int) -> tuple[Tensor, Tensor]:
    """Token ids [B, L] of captions, and the tags [B, L, 5] of every token, -100 outside items."""
    ids = torch.full((size, T5_LENGTH), tokenizer.pad_token_id)
    tags = torch.full((size, T5_LENGTH, len(CLASSES)), IGNORED)
    for row in range(size):
        scene = draw_scene(rng)
        while scene.held_out():
            scene = draw_scene(rng)
        tokens: list[int] = []
        for number, item in enumerate(scene.items):
            tokens += word_ids(tokenizer, "and") if number else []
            words = word_ids(tokenizer, located(item))
            tags[row, len(tokens) : len(tokens) + len(words)] = torch.tensor(item_tags(item))
            tokens += words
        tokens += word_ids(tokenizer, f"on a {scene.background} background")
        tokens.append(tokenizer.eos_token_id)
        ids[row, : len(tokens)] = torch.tensor(tokens)
    return ids, tags


def word_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids without the end token."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def item_tags(item: Item) -> list[int]:
    """Indices of place, size, colour, texture and shape."""
    return [
        item.place,
        list(SIZES).index(item.size),
        list(COLOURS).index(item.colour),
        TEXTURES.index(item.texture),
        SHAPES.index(item.shape),
    ]


@torch.no_grad()
def accuracy(logits: tuple[Tensor, ...], tags: Tensor) -> float:
    """Share of the tags that are named correctly."""
    counted = tags[..., 0] != IGNORED
    right = [(part.argmax(-1) == tags[..., i])[counted] for i, part in enumerate(logits)]
    return float(torch.stack(right).float().mean())
