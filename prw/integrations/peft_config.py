"""The configuration of a PRW adapter, which PEFT keeps in ``adapter_config.json``.

Needs the extra ``peft``. Users import `prw.integrations.peft`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from peft import PeftConfig

from prw.config import Config
from prw.errors import ConfigError
from prw.ledger import Ledger, Stage


class MethodName(str):
    """A string that answers like a member of `peft.PeftType`."""

    __slots__ = ()

    @property
    def name(self) -> str:
        """The string itself."""
        return str(self)

    @property
    def value(self) -> str:
        """The string itself."""
        return str(self)


PRW = MethodName("PRW")

_CORE = tuple(f.name for f in fields(Config) if not f.name.endswith("_modules"))


@dataclass
class PRWPeftConfig(PeftConfig):
    """Configuration of a PRW adapter; every field of `prw.Config` means what it means there.

    Attributes:
        target_modules: as in PEFT: name endings, an expression, or ``"all-linear"``.
        exclude_modules: as in PEFT.
        stages: the stages to begin with; afterwards those of the adapter's weave, which keeps this
            and what follows up to date.
        open: whether the last stage is open.
        exempt: the stages whose expert `Weave.freeze` or `Weave.thaw` took out of the rule.
        sizes: by stage and layer, rank and alpha of experts that have others than the
            configuration says, as imported ones may.

    Raises:
        ConfigError: a value that cannot work.
        StageError: names that cannot be stages.
    """

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    rank: int = 16
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha: float | None = None
    granularity: str = "token"
    share_router: str = "module"
    router_train: str = "all"
    gate: str = "softmax"
    noise: bool = True
    router: str = "top1"
    context_features: int = 0
    new_column: str = "zero"
    backend: str = "auto"
    stages: list[str] = field(default_factory=list)
    open: bool = True
    exempt: list[str] = field(default_factory=list)
    sizes: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PRW
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), (list, tuple)):
                setattr(self, name, set(getattr(self, name)))
        try:
            self.rank_pattern = dict(self.rank_pattern)
        except (TypeError, ValueError):
            raise ConfigError(
                f"rank_pattern must map patterns to ranks, got {self.rank_pattern!r}"
            ) from None
        for name in ("target_modules", "exclude_modules"):
            if getattr(self, name) is not None:
                Config(**{name: getattr(self, name)})  # as picky as the library
        self.alpha = self.core(()).alpha
        self._check_stages()

    def _check_stages(self) -> None:
        for field_name in ("stages", "exempt"):
            names = getattr(self, field_name)
            if not isinstance(names, (list, tuple)):
                fix = f"; give [{names!r}]" if isinstance(names, str) else ""
                raise ConfigError(f"{field_name} must be a list of names, got {names!r}{fix}")
            setattr(self, field_name, list(names))
        if not isinstance(self.open, bool):
            raise ConfigError(f"open must be True or False, got {self.open!r}")
        ledger = self.ledger()
        for name in self.exempt:
            ledger[name]
        _check_sizes(self.sizes)

    def ledger(self) -> Ledger:
        """The stages as a ledger."""
        last = len(self.stages) - 1
        return Ledger(
            tuple(
                Stage(name, index, self.open and index == last, name in self.exempt)
                for index, name in enumerate(self.stages)
            )
        )

    def to_dict(self) -> dict[str, Any]:
        """As in PEFT; ranks as pairs, since PEFT's file sorts keys and the first match counts."""
        data: dict[str, Any] = super().to_dict()
        return data | {"rank_pattern": [list(pair) for pair in self.rank_pattern.items()]}

    def core(self, targets: Iterable[str]) -> Config:
        """The library's configuration for the given layers."""
        return Config(target_modules=list(targets), **{name: getattr(self, name) for name in _CORE})


def _check_sizes(sizes: object) -> None:
    """Raise ConfigError for what is not rank and alpha by stage and layer."""
    try:
        pairs = [pair for layers in dict(sizes).values() for pair in layers.values()]  # type: ignore[call-overload]
        valid = all(int(rank) == rank >= 1 and math.isfinite(alpha) for rank, alpha in pairs)
    except (TypeError, ValueError, AttributeError):
        valid = False
    if not valid:
        raise ConfigError(
            "sizes must map stages to layers to [rank, alpha], as a weave writes it; "
            f"got {sizes!r}, leave it out"
        )
