"""The attention processor that gives FLUX.1 its source.

Equations 4 to 7 of CoLoGen (arXiv 2602.22150), read as one masked joint attention: the source
attends to itself with keys and values refined by an expert, text and noisy tokens attend to
everything. Source rows form a closed system under that mask, so they run as a pass of their own,
and the main pass only needs their keys and values.

Shapes: B samples, S tokens, T keys of the source, H heads, D channels of a head, O = H D.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    _get_qkv_projections,
)
from torch import Tensor

from prw_flux.arithmetic import attention, written_out
from prw_flux.parallel import refine
from prw_flux.source_cache import FluxCall, Slot

if TYPE_CHECKING:
    from prw_flux.adapter import PRWAdapter

Rotary: TypeAlias = tuple[Tensor, Tensor]
Attended: TypeAlias = Tensor | tuple[Tensor, Tensor]


class PRWFluxAttnProcessor(FluxAttnProcessor):
    """Stock attention, unless the call says that this is a source pass or that there is a source.

    The adapter is referenced, not registered: the transformer's state dict stays stock.

    Args:
        adapter: Owner of the experts.
        layer: Index of this block in the order in which the blocks run.
    """

    def __init__(self, adapter: PRWAdapter | None = None, layer: int = -1) -> None:
        if adapter is None:
            raise ValueError(
                "PRWFluxAttnProcessor needs an adapter; something re-created the processors of a "
                "transformer with PRW attached (an IP-Adapter loader does): detach() first."
            )
        super().__init__()
        self.adapter = adapter
        self.pool = adapter.pools[layer]
        self.layer = layer
        self.slot: Slot | None = None

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
        prw: FluxCall | None = None,
    ) -> Attended:
        """Attention of one block; arguments and result as in `FluxAttnProcessor`.

        Args:
            attn: The block's attention.
            hidden_states: [B, S, O] image rows, or text and image rows in a single-stream block.
            encoder_hidden_states: [B, L, O] text rows of a double-stream block.
            attention_mask: Of the stock path only.
            image_rotary_emb: Rotary tables of text and image rows.
            prw: The pass; None is the stock path.
        """
        if prw is None:
            stock: Attended = super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
            return stock
        if attention_mask is not None:
            raise ValueError("An attention mask cannot be combined with a source image.")
        qkv = self._projections(attn, hidden_states, encoder_hidden_states, prw)
        query, key, value = _normed_heads(attn, qkv, image_rotary_emb)
        slot = self.slot if self.slot is not None else prw.cache.slots[self.layer]
        if prw.mode == "source":
            slot.write(key, value.contiguous())
        else:
            source_key, source_value = slot.read(key)
            key = torch.cat([key, source_key], dim=1)
            value = torch.cat([value, source_value], dim=1)
        backend, parallel = self._attention_backend, self._parallel_config
        if written_out() and backend is None and parallel is None:
            out_BSHD = attention(query, key, value)
        else:
            out_BSHD = dispatch_attention_fn(
                query, key, value, backend=backend, parallel_config=parallel
            )
        out_BSO: Tensor = out_BSHD.flatten(2, 3).to(query.dtype)
        if encoder_hidden_states is None:
            return out_BSO
        return _project_out(attn, out_BSO, encoder_hidden_states.shape[1])

    def _projections(
        self, attn: FluxAttention, x_BSO: Tensor, text_BLO: Tensor | None, call: FluxCall
    ) -> tuple[Tensor, ...]:
        """Base projections; in a source pass the expert's residual joins K and V (Eq. 4)."""
        if call.mode != "source":
            stock: tuple[Tensor, ...] = _get_qkv_projections(attn, x_BSO, text_BLO)
            return stock
        if call.grad and not torch.is_grad_enabled():
            raise RuntimeError(
                "A reentrant checkpoint would lose the gradient of the source: use "
                "transformer.enable_gradient_checkpointing() without a function of your own."
            )
        if not attn.fused_projections and self._parallel_config is None and call.scale == 1.0:
            bases = {"to_k": attn.to_k, "to_v": attn.to_v}
            refined, _ = self.pool.project(bases, x_BSO, call.prw)
            text = _text_projections(attn, text_BLO)
            return attn.to_q(x_BSO), refined["to_k"], refined["to_v"], *text
        query, key, value, *text = _get_qkv_projections(attn, x_BSO, text_BLO)
        base = {"to_k": key, "to_v": value}
        refined = refine(self.pool, base, x_BSO, call.prw, self._parallel_config)
        if call.scale != 1.0:
            refined["to_k"] = torch.lerp(key, refined["to_k"], call.scale)
            refined["to_v"] = torch.lerp(value, refined["to_v"], call.scale)
        return query, refined["to_k"], refined["to_v"], *text


def _text_projections(attn: FluxAttention, text_BLO: Tensor | None) -> tuple[Tensor, ...]:
    """Q, K and V of the text rows in a double-stream block."""
    if text_BLO is None or attn.added_kv_proj_dim is None:
        return ()
    return attn.add_q_proj(text_BLO), attn.add_k_proj(text_BLO), attn.add_v_proj(text_BLO)


def _normed_heads(
    attn: FluxAttention, qkv: tuple[Tensor, ...], rotary: Rotary | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Heads, k- and q-norm, [text, image] in a double-stream block, then RoPE on q and k."""
    query, key, value = (_heads(x, attn.head_dim) for x in qkv[:3])
    query, key = attn.norm_q(query), attn.norm_k(key)
    if attn.added_kv_proj_dim is not None:
        text_q, text_k, text_v = (_heads(x, attn.head_dim) for x in qkv[3:])
        query = torch.cat([attn.norm_added_q(text_q), query], dim=1)
        key = torch.cat([attn.norm_added_k(text_k), key], dim=1)
        value = torch.cat([text_v, value], dim=1)
    if rotary is not None:
        query = apply_rotary_emb(query, rotary, sequence_dim=1)
        key = apply_rotary_emb(key, rotary, sequence_dim=1)
    return query, key, value


def _heads(x_BSO: Tensor, head_dim: int) -> Tensor:
    return x_BSO.view(*x_BSO.shape[:-1], x_BSO.shape[-1] // head_dim, head_dim)


def _project_out(attn: FluxAttention, out_BSO: Tensor, text_rows: int) -> tuple[Tensor, Tensor]:
    """Split [text, image] and apply both output projections: (image rows, text rows)."""
    text, image = out_BSO[:, :text_rows], out_BSO[:, text_rows:]
    image = attn.to_out[1](attn.to_out[0](image.contiguous()))
    return image, attn.to_add_out(text.contiguous())
