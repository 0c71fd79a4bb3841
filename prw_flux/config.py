"""Everything that decides what a training run does, as one immutable value."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from prw import ConfigError
from prw_flux.coredi.config import CoReDiConfig
from prw_flux.curriculum import Stage
from prw_flux.schema import build, plain, settle, with_settings

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """The frozen FLUX.1 pipeline: "tiny-flux", a folder, or a Hub id with its revision.

    Attributes:
        quantisation: what the transformer's weights are stored in: "none" for that
            of `precision`, "fp8" (diffusers' layerwise casting), "int8" (torchao) or "nf4"
            (bitsandbytes).
    """

    path: str = "tiny-flux"
    revision: str | None = None
    quantisation: Literal["none", "fp8", "int8", "nf4"] = "none"

    def __post_init__(self) -> None:
        settle(self)
        if not self.path:
            raise ConfigError("path must name a base, got nothing")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where training samples come from.

    Attributes:
        source: "shapeweave", "photos", ``disk:DIR`` for what `data build` made (several with
            weights: ``disk:DIR*3,OTHER*1``), or ``package.module:object`` of a DataSource of the
            user's.
        photos: a folder of photos; None is the public-domain photos of scikit-image. They train
            where the source is "photos", of which the report shows the held-out ones. With another
            source it shows these; with none named, built data show their own held-out pictures.
        samples: per stage, how many are drawn and encoded before it begins; None encodes every
            batch when it is needed, for data that does not fit into memory.
        max_rejected: largest share of the drawn pictures that may be unreadable. Each is replaced
            by another example and counted; above this share training stops.
        conditions: what makes maps for the task control while it trains: "canny",
            "softedge_classical", "lineart_classical", or "softedge", "lineart", "depth" and
            "segmentation" with weights, as in "depth:PATH-OR-HUB-ID". Nothing leaves it to the maps
            that the data has and to the three without weights.
        cache: folder of samples that `cache build` has encoded; training then reads them from disk,
            those held out as well, and loads no encoder of texts or features, and the autoencoder
            only where `sample_every` draws pictures. None encodes while training.
        prefetch: batches that another thread may draw and encode, or read from the cache, before
            their step; 0 does it between the steps, for a source that must stay in one thread. The
            bits are the same. Samples that were encoded before their stage are in memory.
    """

    source: str = "shapeweave"
    photos: str | None = None
    samples: int | None = 2000
    max_rejected: float = 0.05
    conditions: tuple[str, ...] = ()
    cache: str | None = None
    prefetch: int = 2

    def __post_init__(self) -> None:
        settle(self)
        if self.prefetch < 0:
            raise ConfigError(f"prefetch must be at least 0, got {self.prefetch}")
        if self.samples is not None and self.samples < 1:
            raise ConfigError(f"samples must be at least 1 or none, got {self.samples}")
        if not 0.0 <= self.max_rejected <= 1.0:
            raise ConfigError(f"max_rejected must lie in [0, 1], got {self.max_rejected}")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The experts and routers; see `PRWAdapter`. alpha None is twice the rank."""

    rank: int = 128
    alpha: float | None = None
    granularity: Literal["sample", "token"] = "sample"
    gate: Literal["softmax", "one"] = "softmax"
    router_train: Literal["all", "new"] = "all"
    noise: bool = True
    source_timestep: Literal["zero", "current"] = "zero"
    source_pooled: Literal["task", "prompt", "empty"] = "task"

    def __post_init__(self) -> None:
        settle(self)
        if self.rank < 1:
            raise ConfigError(f"rank must be at least 1, got {self.rank}")
        if self.alpha is not None and not 0.0 < self.alpha < 1e9:
            raise ConfigError(f"alpha must be a positive number or none, got {self.alpha}")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW. The learning rate is the stage's; that of the routers is `router_lr` times as large.

    Attributes:
        warmup: steps of linear warm-up in every stage.
        decay: after it, "constant", or "cosine" down to a twentieth at the end of the stage.
        clip: largest norm of the gradient.
        weight_decay: of the experts; routers have none.
    """

    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0
    warmup: int = 0
    decay: Literal["constant", "cosine"] = "constant"
    router_lr: float = 1.0

    def __post_init__(self) -> None:
        settle(self)
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(f"betas must be two numbers in [0, 1), got {list(self.betas)}")
        for name in ("eps", "clip"):
            if not getattr(self, name) > 0.0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("weight_decay", "warmup", "router_lr"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is generated and measured after training.

    Attributes:
        per_task: held-out samples per task that are compared with the baselines.
        history: of these, how many fill the forgetting matrix; 0 leaves it out.
        steps: sampling steps.
    """

    per_task: int = 32
    history: int = 16
    steps: int = 12

    def __post_init__(self) -> None:
        settle(self)
        if self.per_task < 1 or self.steps < 1 or self.history < 0:
            raise ConfigError(
                "per_task and steps must be at least 1 and history at least 0, got "
                f"{self.per_task}, {self.steps} and {self.history}"
            )


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
    """The loss on samples that are never trained on, with times and noise that never change.

    Attributes:
        samples: how many per stage; 0 is off.
        every: steps between two looks; the end of a stage is one in any case.
    """

    samples: int = 0
    every: int = 100

    def __post_init__(self) -> None:
        settle(self)
        if self.samples < 0 or self.every < 1:
            raise ConfigError(
                f"samples must be at least 0 and every at least 1, got {self.samples} and "
                f"{self.every}"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run. Validates itself; JSON round trip; any field by ``--set a.b=c``.

    Attributes:
        stages: the curriculum, in order.
        size: side of the pictures in pixels.
        recipe: the name it was made by.
        seed: of everything that is random: data, order, noise, initialisation.
        accumulate: micro-batches that a rank's part of a batch is split into: less memory, the same
            step, the veteran gate's usage and the statistics of features included, which are
            those of the whole batch.
        checkpointing: compute the blocks again in the backward: less memory, the same gradients.
        precision: "fp32", or "bf16" autocast with the base stored in bf16; experts and routers
            are fp32 in either.
        caption_dropout: share of samples that train with the empty text.
        source_dropout: share of samples whose source is blank: latents of zero. (Without any source
            a sample would teach nothing, because experts act on source rows only.)
        draws: noisy latents that train on each sample of a batch, each with a noise and a time of
            its own. They share one source pass, which needs adapter.source_timestep "zero".
        guidance: guidance embedding in training (FLUX.1-dev is trained at 1).
        time_shift: of the training times; None takes FLUX's shift for the number of tokens.
        remember: router inputs that every block keeps of every finished stage, so that the routers
            can be consolidated at its end (`prw.Weave.consolidate`); 0, the paper's way, is off.
        log_every, save_every: steps between lines in metrics.jsonl, and between saved states.
        keep: how many saved states are kept; a damaged one is passed over for the one before it.
        ema: decay of the moving averages of what trains, which become the weights at the end of a
            stage (`prw_flux.ema`); 0 is off.
        trackers: "tensorboard", "wandb", or ``package.module:function`` of the user's, which makes
            an `accelerate.tracking.GeneralTracker` from the run's folder and step.
        sample_every: steps between grids of pictures that are drawn from the first four held-out
            samples of the stage, with `evaluation.steps` steps, into ``grids/``; 0 is off.
        held_out: the loss on samples that are never trained on.
        coredi: semantic features beside the image, off by default.

    Raises:
        ConfigError: a value that cannot work; the message names it.
    """

    stages: tuple[Stage, ...]
    size: int
    recipe: str = ""
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "bf16"
    caption_dropout: float = 0.1
    source_dropout: float = 0.0
    draws: int = 1
    accumulate: int = 1
    checkpointing: bool = False
    guidance: float = 1.0
    time_shift: float | None = None
    remember: int = 0
    log_every: int = 10
    save_every: int = 200
    keep: int = 2
    ema: float = 0.0
    trackers: tuple[str, ...] = ()
    sample_every: int = 0
    base: BaseConfig = field(default_factory=BaseConfig)
    data: DataConfig = field(default_factory=DataConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    held_out: HeldOutConfig = field(default_factory=HeldOutConfig)
    coredi: CoReDiConfig = field(default_factory=CoReDiConfig)

    def __post_init__(self) -> None:
        settle(self)
        names = [stage.name.casefold() for stage in self.stages]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"stages must be one or more, named differently, got {names}")
        if self.size < 16 or self.size % 16:
            raise ConfigError(f"size must be a positive multiple of 16, got {self.size}")
        for name in ("caption_dropout", "source_dropout"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.draws > 1 and self.adapter.source_timestep == "current":
            raise ConfigError(
                f"draws={self.draws} needs adapter.source_timestep 'zero': a source that follows "
                "the time of its noisy latent cannot serve several; use draws=1"
            )
        if self.time_shift is not None and not self.time_shift > 0.0:
            raise ConfigError(f"time_shift must be positive or none, got {self.time_shift}")
        small = [stage.name for stage in self.stages if stage.batch_size < 2]
        if self.coredi.enabled and self.coredi.normalise == "batch" and small:
            raise ConfigError(
                f"coredi.normalise=batch needs two samples or more, got a batch of one: raise "
                f"stages.{small[0]}.batch_size, or set coredi.normalise=none"
            )
        for name in ("remember", "sample_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0.0 <= self.ema < 1.0:
            raise ConfigError(f"ema must lie in [0, 1), got {self.ema}")
        for name in ("draws", "accumulate", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data with the schema version, ready for JSON."""
        return {"schema_version": SCHEMA_VERSION, **plain(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunConfig:
        """Rebuild from `to_dict`.

        Raises:
            ConfigError: a newer schema, an unknown field (the nearest is named), a bad value.
        """
        values = dict(data)
        version = values.pop("schema_version", None)
        if not isinstance(version, int) or version < 1:
            raise ConfigError(f"schema_version must be a whole number, got {version!r}")
        if version > SCHEMA_VERSION:
            raise ConfigError(
                f"this run has schema version {version}, this prw_flux reads up to "
                f"{SCHEMA_VERSION}: install a newer prw"
            )
        return build(cls, values)

    def to_json(self) -> str:
        """JSON text; `from_json` returns an equal object."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> RunConfig:
        """Rebuild from `to_json`; raises like `from_dict`."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as problem:
            raise ConfigError(f"the configuration is not valid JSON: {problem}") from None
        if not isinstance(data, dict):
            raise ConfigError(f"the configuration must be a JSON object, got {data!r}")
        return cls.from_dict(data)

    def with_settings(self, assignments: Sequence[str]) -> RunConfig:
        """A copy with ``a.b=c`` assignments applied; raises as `schema.with_settings`."""
        return with_settings(self, list(assignments))
