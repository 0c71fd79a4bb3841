"""A base and its adapter, loaded for training."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from prw import CheckpointError, ConfigError
from prw.checkpoint import read
from prw.fingerprint import TOLERANCE, drift
from prw_flux import sharding, zero
from prw_flux.adapter import PRWAdapter
from prw_flux.config import RunConfig
from prw_flux.coredi.encoders import FeatureEncoder, load_encoder
from prw_flux.coredi.model import CoReDi
from prw_flux.locate import resolve_base, stored_settings
from prw_flux.passes import TwoPass
from prw_flux.pipeline import CoLoGenPipeline
from prw_flux.quantisation import loading, narrow
from prw_flux.sample_cache.opened import open_tables
from prw_flux.sample_cache.table import Table
from prw_flux.schema import plain
from prw_flux.tasks import TASKS, Task, load_task

MODELS: Final = ("vae", "text_encoder", "text_encoder_2")
ENCODERS: Final = (*MODELS, "tokenizer", "tokenizer_2")
"""What a run with a cache does without; all but the first where it draws pictures."""


@dataclass(frozen=True, eq=False)
class Session:
    """What training needs in memory.

    Attributes:
        pipe: the base as a pipeline without adapter: autoencoder and text encoders.
        passes: the frozen transformer with the adapter attached, the module that trains.
        tasks: the task of each stage.
        encoder: of semantic features, where the run has a feature stream and no cache.
        coredi: the feature stream.
        tables: encoded samples by stage, where the run has a cache, those held out under
            `draws.held_out_stage`; `pipe` then has no text encoders, and an autoencoder only to
            draw pictures.
        encoding: held by the thread that uses the encoders: tokenizers bear only one.
    """

    pipe: CoLoGenPipeline
    passes: TwoPass
    tasks: tuple[Task, ...]
    encoder: FeatureEncoder | None = None
    coredi: CoReDi | None = None
    tables: Mapping[str, Table] = field(default_factory=dict)
    encoding: AbstractContextManager[Any] = field(default_factory=threading.RLock)

    @property
    def adapter(self) -> PRWAdapter:
        """The experts and routers."""
        return self.passes.adapter

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        device: torch.device = self.passes.transformer.device
        return device

    def rest(self, resting: bool) -> None:
        """Let the encoders leave the device while nothing is encoded, or come back."""
        where = torch.device("cpu") if resting else self.device
        for part in self._encoders():
            if part.device != where:
                part.to(where)

    @contextmanager
    def awake(self, *names: str) -> Iterator[None]:
        """Inside, the encoders are on the device and ours; afterwards they are where they were.

        Args:
            names: of those that are needed; none is all.
        """
        with self.encoding:
            before = [(part, part.device) for part in self._encoders(*names)]
            for part, _ in before:
                part.to(self.device)
            try:
                yield
            finally:
                for part, device in before:
                    part.to(device)

    def _encoders(self, *names: str) -> list[Any]:
        """Those that the run has."""
        found = [getattr(self.pipe, name) for name in names or MODELS]
        return [part for part in found if part is not None]


def open_session(config: RunConfig, adapter: Path | None = None) -> Session:
    """Load the base and an adapter for it.

    Args:
        config: of the run.
        adapter: folder of an adapter to go on with; None begins a fresh one. A feature stream
            beside it, in ``coredi/``, goes on with it.

    Raises:
        ConfigError: a task or encoder that does not exist, settings that the adapter was not
            made with, or a base that cannot be quantised or sharded as asked.
        CheckpointError: the adapter is damaged, or was made for another base.
        CacheError: the cache lacks samples of the run.
        FileNotFoundError: there is no such base.
    """
    _require_stream(config, adapter)
    tasks = tuple(load_task(stage.task) for stage in config.stages)
    if sharding.is_asked_for():
        sharding.require_shardable(config)
    if zero.is_launched():
        zero.require_fits(config)
    tables: Mapping[str, Table] = {}
    if config.data.cache is not None:
        finished = {s.name for s in read(adapter).ledger.stages if not s.open} if adapter else set()
        tables = open_tables(config, tasks, finished)
    pipe = load_base(config, ENCODERS[bool(config.sample_every) :] if tables else ())
    woven = PRWAdapter.for_transformer(
        pipe.transformer,
        **plain(config.adapter),
        tasks=_specs(config, tasks, adapter),
        resolution=config.size,
        trained=[] if adapter is None else stored_settings(adapter).get("trained"),
    )
    if adapter is not None:
        _require_same_settings(adapter, config)
        _require_same_weights(adapter, woven)
        woven.weave.load_state(adapter)
    passes = TwoPass(pipe.transformer, woven)
    passes.train()
    passes.transformer.eval()
    narrow(pipe.transformer, config.base.quantisation, _compute(config))
    if config.checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
    if sharding.is_asked_for():
        sharding.shard(pipe.transformer)
    elif zero.is_asked_for():
        zero.shard(pipe.transformer)
    if not config.coredi.enabled:
        return Session(pipe, passes, tasks, tables=tables)
    encoder = None if tables else load_encoder(config.coredi.encoder, pipe.transformer.device)
    width = encoder.width if encoder is not None else next(iter(tables.values())).width
    stream = _open_stream(config, pipe, width, adapter)
    return Session(pipe, passes, tasks, encoder, stream, tables)


def _require_stream(config: RunConfig, adapter: Path | None) -> None:
    """Experts that were trained beside features do not go on without: pictures have them or not."""
    if adapter is None or config.coredi.enabled or not adapter.with_name("coredi").is_dir():
        return
    raise ConfigError(
        f"{adapter} was trained with coredi.enabled true, this run asks for false: use --set "
        "coredi.enabled=true with the run's other coredi settings"
    )


def _open_stream(
    config: RunConfig, pipe: CoLoGenPipeline, width: int, adapter: Path | None
) -> CoReDi:
    """The stream that goes on with an adapter, else a fresh one, for features of `width`."""
    saved = adapter.with_name("coredi") if adapter is not None else None
    if saved is None or not saved.is_dir():
        return CoReDi.for_transformer(pipe.transformer, config.coredi, width)
    stream = CoReDi.load(saved, width=width, config=config.coredi)
    if stream.stream.embed.out_features != pipe.transformer.inner_dim:
        raise CheckpointError(
            f"{saved} was made for a transformer of width {stream.stream.embed.out_features}, this "
            f"base has {pipe.transformer.inner_dim}"
        )
    return stream.to(pipe.transformer.device)


def load_base(
    config: RunConfig, leave_out: Sequence[str] = (), device: str | None = None
) -> CoLoGenPipeline:
    """The base of a run, in the run's precision.

    Args:
        config: of the run.
        leave_out: components that are not loaded, nor fetched from the Hub.
        device: where it goes; None is the GPU where there is one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    compute = _compute(config)
    # a small base keeps its encoders wide, as generation will run them; a large one cannot
    dtypes = {"transformer": compute, "default": torch.float32 if device == "cpu" else compute}
    options = loading(config.base.quantisation, compute)
    location = resolve_base(config.base.path)
    absent = dict.fromkeys(leave_out)
    pipe = CoLoGenPipeline.from_pretrained(
        location, revision=config.base.revision, dtype=dtypes, **absent, **options
    )
    pipe.to(device)
    if pipe.vae is not None:
        pipe.vae.to(memory_format=torch.channels_last)  # twice as fast on a CPU
        if config.size > 256:  # 32 large pictures at once would be the peak of the whole run
            pipe.vae.enable_slicing()
    return pipe


