"""A linear layer with routed experts beside it."""

from __future__ import annotations

from torch import Tensor, nn

from prw.pool import Pool


class RoutedLinear(nn.Module):
    """``base(x)`` plus the residual of the routed expert; the base layer itself stays untouched.

    Siblings that share a router share one pool; only the first registers it as a submodule, so
    that every parameter has one name.

    Args:
        base: the frozen linear layer.
        pool: the pool it belongs to.
        projection: its name in that pool.
        owner: whether this layer registers the pool.
    """

    def __init__(self, base: nn.Linear, pool: Pool, projection: str, *, owner: bool) -> None:
        super().__init__()
        self.base = base
        self.projection = projection
        if owner:
            self.owned_pool = pool
        self._pool = (pool,)  # a tuple keeps a shared pool out of the module tree

    @property
    def pool(self) -> Pool:
        """The pool of experts of this layer."""
        return self._pool[0]

    @property
    def in_features(self) -> int:
        """As in the base layer."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """As in the base layer."""
        return self.base.out_features

    @property
    def weight(self) -> Tensor:
        """The base layer's weight."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """``base(x) + gate * alpha / rank * B_e A_e x``, shaped and typed like ``base(x)``."""
        outputs, _ = self.pool.add({self.projection: self.base(x)}, x)
        return outputs[self.projection]
