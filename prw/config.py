"""The configuration of a weave: what is adapted, how large experts are, how routing works."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, final, get_args, get_type_hints

from prw.errors import ConfigError

SCHEMA_VERSION = 1
ALL_LINEAR = "all-linear"


@final
class RankPattern(Mapping[str, int]):
    """An immutable mapping from patterns to ranks that can be hashed, copied and pickled."""

    def __init__(self, ranks: Mapping[str, int]) -> None:
        self._ranks = tuple(ranks.items())

    def __getitem__(self, pattern: str) -> int:
        return dict(self._ranks)[pattern]

    def __iter__(self) -> Iterator[str]:
        return iter(dict(self._ranks))

    def __len__(self) -> int:
        return len(self._ranks)

    def __eq__(self, other: object) -> bool:
        """Order counts, because the first pattern that matches does."""
        return isinstance(other, Mapping) and self._ranks == tuple(other.items())

    def __hash__(self) -> int:
        return hash(self._ranks)

    def __repr__(self) -> str:
        return repr(dict(self._ranks))


@dataclass(frozen=True, kw_only=True)
class Config:
    """How a pool of experts is built and routed. Validates itself; immutable; JSON round trip.

    Attributes:
        target_modules: which linears to adapt: a list of dotted names, name endings or ``*``
            patterns; or one string, a regular expression that must match the whole dotted name;
            or ``"all-linear"``, every one that can be adapted except the output head.
        exclude_modules: a list or a regular expression alike; what it matches is left alone.
        rank: rank of a new expert.
        rank_pattern: other ranks for some targets, by a regular expression for the end of their
            names, as in PEFT: ``(.*\\.)?(key)$``. The first key that matches counts. Residuals
            keep the scaling ``alpha / rank`` of the others.
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
        backend: of `prw_kernels.routed_lora`: ``"reference"`` runs the plain operator, ``"cpu"``
            and ``"triton"`` those written for these, ``"auto"`` the fastest that can compute a
            call. The first forward names a backend that is not available in a ValueError, so that
            a folder saved elsewhere still loads.

    Raises:
        ConfigError: a value that cannot work; the message names it and the fix.
    """

    target_modules: Sequence[str] | str = ()
    exclude_modules: Sequence[str] | str = ()
    rank: int = 16
    rank_pattern: Mapping[str, int] = field(default_factory=lambda: RankPattern({}))
    alpha: float | None = None
    granularity: Literal["token", "sample"] = "token"
    share_router: Literal["module", "parent"] = "module"
    router_train: Literal["all", "new"] = "all"
    gate: Literal["softmax", "one"] = "softmax"
    noise: bool = True
    router: str = "top1"
    context_features: int = 0
    new_column: Literal["zero", "mean"] = "zero"
    backend: Literal["auto", "reference", "cpu", "triton"] = "auto"

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ConfigError(f"rank must be a whole number of at least 1, got {self.rank!r}")
        object.__setattr__(self, "rank_pattern", _rank_pattern(self.rank_pattern))
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
        for name in ("target_modules", "exclude_modules"):
            data[name] = data[name] if isinstance(data[name], str) else list(data[name])
        data["rank_pattern"] = dict(self.rank_pattern)
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
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"the configuration is not valid JSON: {error}") from None
        if not isinstance(data, dict):
            raise ConfigError(f"the configuration must be a JSON object, got {data!r}")
        return cls.from_dict(data)


def _patterns(name: str, value: object) -> str | tuple[str, ...]:
    """A checked list of names, as a tuple, or a checked regular expression."""
    if isinstance(value, str):
        if value.lower() == ALL_LINEAR:
            return ALL_LINEAR
        _check_expression(name, value)
        return value
    if not isinstance(value, Sequence) and not isinstance(value, (set, frozenset)):
        raise ConfigError(f"{name} must be a list of names or a regular expression, got {value!r}")
    names = tuple(sorted(value)) if isinstance(value, (set, frozenset)) else tuple(value)
    if not all(isinstance(entry, str) and entry for entry in names):
        raise ConfigError(f"{name} must be non-empty strings, got {list(names)}")
    return names


def _check_expression(name: str, text: str) -> None:
    if not text:
        raise ConfigError(f"{name} must not be an empty string; give names or an expression")
    try:
        re.compile(text)
    except re.error as error:
        raise ConfigError(
            f"{name} has {text!r}, which is no regular expression: {error}; "
            f"a list of names or * patterns may be meant, [{text!r}]"
        ) from None


def _rank_pattern(value: object) -> RankPattern:
    if not isinstance(value, Mapping):
        raise ConfigError(f"rank_pattern must map patterns to ranks, got {value!r}")
    for pattern, rank in value.items():
        if not isinstance(pattern, str):
            raise ConfigError(f"rank_pattern must map patterns to ranks, got the key {pattern!r}")
        _check_expression("rank_pattern", pattern)
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ConfigError(
                f"rank_pattern must give whole numbers of at least 1, got {rank!r} for {pattern!r}"
            )
    return RankPattern(value)
