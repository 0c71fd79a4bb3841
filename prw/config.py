"""The configuration of a weave: what is adapted, how large experts are, how routing works."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

from prw.errors import ConfigError

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config:
    """How a pool of experts is built and routed. Validates itself; immutable; JSON round trip.

    Attributes:
        target_modules: dotted names, name endings or ``*`` patterns of the linears to adapt.
        rank: rank of a new expert.
        alpha: residuals are scaled by ``alpha / rank``; None means ``2 * rank``.
        granularity: one routing decision per ``"token"`` or per ``"sample"``.
        share_router: one router per ``"module"``, or per ``"parent"`` of linears of one width.
        router_train: in a stage ``"all"`` router columns learn, or only the ``"new"`` one.
        gate: residuals are weighted by the choice's ``"softmax"`` probability, or by ``"one"``.
        noise: whether routers have noise columns, used in training calls.
        router: ``"top1"``, noisy (CoLoGen, Eq. 2 to 4) or plain as ``noise`` says, or a
            `prw.Router` of one's own, ``package.module:object``.
        context_features: width K of the context of a call, appended to what routers read.
        new_column: the router column of a new expert begins at ``"zero"`` (the paper's), or at the
            ``"mean"`` of the others, which leaves every earlier input with its expert.
        backend: ``"reference"`` runs the plain operator, ``"auto"`` the fastest one that fits.

    Raises:
        ConfigError: a value that cannot work; the message names it and the fix.
    """

    target_modules: Sequence[str] = ()
    rank: int = 16
    alpha: float | None = None
    granularity: Literal["token", "sample"] = "token"
    share_router: Literal["module", "parent"] = "module"
    router_train: Literal["all", "new"] = "all"
    gate: Literal["softmax", "one"] = "softmax"
    noise: bool = True
    router: str = "top1"
    context_features: int = 0
    new_column: Literal["zero", "mean"] = "zero"
    backend: Literal["auto", "reference"] = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, str):
            raise ConfigError(
                f"target_modules is a list of names; write target_modules=[{self.target_modules!r}]"
            )
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if not all(isinstance(name, str) and name for name in self.target_modules):
            raise ConfigError(
                f"target_modules must be non-empty strings, got {list(self.target_modules)}"
            )
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ConfigError(f"rank must be a whole number of at least 1, got {self.rank!r}")
        self._check_alpha()
        if not isinstance(self.router, str) or (self.router != "top1" and ":" not in self.router):
            raise ConfigError(f'router is "top1" or package.module:object, got {self.router!r}')
        width = self.context_features
        if isinstance(width, bool) or not isinstance(width, int) or width < 0:
            raise ConfigError(f"context_features must be a whole number from 0 on, got {width!r}")
        if not isinstance(self.noise, bool):
            raise ConfigError(f"noise must be True or False, got {self.noise!r}")
        self._check_choices()

    def _check_alpha(self) -> None:
        alpha = 2 * self.rank if self.alpha is None else self.alpha
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < 1e9:
            raise ConfigError(f"alpha must be a positive number, got {self.alpha!r}")
        object.__setattr__(self, "alpha", float(alpha))

    def _check_choices(self) -> None:
        for name, hint in get_type_hints(Config).items():
            choices = get_args(hint)
            value = getattr(self, name)
            if choices and all(isinstance(c, str) for c in choices) and value not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}; got {value!r}")

    @property
    def scaling(self) -> float:
        """``alpha / rank``, the factor of a new expert's residual."""
        assert self.alpha is not None
        return self.alpha / self.rank

    def to_dict(self) -> dict[str, Any]:
        """Plain data with the schema version, ready for JSON."""
        data = asdict(self)
        data["target_modules"] = list(self.target_modules)
        return {"schema_version": SCHEMA_VERSION, **data}

    def to_json(self) -> str:
        """The configuration as JSON text; `from_json` returns an equal object."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Config:
        """Rebuild a configuration from `to_dict`.

        Raises:
            ConfigError: a newer schema, an unknown field (the nearest known one is named), or a
                value that cannot work.
        """
        values = dict(data)
        version = values.pop("schema_version", None)
        if not isinstance(version, int) or version < 1:
            raise ConfigError(f"schema_version must be a whole number, got {version!r}")
        if version > SCHEMA_VERSION:
            raise ConfigError(
                f"this configuration has schema version {version}, this prw reads up to "
                f"{SCHEMA_VERSION}: install a newer prw"
            )
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
                raise ConfigError(f"unknown field {name!r}; did you mean {near[0]!r}?")
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> Config:
        """Rebuild a configuration from `to_json`; raises like `from_dict`."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"the configuration is not valid JSON: {error}") from None
        if not isinstance(data, dict):
            raise ConfigError(f"the configuration must be a JSON object, got {data!r}")
        return cls.from_dict(data)