def _compute(config: RunConfig) -> torch.dtype:
    """What the transformer computes in."""
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def _specs(config: RunConfig, tasks: tuple[Task, ...], adapter: Path | None) -> dict[str, Any]:
    """Every task the adapter is to know: the five, the parent's, and this run's own."""
    known = stored_settings(adapter).get("tasks") if adapter is not None else None
    specs: dict[str, Any] = {
        task.name: {"sentence": task.sentence, "aligned": task.aligned}
        for task in (*TASKS.values(), *tasks)
    }
    return {**(known or {}), **specs}


def _require_same_settings(adapter: Path, config: RunConfig) -> None:
    """Experts of one adapter share how their source is modulated and how they are routed."""
    stored = stored_settings(adapter)
    for name in ("granularity", "gate", "noise", "source_timestep", "source_pooled"):
        theirs, ours = stored.get(name), getattr(config.adapter, name)
        if theirs != ours:
            raise ConfigError(
                f"{adapter} was trained with adapter.{name} {theirs!r}, this run asks for "
                f"{ours!r}: use --set adapter.{name}={theirs}"
            )


def _require_same_weights(adapter: Path, woven: PRWAdapter) -> None:
    """Experts cannot be extended on other weights, even in a base of the same shape."""
    stored = read(adapter)
    distance = drift(stored.fingerprint, woven.weave.fingerprint)
    if distance > TOLERANCE:
        raise CheckpointError(
            f"{adapter} was made for another base: sampled weights of to_k and to_v differ by "
            f"{distance:.1%}"
        )
    stored.check_base(woven.weave.fingerprint)
