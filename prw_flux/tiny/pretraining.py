"""Pretraining the base: flow matching on pre-encoded pictures, with a state to continue from."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import T5EncoderModel

from prw import CheckpointError
from prw.atomic import replace_file
from prw_flux.arithmetic import arithmetic
from prw_flux.flow import interpolate, resolution_shift, sample_times, velocity_target
from prw_flux.tiny.autoencoder import warmup_cosine
from prw_flux.tiny.base import GRID, BaseModel, BaseRecipe, Corpus, Phase
from prw_flux.tiny.text_pretraining import train_tagging
from prw_flux.tiny.text_tokenizers import CLIP_LENGTH, T5_LENGTH

logger = logging.getLogger(__name__)

SAVE_EVERY: Final = 500


@dataclass(eq=False)
class Pretraining:
    """Everything that changes from step to step."""

    model: BaseModel
    average: BaseModel
    optimizers: tuple[torch.optim.Optimizer, ...]
    generator: torch.Generator
    step: int = 0

    @classmethod
    def begin(cls, model: BaseModel, phase: Phase) -> Pretraining:
        """At step 0 of a phase of a model, which is trained in place."""
        average = copy.deepcopy(model).requires_grad_(False)
        model.requires_grad_(True)
        model.text_encoder_2.requires_grad_(phase.text_learns)
        generator = torch.Generator().manual_seed(phase.seed)
        return cls(model, average, new_optimizers(model, phase), generator)

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name."""
        found = {"generator": self.generator.get_state()}
        for name, module in (("model", self.model), ("average", self.average)):
            found |= {f"{name}/{key}": value for key, value in _weights(module).items()}
        for number, optimizer in enumerate(self.optimizers):
            for index, moments in optimizer.state_dict()["state"].items():
                found |= {f"moments/{number}/{index}/{k}": v for k, v in moments.items()}
        return found

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """Become what `tensors` returned at a step."""
        self.generator.set_state(tensors["generator"])
        moments: list[dict[int, dict[str, Tensor]]] = [{} for _ in self.optimizers]
        for name, module in (("model", self.model), ("average", self.average)):
            own = {k.removeprefix(f"{name}/"): v for k, v in tensors.items() if k.startswith(name)}
            module.load_state_dict(own, strict=False)
            if missing := set(_weights(module)) - set(own):
                raise KeyError(f"{name}/{min(missing)}")
        for key, value in tensors.items():
            if key.startswith("moments/"):
                _, number, index, kind = key.split("/")
                moments[int(number)].setdefault(int(index), {})[kind] = value
        for optimizer, state in zip(self.optimizers, moments, strict=True):
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.step = step


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """Parameters by name: what is tied is named once."""
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def new_optimizers(model: BaseModel, phase: Phase) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices inside the blocks, AdamW for all else."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        inside = "blocks." in name and "norm" not in name and parameter.ndim == 2
        (matrices if inside else others).append(parameter)
    return (
        torch.optim.Muon(
            matrices, lr=phase.muon_lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=phase.lr, betas=(0.9, 0.98), weight_decay=0.0),
    )


def pretrain(
    recipe: BaseRecipe,
    corpus: Corpus,
    model: BaseModel,
    tokenizers: tuple[Any, Any],
    state: Path | None = None,
) -> BaseModel:
    """Flow matching with the velocity as target; the model ends with the averaged weights.

    Args:
        recipe: phases, batch size, caption dropout, averaging.
        corpus: what is learnt.
        model: the weights at the start; trained in place.
        tokenizers: CLIP's and T5's.
        state: a file that is written every 500 steps and continued from where it exists.

    Raises:
        CheckpointError: the state is damaged, or of another recipe or corpus.
    """
    nothing = (token_ids(tokenizers[0], CLIP_LENGTH), token_ids(tokenizers[1], T5_LENGTH))
    made_from = origin(recipe, corpus)
    found = None if state is None or not state.is_file() else read_state(state, made_from)
    first = 0 if found is None else found.phase
    for number in range(first, len(recipe.phases)):
        phase = recipe.phases[number]
        if found is None or number > first:
            teach_text(model, tokenizers[1], recipe, phase)
        now = Pretraining.begin(model, phase)
        if found is not None and number == first:
            assert state is not None
            found.fill(now, state)
        run_phase(now, number, recipe, corpus, nothing, state, made_from)
        model.load_state_dict(now.average.state_dict())
    return model.eval()


def teach_text(model: BaseModel, tokenizer: Any, recipe: BaseRecipe, phase: Phase) -> None:
    """Give the model a new T5 that can tag."""
    torch.manual_seed(phase.seed)
    model.text_encoder_2 = T5EncoderModel(model.text_encoder_2.config)
    tagged = train_tagging(model.text_encoder_2, tokenizer, recipe.tagging)
    logger.info("T5 names %.1f %% of the tags", 100 * tagged)


def token_ids(tokenizer: Any, length: int, text: str = "") -> Tensor:
    """Padded token ids [length]."""
    return torch.tensor(tokenizer(text, padding="max_length", max_length=length).input_ids)


