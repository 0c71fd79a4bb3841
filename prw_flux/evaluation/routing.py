"""Where each task is routed: how often every block chooses every expert.

Shapes: B samples, S source tokens, C packed latent channels, P pooled width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

import prw
from prw_flux.adapter import PRWAdapter
from prw_flux.attach import attach
from prw_flux.encode import (
    encode_image,
    encode_pooled,
    pack,
    position_ids,
    source_offset,
    to_pixels,
)
from prw_flux.evaluation.samples import EvaluationSample
from prw_flux.passes import source_pass
from prw_flux.pipeline import CoLoGenPipeline

VERSION: Final = 1
TIMES: Final = (1.0, 0.75, 0.5, 0.25)
"""Where the routing is looked at when the source follows the current timestep."""


def count_experts(
    pipe: CoLoGenPipeline,
    samples: Mapping[str, Sequence[EvaluationSample]],
    *,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Which expert each block chooses for the sources of each task, without router noise.

    Under source_timestep "zero" the routing is the same in every denoising step; under "current" it
    is counted at four times.

    Returns:
        {"version", "groups": names of the blocks, "stages": names of the experts, "tasks": {task:
        {"n": rows routed per block, "counts": [block][expert], "gate": [block] mean gate, "times":
        [{"time", "counts": [block][expert]}, ...] from noise to data}}}
    """
    adapter: PRWAdapter = pipe.prw
    attach(pipe.transformer, adapter)
    groups = list(adapter.weave.pools)
    stages = [stage.name for stage in adapter.weave.stages]
    tasks = {}
    for task, chosen in samples.items():
        if not chosen:
            continue
        batches = [chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)]
        found = [(time, _record(pipe, batches, time)) for time in _times(adapter)]
        tasks[task] = _counts(found, groups, len(stages))
    return {"version": VERSION, "groups": groups, "stages": stages, "tasks": tasks}


def _times(adapter: PRWAdapter) -> tuple[float, ...]:
    """Where the source is read: at 0 alone, or at the timestep of each denoising step."""
    return (0.0,) if adapter.config.source_timestep == "zero" else TIMES


def _record(
    pipe: CoLoGenPipeline, batches: Sequence[Sequence[EvaluationSample]], time: float
) -> prw.Record:
    record = prw.Record()
    with record, torch.inference_mode():
        for samples in batches:
            _observe(pipe, samples, time, record)
    return record


def _observe(
    pipe: CoLoGenPipeline, samples: Sequence[EvaluationSample], time: float, record: prw.Record
) -> None:
    """The source pass of one batch of one task and one size, seen by `record`."""
    adapter: PRWAdapter = pipe.prw
    spec = adapter.task(samples[0].task)
    device = pipe._execution_device  # that of an offloaded model is where it rests
    pixels = to_pixels(np.stack([s.triple.source for s in samples]))
    latents = encode_image(pipe.vae, pixels, device=device)
    rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
    tokens_BSC = pack(latents).to(device=device, dtype=pipe.transformer.dtype)
    ids_S3 = position_ids(rows, columns, offset=source_offset(spec.aligned, columns), device=device)
    pooled_BP = _pooled(pipe, adapter, spec.sentence, samples).to(tokens_BSC)
    timestep_B = tokens_BSC.new_full((len(samples),), time)
    source_pass(pipe.transformer, tokens_BSC, ids_S3, pooled_BP, timestep_B, None, record)


def _pooled(
    pipe: CoLoGenPipeline,
    adapter: PRWAdapter,
    sentence: str,
    samples: Sequence[EvaluationSample],
) -> Tensor:
    text = adapter.source_text(sentence)
    texts = [sample.triple.text for sample in samples] if text is None else [text]
    return encode_pooled(texts, tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder)


def _counts(
    records: Sequence[tuple[float, prw.Record]], groups: Sequence[str], experts: int
) -> dict[str, Any]:
    times: list[dict[str, Any]] = []
    gates_TG = []
    for time, record in records:
        found = record.by_group()
        chosen = [found[group]["expert"].cpu().numpy() for group in groups]
        counts = [np.bincount(one, minlength=experts).tolist() for one in chosen]
        times.append({"time": time, "counts": counts})
        gates_TG.append([float(found[group]["gate"].float().mean()) for group in groups])
    total = np.sum([one["counts"] for one in times], axis=0)
    gates = [round(float(gate), 4) for gate in np.mean(gates_TG, axis=0)]
    return {"n": int(total[0].sum()) if len(total) else 0, "counts": total.tolist(),
            "gate": gates, "times": times}  # fmt: skip
