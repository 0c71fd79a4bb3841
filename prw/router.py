"""Routers: how an input and the router's columns become a choice of one expert.

Shape suffixes: T routed rows (tokens, or samples), D width of what the router reads, K width of the
context, E experts that take part, C columns after padding to whole blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from prw.errors import ConfigError
from prw.named_object import named_object

BLOCK = 16
"""Columns per matrix product. A product of another width gives other bits, so it never varies."""


@dataclass(frozen=True)
class Routing:
    """The result of routing: who was chosen, with what weight.

    Attributes:
        expert: int64, ``[..., tokens]`` or, per sample, ``[samples]``.
        gate: weight of the chosen expert, shaped like ``expert``; fp32 (fp64 for fp64 inputs).
        probs: probabilities of the experts that took part, ``[*expert.shape, E]``, typed alike.
    """

    expert: Tensor
    gate: Tensor
    probs: Tensor


@dataclass(frozen=True)
class RouterPass:
    """One evaluation of a router: what it was given and the probabilities that came out.

    Attributes:
        router: that was evaluated.
        h_TD, signal, noise, eps_TE: as in `Router.logits`.
        probs_TE: p.
    """

    router: Router
    h_TD: Tensor
    signal: Sequence[Tensor]
    noise: Sequence[Tensor]
    eps_TE: Tensor | None
    probs_TE: Tensor

    def logits(self) -> Tensor:
        """The logits once more, ``[T, E]``, with a graph that ends at the columns.

        In the router's own precision, wherever it is asked: autocast is off.
        """
        given = self.h_TD.detach(), self.signal, self.noise, self.eps_TE
        with torch.autocast(self.h_TD.device.type, enabled=False):
            return self.router.locked(*given)[:, : len(self.signal)]


class Router(ABC):
    """A pure function from an input and columns to logits; the choice among them is always top-1.

    A router of one's own implements `logits`, holds no state, and is named in the configuration as
    ``package.module:object``. `prw.testing.check_router` tries whether it keeps the promises that
    growing pools depend on.

    Attributes:
        linear: whether the logits without noise are ``h W_r``.
    """

    linear: ClassVar[bool] = False

    @abstractmethod
    def logits(
        self,
        h_TD: Tensor,
        signal: Sequence[Tensor],
        noise: Sequence[Tensor],
        eps_TE: Tensor | None,
    ) -> Tensor:
        """One logit per row and expert.

        Args:
            h_TD: what the router reads, fp32 or fp64.
            signal: the E signal columns, ``[D]`` each, in the order of the experts.
            noise: the E noise columns; none where the configuration has no noise.
            eps_TE: standard normal noise; None in deterministic calls.

        Returns:
            ``[T, E]``, or ``[T, C]`` with anything in the padding.
        """

    @final
    def route(
        self,
        h_TD: Tensor,
        signal: Sequence[Tensor],
        noise: Sequence[Tensor] = (),
        eps_TE: Tensor | None = None,
    ) -> Routing:
        """``p = softmax(logits)``, ``e = argmax``, ``gate = p_e`` (CoLoGen, Eq. 3 and 4).

        The softmax is over the experts that take part; a tie goes to the lowest index; the gate is
        not renormalised.

        Returns:
            Routing with ``expert`` and ``gate`` ``[T]`` and ``probs`` ``[T, E]``.
        """
        logits_TC = self.locked(h_TD, signal, noise, eps_TE)
        probs_TC = torch.softmax(logits_TC, dim=-1)
        expert_T = logits_TC.detach().argmax(dim=-1)
        gate_T = probs_TC.gather(1, expert_T[:, None]).squeeze(1)
        return Routing(expert_T, gate_T, probs_TC[:, : len(signal)])

    @final
    def locked(
        self,
        h_TD: Tensor,
        signal: Sequence[Tensor],
        noise: Sequence[Tensor] = (),
        eps_TE: Tensor | None = None,
    ) -> Tensor:
        """`logits` with minus infinity in the padding."""
        logits_TC = self.logits(h_TD, signal, noise, eps_TE)
        padding_C = torch.arange(logits_TC.shape[1], device=h_TD.device) >= len(signal)
        return logits_TC.masked_fill(padding_C, -torch.inf)

    def usage_jacobian(
        self, seen: RouterPass, newest: int, keep_T: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The derivative of the straight-through usage ``sum_t u_t`` by the columns.

        ``u_t = 1[e_t = n] + (p_tn - p_tn.detach())``. By automatic differentiation of a second
        evaluation here; the routers of this module have it in closed form.

        Args:
            seen: the evaluation; its rows outside `keep_T` are zero.
            newest: n.
            keep_T: bool, the rows that count; None counts all.

        Returns:
            By the signal and by the noise columns, ``[E, D]`` each.
        """
        count = len(seen.signal)
        # Hooks of its own: those of activation checkpointing would look for this graph once more
        # when they recompute, and a recomputed forward is not observed.
        with saved_tensors_hooks(_same, _same), torch.enable_grad():
            given = [c.detach().requires_grad_() for c in (*seen.signal, *seen.noise)]
            routing = self.route(seen.h_TD.detach(), given[:count], given[count:], seen.eps_TE)
            used_T = routing.probs[:, newest]
            total = (used_T if keep_T is None else torch.where(keep_T, used_T, 0.0)).sum()
            slopes = torch.autograd.grad(total, given, allow_unused=True, materialize_grads=True)
        signal_ED = torch.stack(slopes[:count])
        return signal_ED, torch.stack(slopes[count:]) if seen.noise else signal_ED.new_zeros(0)


def _same(tensor: Tensor) -> Tensor:
    return tensor