def run_phase(
    now: Pretraining,
    number: int,
    recipe: BaseRecipe,
    corpus: Corpus,
    nothing: tuple[Tensor, Tensor],
    state: Path | None,
    made_from: Mapping[str, str],
) -> None:
    """Take the steps that are left of a phase."""
    phase = recipe.phases[number]
    running, started, first = math.nan, time.time(), now.step
    while now.step < phase.steps:
        if state is not None and now.step % SAVE_EVERY == 0 and now.step > first:
            save_state(now, state, {"phase": str(number), **made_from})
        value = descend(now, phase, recipe, corpus, nothing)
        running = value if math.isnan(running) else 0.99 * running + 0.01 * value
        if now.step % 100 == 0:
            pace = (time.time() - started) / (now.step - first)
            logger.info("phase %d, step %d/%d: loss %.4f, %.3f s a step", number + 1, now.step,
                        phase.steps, running, pace)  # fmt: skip
    if state is not None:
        save_state(now, state, {"phase": str(number), **made_from})


def descend(
    now: Pretraining,
    phase: Phase,
    recipe: BaseRecipe,
    corpus: Corpus,
    nothing: tuple[Tensor, Tensor],
) -> float:
    """One step; its loss."""
    loss = batch_loss(now.model, corpus, recipe, now.generator, nothing)
    for optimizer, highest in zip(now.optimizers, (phase.muon_lr, phase.lr), strict=True):
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = highest * warmup_cosine(now.step, phase.steps)
    loss.backward()
    nn.utils.clip_grad_norm_(now.model.parameters(), 1.0)
    for optimizer in now.optimizers:
        optimizer.step()
    now.step += 1
    update_average(now.average, now.model, min(recipe.ema, now.step / (now.step + 9)))
    return float(loss.detach())


def batch_loss(
    model: BaseModel,
    corpus: Corpus,
    recipe: BaseRecipe,
    generator: torch.Generator,
    nothing: tuple[Tensor, Tensor],
) -> Tensor:
    """Mean squared error of the velocity on one random batch; `nothing` is the empty text."""
    size = recipe.batch_size
    index = torch.randint(len(corpus.tokens), (size,), generator=generator)
    clean = corpus.tokens[index].float()
    clip_ids, t5_ids = corpus.clip_ids[index], corpus.t5_ids[index]
    dropped = torch.rand(size, generator=generator) < recipe.caption_dropout
    clip_ids = torch.where(dropped[:, None], nothing[0], clip_ids)
    t5_ids = torch.where(dropped[:, None], nothing[1], t5_ids)
    times = sample_times(size, generator, shift=resolution_shift(GRID * GRID))
    guidance = 1 + 4 * torch.rand(size, generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    noisy = interpolate(clean, noise, times)
    with arithmetic("cpu", "bf16"):
        velocity = model(noisy, times, guidance, clip_ids, t5_ids)
    return nn.functional.mse_loss(velocity.float(), velocity_target(clean, noise))


def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Exponential moving average of the parameters, in place."""
    with torch.no_grad():
        ours: list[Tensor] = list(average.parameters())
        torch._foreach_lerp_(ours, list(model.parameters()), 1 - decay)


def save_state(now: Pretraining, path: Path, made_from: Mapping[str, str]) -> None:
    """Replace the state file in one step."""
    tensors = {name: tensor.detach().clone() for name, tensor in now.tensors().items()}
    with replace_file(path) as new:
        save_file(tensors, new, metadata={"step": str(now.step), **made_from})


@dataclass(frozen=True)
class SavedState:
    """A state file that fits: where it was saved, and its tensors."""

    phase: int
    step: int
    tensors: dict[str, Tensor]

    def fill(self, now: Pretraining, path: Path) -> None:
        """Put the state into a phase that has just begun."""
        try:
            now.restore(self.tensors, self.step)
        except (KeyError, ValueError, RuntimeError) as problem:
            raise damaged(path, problem) from None
        logger.info("continuing from step %d of phase %d", self.step, self.phase + 1)


def read_state(path: Path, made_from: Mapping[str, str]) -> SavedState:
    """Read a state file.

    Raises:
        CheckpointError: it is damaged, or was saved under another recipe or corpus.
    """
    try:
        with safe_open(path, "pt") as file:
            told = file.metadata() or {}
        saved = SavedState(int(told["phase"]), int(told["step"]), load_file(path))
        other = [name for name, value in made_from.items() if told[name] != value]
    except (SafetensorError, OSError, KeyError, ValueError) as problem:
        raise damaged(path, problem) from None
    if other:
        raise CheckpointError(f"{path} was saved under another {other[0]}: remove it to begin anew")
    return saved


def damaged(path: Path, problem: Exception) -> CheckpointError:
    """The error for a state file that cannot be used."""
    return CheckpointError(f"{path} is damaged, remove it to begin anew: {problem}")


def origin(recipe: BaseRecipe, corpus: Corpus) -> dict[str, str]:
    """What a state belongs to."""
    levels = corpus.tokens.view(torch.int16).numpy()
    digest = hashlib.sha256(levels.tobytes()).hexdigest()
    return {"recipe": json.dumps(asdict(recipe)), "corpus": digest}
