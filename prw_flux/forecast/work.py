"""Floating-point operations of a training step, from the transformer's configuration.

A matrix product of [n, a] and [a, b] is 2 n a b operations; norms, activations, RoPE and softmax
are left out, as in torch's FlopCounterMode, with which a test compares these counts.

The base is frozen. Its weights need no gradient, so that the backward of a linear layer costs what
its forward does, and where nothing before it learns, nothing. What learns acts on the K and V of
the source: the first block's inputs need no gradient, and of the source's last block only K and V
do.

Shapes: S source, N noisy and L text tokens, D width, r rank of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

CHANNELS_OF_TIME = 256


@final
@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations of one sample.

    Attributes:
        source, main: forward of both passes.
        backward: of both.
        again: what checkpointing computes a second time.
        encoding: of source, target and text, where they are not cached.
    """

    source: int
    main: int
    backward: int
    again: int = 0
    encoding: int = 0

    @property
    def total(self) -> int:
        """Of a training step, per sample."""
        return self.source + self.main + self.backward + self.again + self.encoding


@final
@dataclass(frozen=True, kw_only=True)
class Tokens:
    """How long the sequences of one sample are."""

    source: int
    noisy: int
    text: int

    @property
    def main(self) -> int:
        """Queries of the main pass."""
        return self.noisy + self.text


def step_work(
    config: Any,
    tokens: Tokens,
    *,
    rank: int,
    draws: int = 1,
    checkpointing: bool = True,
    flash: bool = True,
    encoding: int = 0,
) -> Work:
    """Operations of one sample of a training step: one source, `draws` noisy latents.

    Args:
        config: of the transformer.
        tokens: of the sample.
        rank: of an expert; one acts on each source token.
        draws: noisy latents that share the source.
        checkpointing: whether the blocks run a second time in the backward.
        flash: whether the backward of attention computes the scores again: 2.5 forwards, else 2.
        encoding: operations of the encoders.
    """
    model = Model.of(config)
    source, main = model.source_blocks(tokens, rank), model.main_blocks(tokens)
    ends = model.ends(tokens.source, 0), model.ends(tokens.noisy, tokens.text)
    backward = model.source_backward(tokens, rank, flash)
    backward += draws * model.main_backward(tokens, flash)
    return Work(
        source=source + ends[0],
        main=draws * (main + ends[1]),
        backward=backward,
        again=source + draws * main if checkpointing else 0,
        encoding=encoding,
    )


@final
@dataclass(frozen=True, kw_only=True)
class Model:
    """What of a FLUX transformer decides its work.

    A double block multiplies each row of either stream with 12 D^2 weights (Q, K, V 3; output 1;
    MLP 8), a single block every row with as many (Q, K, V 3; MLP in 4; out of both 5).
    """

    width: int
    double: int
    single: int
    channels: int
    out_channels: int
    text_width: int
    pooled_width: int
    guidance: bool

    @classmethod
    def of(cls, config: Any) -> Model:
        """Of a transformer's configuration."""
        return cls(
            width=config.num_attention_heads * config.attention_head_dim,
            double=config.num_layers,
            single=config.num_single_layers,
            channels=config.in_channels,
            out_channels=config.out_channels or config.in_channels,
            text_width=config.joint_attention_dim,
            pooled_width=config.pooled_projection_dim,
            guidance=config.guidance_embeds,
        )

    @property
    def blocks(self) -> int:
        """Of both kinds."""
        return self.double + self.single

    def attention(self, queries: int, keys: int) -> int:
        """Scores and their product with V, of one block."""
        return 4 * self.width * queries * keys

    def attention_backward(self, blocks: int, queries: int, keys: int, flash: bool) -> int:
        """Of so many blocks; the queries of the first need no gradient, which flash computes."""
        one = self.attention(queries, keys)
        return blocks * 5 * one // 2 if flash else max(0, 4 * blocks - 1) * one // 2

    def ends(self, image: int, text: int) -> int:
        """Embeddings of tokens, time, guidance and pooled text; the last norm and projection."""
        d = self.width
        embedded = 2 * d * (self.channels * image + self.text_width * text)
        times = (2 if self.guidance else 1) * 2 * d * (CHANNELS_OF_TIME + d)
        pooled = 2 * d * (self.pooled_width + d)
        return embedded + times + pooled + 4 * d * d + 2 * d * self.out_channels * image

    def modulation(self) -> int:
        """Shifts, scales and gates of all blocks, of one sample."""
        return self.width**2 * (24 * self.double + 6 * self.single)

    def expert(self, tokens: Tokens, rank: int) -> int:
        """A and B of K and V in one block."""
        return 8 * self.width * rank * tokens.source

    def source_blocks(self, tokens: Tokens, rank: int) -> int:
        """Forward of the source through all blocks."""
        one = 24 * self.width**2 * tokens.source + self.attention(tokens.source, tokens.source)
        return self.blocks * (one + self.expert(tokens, rank)) + self.modulation()

    def main_blocks(self, tokens: Tokens) -> int:
        """Forward of one noisy latent and its text, which also attend to the source."""
        keys = tokens.main + tokens.source
        one = 24 * self.width**2 * tokens.main + self.attention(tokens.main, keys)
        return self.blocks * one + self.modulation()

    def source_backward(self, tokens: Tokens, rank: int, flash: bool) -> int:
        """Q, K, V from the second block on; the rest of a block in all but the last."""
        d, rows, inner = self.width, tokens.source, self.blocks - 1
        into_experts = self.blocks * 2 * self.expert(tokens, rank) - 4 * d * rank * rows
        projections = max(inner - 1, 0) * 6 * d * d * rows + min(inner, 1) * 4 * d * d * rows
        rest = inner * 18 * d * d * rows
        attended = self.attention_backward(inner, rows, rows, flash)
        return into_experts + projections + rest + attended

    def main_backward(self, tokens: Tokens, flash: bool) -> int:
        """All blocks; of the first not Q, K and V of its own rows."""
        d, rows = self.width, tokens.main
        linear = (self.blocks * 24 - 6) * d * d * rows + 2 * d * self.out_channels * tokens.noisy
        return linear + self.attention_backward(self.blocks, rows, rows + tokens.source, flash)