@final
class Top1(Router):
    """Plain top-1: ``w = h W_r``, no bias, no noise."""

    linear = True

    def logits(
        self,
        h_TD: Tensor,
        signal: Sequence[Tensor],
        noise: Sequence[Tensor],
        eps_TE: Tensor | None,
    ) -> Tensor:
        """``h W_r``, ``[T, C]``."""
        return column_product(h_TD, signal)

    def usage_jacobian(
        self, seen: RouterPass, newest: int, keep_T: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """``d sum_t u_t / d W_r[:, j] = sum_t h_t p_tn (1[j = n] - p_tj)``."""
        signal_ED = usage_slope(seen.probs_TE, newest, keep_T).T @ seen.h_TD
        return signal_ED, torch.zeros_like(signal_ED) if seen.noise else signal_ED.new_zeros(0)


@final
class NoisyTop1(Router):
    """Noisy top-1: ``w = h W_r + eps * softplus(h W_n)`` (CoLoGen, arXiv 2602.22150, Eq. 2)."""

    linear = True

    def logits(
        self,
        h_TD: Tensor,
        signal: Sequence[Tensor],
        noise: Sequence[Tensor],
        eps_TE: Tensor | None,
    ) -> Tensor:
        """``h W_r + eps * softplus(h W_n)``, ``[T, C]``; without eps, ``h W_r``."""
        logits_TC = column_product(h_TD, signal)
        if eps_TE is None:
            return logits_TC
        eps_TC = F.pad(eps_TE.to(h_TD.dtype), (0, logits_TC.shape[1] - len(signal)))
        return logits_TC + eps_TC * F.softplus(column_product(h_TD, noise))

    def usage_jacobian(
        self, seen: RouterPass, newest: int, keep_T: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """By ``W_r`` as in `Top1`.

        ``d sum_t u_t / d W_n[:, j] = sum_t h_t du_t/dw_tj eps_tj sigmoid(h_t W_n[:, j])``
        """
        slope_TE = usage_slope(seen.probs_TE, newest, keep_T)
        signal_ED = slope_TE.T @ seen.h_TD
        if seen.eps_TE is None:
            return signal_ED, torch.zeros_like(signal_ED)
        width_TE = column_product(seen.h_TD, seen.noise)[:, : len(seen.signal)].sigmoid()
        return signal_ED, (slope_TE * seen.eps_TE.to(signal_ED.dtype) * width_TE).T @ seen.h_TD


def usage_slope(probs_TE: Tensor, newest: int, keep_T: Tensor | None) -> Tensor:
    """``d u_t / d w_tj = p_tn (1[j = n] - p_tj)``, zero in rows that do not count, ``[T, E]``."""
    slope_TE = -probs_TE * probs_TE[:, newest, None]
    slope_TE[:, newest] += probs_TE[:, newest]
    return slope_TE if keep_T is None else torch.where(keep_T[:, None], slope_TE, 0.0)


def find_router(name: str, *, noise: bool) -> Router:
    """The router of a configuration.

    Args:
        name: ``"top1"``, which is `NoisyTop1` with noise and `Top1` without, or a router of one's
            own, ``package.module:object`` (an object, or a class without arguments).
        noise: whether there are noise columns.

    Raises:
        ConfigError: there is no such module or object, or it is no `Router`.
    """
    if name == "top1":
        return NoisyTop1() if noise else Top1()
    found = named_object(name, "router")
    if isinstance(found, type) and issubclass(found, Router):
        try:
            return found()
        except TypeError as error:
            raise ConfigError(f"router {name!r} cannot be made: {error}") from None
    if not isinstance(found, Router):
        what = found.__name__ if isinstance(found, type) else f"a {type(found).__name__}"
        raise ConfigError(f"router {name!r} is {what}, not a prw.Router")
    return found


def router_input(
    x: Tensor, granularity: str, mask: Tensor | None, context: Tensor | None = None
) -> Tensor:
    """What the router reads, in fp32 (fp64 for fp64 inputs): each token, or each sample's mean.

    Args:
        x: ``[..., D]``.
        granularity: ``"token"`` or ``"sample"``.
        mask: bool ``x.shape[:-1]``; per sample only these tokens enter the mean.
        context: ``[samples, K]``, appended to every row of its sample.

    Returns:
        ``[T, D + K]`` with T the number of tokens, or of samples (``x.shape[0]``).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if granularity == "token" or x.dim() == 2:
        rows = x.to(dtype).reshape(-1, x.shape[-1])
    else:
        # The sum casts as it reads: on a GPU there is no copy of x in fp32.
        h = x.flatten(1, -2)
        count: Tensor | int = max(h.shape[1], 1)
        if mask is not None:
            kept = mask.flatten(1)
            h, count = torch.where(kept[..., None], h, 0.0), kept.sum(1, keepdim=True).clamp(min=1)
        rows = h.sum(1, dtype=dtype) / count
    if context is None:
        return rows
    given = context.to(rows.dtype)
    per_sample = rows.shape[0] // max(x.shape[0], 1)
    return torch.cat([rows, given.repeat_interleave(per_sample, 0)], dim=-1)


def column_product(h_TD: Tensor, columns: Sequence[Tensor]) -> Tensor:
    """``h W`` in products of exactly 16 columns, the last block padded with zeros: ``[T, C]``."""
    padding = [h_TD.new_zeros(h_TD.shape[1])] * (-len(columns) % BLOCK)
    weight_CD = torch.stack([*(column.to(h_TD.dtype) for column in columns), *padding])
    blocks = [F.linear(h_TD, block) for block in torch.split(weight_CD, BLOCK)]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)
