"""What every stage of a run will take: work, memory, disk, hours, cost, with what is assumed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

from prw import ConfigError
from prw_flux.config import RunConfig
from prw_flux.curriculum import Stage
from prw_flux.forecast.architecture import Architecture, architecture
from prw_flux.forecast.memory import FULL, Memory, stage_memory
from prw_flux.forecast.work import Tokens, Work, step_work
from prw_flux.sample_cache.wanted import held_out_count, sample_count

TOKEN: Final = 16
"""Pixels of a token's side."""
LATENT: Final = 2
"""Bytes of a cached number."""
H100: Final = 989.0
"""Dense TFLOP/s of an H100 or H200 in bf16."""


@final
@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the run is to be run on.

    Attributes:
        ranks: GPUs that share a batch.
        tflops: of one, dense, in the run's precision; 989 is an H100's or H200's in bf16.
        utilisation: share of that which is reached, encoders and data included.
        seconds_per_step: measured, of the first stage; then `tflops` and `utilisation` do not
            matter, and other stages take longer in proportion to their work.
        price: of one GPU and hour; None prints no cost.

    Raises:
        ConfigError: a value that cannot be.
    """

    ranks: int = 1
    tflops: float = H100
    utilisation: float = 0.4
    seconds_per_step: float | None = None
    price: float | None = None

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise ConfigError(f"--ranks must be at least 1, got {self.ranks}")
        if not self.tflops > 0.0 or not 0.0 < self.utilisation <= 1.0:
            raise ConfigError(
                f"--device-tflops must be positive and --utilisation in (0, 1], got "
                f"{self.tflops:g} and {self.utilisation:g}"
            )
        if self.seconds_per_step is not None and not self.seconds_per_step > 0.0:
            raise ConfigError(f"--seconds-per-step must be positive, got {self.seconds_per_step:g}")
        if self.price is not None and not self.price >= 0.0:
            raise ConfigError(f"--price-per-hour must be at least 0, got {self.price:g}")


@final
@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage.

    Attributes:
        stage: as configured.
        trained, frozen: parameters that learn, and that do not (base and veterans).
        work: operations of one sample.
        flops: of one step, all ranks.
        seconds: of one step.
        rank_batch: samples that a rank has at a time.
        memory: of a rank.
        cache: bytes of its encoded samples, if no picture and no text comes twice.
        hours, cost: of the stage; cost None without a price.
    """

    stage: Stage
    trained: int
    frozen: int
    work: Work
    flops: int
    seconds: float
    rank_batch: int
    memory: Memory
    cache: int
    hours: float
    cost: float | None

    @property
    def samples(self) -> int:
        """Seen in the stage."""
        return self.stage.steps * self.stage.batch_size


