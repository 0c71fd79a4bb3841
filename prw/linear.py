"""Which layers are linear, and a linear layer with routed experts beside it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from prw.errors import ConfigError
from prw.pool import Pool
from prw.precision import at_least_fp32


def linear_size(module: nn.Module) -> tuple[int, int] | None:
    """Input and output width of a layer that can be adapted; None for every other module.

    These are: `torch.nn.Linear` and its subclasses, among them those of bitsandbytes; transformers'
    ``Conv1D``, whose weight is transposed; and the quantised layers of other libraries, known by a
    class name with "Linear", by ``in_features`` and ``out_features``, and by a forward of one
    tensor. torch's own integer layers have no gradient and do not count.
    """
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if is_transposed(module):
        width, size = module.get_parameter("weight").shape
        return width, size
    kind = type(module)
    if "Linear" not in kind.__name__ or kind.__module__.startswith("torch."):
        return None
    sizes = [getattr(module, name, None) for name in ("in_features", "out_features")]
    if not all(isinstance(size, int) for size in sizes) or not _takes_one_tensor(module):
        return None
    return int(sizes[0] or 0), int(sizes[1] or 0)


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is ``[D, O]``: transformers' ``Conv1D`` and its subclasses."""
    kinds = [(kind.__module__, kind.__name__) for kind in type(module).__mro__]
    return ("transformers.pytorch_utils", "Conv1D") in kinds


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a layer that `linear_size` knows and that is not adapted yet."""
    return not isinstance(module, RoutedLinear) and linear_size(module) is not None


def plain_weight(module: nn.Module) -> Tensor | None:
    """The weight, where it is a plain tensor of floats and not quantised, sharded or absent."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return None
    return weight if type(weight) in (Tensor, nn.Parameter) else None


def where_it_lives(module: nn.Module) -> tuple[torch.device, torch.dtype | None]:
    """Device of a layer, and the dtype of its experts where that is not the default, fp32.

    Raises:
        ConfigError: a lazy layer, which has no weights yet.
    """
    if isinstance(module, LazyModuleMixin):
        raise ConfigError(
            f"{module} has no weights yet; run the model once on a batch before it is woven"
        )
    tensor = next(chain(module.parameters(), module.buffers()), None)
    if tensor is None:
        return torch.get_default_device(), None
    wide = tensor.is_floating_point() and tensor.dtype.itemsize > 4
    return tensor.device, tensor.dtype if wide else None


def _takes_one_tensor(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    return sum(p.default is p.empty and p.kind <= p.POSITIONAL_OR_KEYWORD for p in parameters) == 1


_OWN = ("base", "owned_pool")
"""The submodules of a `RoutedLinear`."""


class RoutedLinear(nn.Module):
    """``base(x)`` plus the residual of the routed expert; the base layer itself stays untouched.

    In a ``state_dict()`` the tensors of the base keep their names, ``weight`` and not
    ``base.weight``, so what is saved of a woven model loads into the bare one, and the other way
    round. A state without any tensor of the pool leaves the pool as it is.

    Siblings that share a router share one pool; only the first registers it as a submodule, so
    that every parameter has one name.

    Args:
        base: the frozen linear layer.
        pool: the pool it belongs to.
        projection: its name in that pool.
        owner: whether this layer registers the pool.
    """

    def __init__(self, base: nn.Module, pool: Pool, projection: str, *, owner: bool) -> None:
        super().__init__()
        self.base = base
        self.projection = projection
        if owner:
            self.owned_pool = pool
        self._pool = (pool,)  # a tuple keeps a shared pool out of the module tree
        self.register_state_dict_post_hook(_drop_base)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_insert_base)  # type: ignore[no-untyped-call]

    def _fqn_modifiers(self) -> dict[str, str]:
        """For torch.distributed.checkpoint: names that the state has without ``base.``."""
        names = chain(self.base.named_parameters(), self.base.named_buffers())
        return {name: "base" for name, _ in names}

    @property
    def pool(self) -> Pool:
        """The pool of experts of this layer."""
        return self._pool[0]

    @property
    def in_features(self) -> int:
        """As in the base layer."""
        return self.pool.in_features

    @property
    def out_features(self) -> int:
        """As in the base layer."""
        return self.pool.projections[self.projection]

    @property
    def weight(self) -> Tensor:
        """The base layer's weight; set it to tie or replace that of the base layer."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias, like its weight."""
        return self.base.bias  # type: ignore[return-value]

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module refuses a parameter where there is a property, and tie_weights() sets one.
        if name in ("weight", "bias"):
            setattr(self.base, name, value)
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts; a cast below fp32 is for the base, as if that had been woven after it.

        Experts are cast by ``pool.to(dtype)``, routers never.
        """
        for name, module in self.named_children() if recurse else ():
            module._apply(at_least_fp32(fn) if name == "owned_pool" else fn)
        super()._apply(fn, recurse=False)  # type: ignore[no-untyped-call]
        return self

    def forward(self, input: Tensor) -> Tensor:  # named as in nn.Linear, for calls by keyword
        """``base(x) + gate * alpha / rank * B_e A_e x``, shaped and typed like ``base(x)``."""
        outputs, _ = self.pool.project({self.projection: self.base}, input)
        return outputs[self.projection]


def _drop_base(
    module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Mapping[str, Any]
) -> None:
    """Take ``base.`` out of the names in a state that is being made.

    Not under FSDP1, which looks for the names of its parameters.
    """
    if "_fsdp_wrapped_module." in prefix:
        return
    for name in [name for name in state if name.startswith(prefix)]:
        value = state.pop(name)  # every one, so that the order stays
        state[prefix + name.removeprefix(prefix).removeprefix("base.")] = value


def _insert_base(
    module: nn.Module, state: dict[str, Any], prefix: str, *_of_the_load: object
) -> None:
    """Put ``base.`` into the names of a state that is loaded."""
    names = [name.removeprefix(prefix) for name in state if name.startswith(prefix)]
    for name in names:
        if name.split(".")[0] not in _OWN:
            state[f"{prefix}base.{name}"] = state.pop(prefix + name)
    if not any(name.startswith("owned_pool.") for name in names):
        kept = module.state_dict(prefix=prefix, keep_vars=True)
        state.update({n: t for n, t in kept.items() if n.startswith(f"{prefix}owned_pool.")})