@final
@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A whole run.

    Attributes:
        stages: in order.
        tokens: of one sample.
        adapter, state: bytes on disk of the trained adapter, and of the states that are kept.
        assumptions: one sentence each.
    """

    stages: tuple[StagePlan, ...]
    tokens: Tokens
    adapter: int
    state: int
    assumptions: tuple[str, ...]

    @property
    def hours(self) -> float:
        """Of all stages."""
        return sum(stage.hours for stage in self.stages)


def forecast(config: RunConfig, machine: Machine) -> Forecast:
    """What a run will take.

    Raises:
        ConfigError: the shapes of the base are not known without fetching it, or there are more
            ranks than samples in a batch.
        FileNotFoundError: the base is a folder that does not exist.
    """
    small = [stage for stage in config.stages if stage.batch_size < machine.ranks]
    if small:
        raise ConfigError(
            f"{machine.ranks} ranks cannot share the batch of {small[0].batch_size} of stage "
            f"{small[0].name!r}: use fewer, or raise stages.{small[0].name}.batch_size"
        )
    shape = architecture(config.base)
    side = config.size // TOKEN
    tokens = Tokens(source=side * side, noisy=side * side, text=shape.text_tokens)
    work = step_work(
        shape.transformer.config,
        tokens,
        rank=config.adapter.rank,
        draws=config.draws,
        checkpointing=config.checkpointing,
        encoding=_encoding(config, shape),
    )
    speed = machine.ranks * machine.tflops * 1e12 * machine.utilisation
    if machine.seconds_per_step is not None:
        speed = work.total * config.stages[0].batch_size / machine.seconds_per_step
    stages = tuple(
        _stage(config, machine, shape, tokens, work, speed, number)
        for number in range(len(config.stages))
    )
    last = stages[-1]
    adapter = last.memory.adapter
    return Forecast(
        stages=stages,
        tokens=tokens,
        adapter=adapter,
        state=config.keep * (adapter + last.memory.optimizer),
        assumptions=tuple(_assumptions(config, machine)),
    )


def _encoding(config: RunConfig, shape: Architecture) -> int:
    """Operations per sample of encoding while training: none where samples are encoded before."""
    if config.data.cache is not None or config.data.samples is not None:
        return 0
    return shape.encoding_flops(config.size)


def _stage(
    config: RunConfig,
    machine: Machine,
    shape: Architecture,
    tokens: Tokens,
    work: Work,
    speed: float,
    number: int,
) -> StagePlan:
    stage = config.stages[number]
    share = -(-stage.batch_size // machine.ranks)
    rank_batch = -(-share // config.accumulate)
    memory = stage_memory(config, shape, tokens, number, rank_batch)
    flops = work.total * stage.batch_size
    busiest = work.total * share * machine.ranks
    seconds = busiest / speed if machine.seconds_per_step is None else flops / speed
    hours = stage.steps * seconds / 3600
    trained = memory.gradients // FULL
    base = sum(parameter.numel() for parameter in shape.transformer.parameters())
    return StagePlan(
        stage=stage,
        trained=trained,
        frozen=base + memory.adapter // FULL - trained,
        work=work,
        flops=flops,
        seconds=seconds,
        rank_batch=rank_batch,
        memory=memory,
        cache=(sample_count(config, stage) + held_out_count(config)) * _cached_bytes(shape, tokens),
        hours=hours,
        cost=None if machine.price is None else hours * machine.ranks * machine.price,
    )


def _cached_bytes(shape: Architecture, tokens: Tokens) -> int:
    """Of one sample: two latents, and the embeddings of a text."""
    own = shape.transformer.config
    latents = (tokens.source + tokens.noisy) * own.in_channels
    texts = tokens.text * own.joint_attention_dim + own.pooled_projection_dim
    return LATENT * int(latents + texts)


def _assumptions(config: RunConfig, machine: Machine) -> list[str]:
    again = "blocks computed again" if config.checkpointing else "all activations kept"
    told = [
        f"work: matrix products of both passes and their backward, {again}, attention that "
        "computes its scores again",
        "memory: every rank holds base and adapter (DDP); not counted are the CUDA context and "
        "fragmentation, 1 to 2 GiB",
        f"activations: of {config.size} px source and target; attention keeps no scores",
        "disk: while a state is saved, one more is there; cached samples if none comes twice",
    ]
    if config.coredi.enabled:
        beside = "" if config.coredi.tokens == "merged" else ", whose tokens are twice as many,"
        told.append(
            f"coredi: the feature stream{beside}, its encoder and cached features are not counted"
        )
    if machine.seconds_per_step is None:
        card = " (an H100 or H200; --device-tflops for yours)" * (machine.tflops == H100)
        told.append(
            f"time: {machine.tflops:g} TFLOP/s per GPU{card}, {machine.utilisation:.0%} of them "
            "used; measure a step and give --seconds-per-step"
        )
    else:
        told.append(
            f"time: {machine.seconds_per_step:g} s per step of stage {config.stages[0].name!r} as "
            "measured, other stages in proportion to their work"
        )
    if config.data.cache is not None:
        drawing = "; for its grids the autoencoder alone, not counted" * bool(config.sample_every)
        told.append(f"encoders: not loaded, samples come from data.cache{drawing}")
    elif config.data.samples is None:
        told.append("encoders: every sample is encoded in its step; cache build does it before")
    else:
        told.append("encoders: samples are encoded before a stage, which is not in the hours")
    return told
