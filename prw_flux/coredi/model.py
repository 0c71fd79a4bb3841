"""CoReDi: projection and feature stream together, with their files.

Shapes: B images, R x C feature grid, D encoder width, K projected channels, T tokens, F channels of
a packed feature token.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self, final

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prw import CheckpointError, ConfigError
from prw.atomic import replace_folder
from prw_flux.coredi.config import CoReDiConfig
from prw_flux.coredi.grid import place, token_width
from prw_flux.coredi.losses import covariance, feature_loss, orthogonality, similarity
from prw_flux.coredi.projection import Projection
from prw_flux.coredi.stream import FeatureStream
from prw_flux.flow import interpolate
from prw_flux.schema import build, plain

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
SETTINGS = ("channels", "layout", "tokens", "learn_projection", "normalise")
"""What a stream that goes on must have in common with the one that was saved."""


@dataclass(frozen=True, eq=False)
class Noised:
    """Projected features of a batch on their way through one step.

    Attributes:
        features_BRCD: of the encoder.
        projected_BRCK: normalised projection.
        clean_BTF: packed, z_0.
        noise_BTF: eps_z.
        noisy_BTF: z_t, zero where dropped; what the transformer reads.
        keep_B: 0 where dropped, else 1.
    """

    features_BRCD: Tensor
    projected_BRCK: Tensor
    clean_BTF: Tensor
    noise_BTF: Tensor
    noisy_BTF: Tensor
    keep_B: Tensor

    def part(self, start: int, stop: int) -> Noised:
        """Of some pictures."""
        return Noised(**{name: tensor[start:stop] for name, tensor in vars(self).items()})

    def leaves(self) -> Noised:
        """The same where what is read and what is aimed at begin graphs of their own."""
        clean, noisy = (
            x.detach().requires_grad_(x.requires_grad) for x in (self.clean_BTF, self.noisy_BTF)
        )
        return replace(self, clean_BTF=clean, noisy_BTF=noisy)


@final
class CoReDi(nn.Module):
    """A projection and a stream for one transformer.

    Args:
        config: settings.
        width: D.
        inner_dim: of the transformer.
    """

    def __init__(self, config: CoReDiConfig, width: int, inner_dim: int) -> None:
        super().__init__()
        self.config, self.width = config, width
        self.projection = Projection(
            width, config.channels, learn=config.learn_projection, normalise=config.normalise
        )
        self.token_width = token_width(config.channels, config.layout)
        self.stream = FeatureStream(inner_dim, self.token_width, config.tokens)
        self.snapshots: dict[str, dict[str, Tensor]] = {}

    @classmethod
    def for_transformer(
        cls, transformer: FluxTransformer2DModel, config: CoReDiConfig, width: int
    ) -> Self:
        """A fresh one for `transformer`, on its device, in float32; `projection.fit` comes next."""
        return cls(config, width, transformer.inner_dim).to(transformer.device)

    def learners(self) -> list[nn.Parameter]:
        """The parameters that learn."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    # One step ---------------------------------------------------------------------------------

    def clean(self, features_BRCD: Tensor, tokens: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Projected features [B, R, C, K], and z_0 [B, T, F] beside rows x columns image tokens.

        Raises:
            ConfigError: another width, a grid that does not fit, a batch of one in training.
        """
        projected_BRCK = self.projection(features_BRCD)
        return projected_BRCK, place(projected_BRCK, tokens, self.config.layout)

    def noised(
        self,
        features_BRCD: Tensor,
        tokens: tuple[int, int],
        times_B: Tensor,
        draw: torch.Generator | None = None,
        part: range | None = None,
        whole: int = 0,
    ) -> Noised:
        """z_t = (1 - t) z_0 + t eps_z with noise of its own; dropped samples read zero instead.

        Args:
            features_BRCD: of the pictures that are being denoised.
            tokens: rows and columns of image tokens.
            times_B: the image's times.
            draw: CPU generator of the noise and of what is dropped.
            part: where these pictures stand in a batch of `whole`, for which it draws; None draws
                for these alone.
        """
        projected_BRCK, clean_BTF = self.clean(features_BRCD, tokens)
        part, whole = (range(len(times_B)), len(times_B)) if part is None else (part, whole)
        mine = slice(part.start, part.stop)
        noise_BTF = torch.randn(whole, *clean_BTF.shape[1:], generator=draw)[mine].to(clean_BTF)
        keep_B = torch.rand(whole, generator=draw)[mine] >= self.config.drop
        keep_B = keep_B.to(clean_BTF)
        noisy_BTF = interpolate(clean_BTF, noise_BTF, times_B) * keep_B[:, None, None]
        return Noised(features_BRCD, projected_BRCK, clean_BTF, noise_BTF, noisy_BTF, keep_B)

    @torch.no_grad()
    def measured(
        self,
        features_BRCD: Tensor,
        tokens: tuple[int, int],
        times_B: Tensor,
        draws: Sequence[torch.Generator],
    ) -> Tensor:
        """z_t [B, T, F] of pictures that are not trained on: none is dropped, and nothing moves.

        The running statistics normalise, as they do in evaluation.

        Args:
            features_BRCD, tokens, times_B: as in `noised`.
            draws: CPU generators of the noise, one per picture.
        """
        training = self.projection.training
        self.projection.eval()
        try:
            clean_BTF = self.clean(features_BRCD, tokens)[1]
        finally:
            self.projection.train(training)
        noise_BTF = torch.stack([torch.randn(clean_BTF.shape[1:], generator=d) for d in draws])
        return interpolate(clean_BTF, noise_BTF.to(clean_BTF), times_B)

    def loss(self, velocity_BTF: Tensor, batch: Noised) -> tuple[Tensor, Tensor]:
        """Feature loss and regularisers, both with their weights."""
        return self.flow(velocity_BTF, batch), self.penalty(batch)

    def flow(self, velocity_BTF: Tensor, batch: Noised) -> Tensor:
        """The feature loss with its weight, a mean over the pictures."""
        return self.config.weight * feature_loss(
            velocity_BTF,
            batch.clean_BTF,
            batch.noise_BTF,
            batch.keep_B,
            stop_gradient=self.config.stop_gradient,
        )

    def penalty(self, batch: Noised) -> Tensor:
        """The regularisers with their weights, of whole batches."""
        config = self.config
        penalty = batch.clean_BTF.new_zeros(())
        if config.learn_projection and config.orthogonality:
            penalty = penalty + config.orthogonality * orthogonality(self.projection.weight_DK)
        if config.learn_projection and config.covariance:
            penalty = penalty + config.covariance * covariance(
                batch.projected_BRCK, unit=config.normalise == "none"
            )
        if config.learn_projection and config.similarity:
            penalty = penalty + config.similarity * similarity(
                batch.projected_BRCK, batch.features_BRCD
            )
        return penalty

    # Stages -----------------------------------------------------------------------------------

    def close_stage(self, name: str) -> None:
        """Keep what everything is at the end of a stage, for `at_stage`."""
        self.snapshots[name] = {k: v.detach().cpu().clone() for k, v in self.state_dict().items()}

    @contextmanager
    def at_stage(self, name: str) -> Iterator[None]:
        """Inside, everything is what it was at the end of a stage, bit for bit.

        Raises:
            ConfigError: there is no such stage.
        """
        if name not in self.snapshots:
            known = ", ".join(self.snapshots) or "none"
            raise ConfigError(f"the feature stream has no stage {name!r}, it knows {known}")
        now = {key: value.detach().clone() for key, value in self.state_dict().items()}
        self.load_state_dict(self.snapshots[name])
        try:
            yield
        finally:
            self.load_state_dict(now)

    # Files ------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Replace a folder: ``coredi.json`` and ``coredi.safetensors``, all or nothing.

        Raises:
            CheckpointError: it cannot be written.
        """
        try:
            with replace_folder(folder) as new:
                self.write(new)
        except (OSError, SafetensorError) as problem:
            raise CheckpointError(f"{folder} could not be written: {problem}") from problem

    def write(self, folder: Path) -> None:
        """Write the two files into an existing folder."""
        states = {"now": self.state_dict(), **{f"stages/{k}": v for k, v in self.snapshots.items()}}
        tensors = {
            f"{prefix}/{key}": value.detach().cpu().contiguous()
            for prefix, state in states.items()
            for key, value in state.items()
        }
        save_file(tensors, folder / "coredi.safetensors")
        told = {
            "schema_version": SCHEMA_VERSION,
            "width": self.width,
            "inner_dim": self.stream.embed.out_features,
            "stages": list(self.snapshots),
            "config": plain(self.config),
        }
        (folder / "coredi.json").write_text(json.dumps(told, indent=1), "utf-8")

    @classmethod
    def load(
        cls, folder: str | Path, *, width: int | None = None, config: CoReDiConfig | None = None
    ) -> Self:
        """Read a folder of `save`.

        Args:
            folder: the folder.
            width: of the encoder that will be used, if it is known.
            config: of a run that goes on; its rates and weights win, its shapes must be the same.

        Raises:
            CheckpointError: a file is missing, damaged or too new, or the encoder has another
                width than the checkpoint.
            ConfigError: `config` differs in what cannot change.
        """
        folder = Path(folder)
        try:
            told = json.loads((folder / "coredi.json").read_text("utf-8"))
            if told["schema_version"] > SCHEMA_VERSION:
                raise CheckpointError(
                    f"{folder} has schema version {told['schema_version']}, this prw_flux reads up "
                    f"to {SCHEMA_VERSION}: install a newer prw"
                )
            stored = build(CoReDiConfig, told["config"])
            made = cls(stored, int(told["width"]), int(told["inner_dim"]))
            made._read(load_file(folder / "coredi.safetensors"), told["stages"])
        except CheckpointError:
            raise
        except (OSError, SafetensorError, RuntimeError, TypeError, KeyError, ValueError) as problem:
            raise CheckpointError(f"{folder} cannot be read: {problem}") from None
        if width is not None and width != made.width:
            raise CheckpointError(
                f"{folder} was trained on features of width {made.width}, this encoder gives "
                f"{width}: use {stored.encoder!r}"
            )
        if config is not None:
            _require_same_settings(folder, stored, config)
            made.config = replace(config)
        return made

    def _read(self, tensors: dict[str, Tensor], stages: list[str]) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

        self.load_state_dict(part("now/"))
        for name in stages:
            self.snapshots[name] = part(f"stages/{name}/")
            if self.snapshots[name].keys() != self.state_dict().keys():
                raise KeyError(f"stage {name}")


def _require_same_settings(folder: Path, stored: CoReDiConfig, config: CoReDiConfig) -> None:
    if stored.encoder != config.encoder:  # a folder may have moved
        logger.warning(
            "%s was trained on features of %r, this run uses %r: they must be the same encoder",
            folder, stored.encoder, config.encoder,
        )  # fmt: skip
    for name in SETTINGS:
        theirs, ours = (getattr(c, name) for c in (stored, config))
        if theirs != ours:
            raise ConfigError(
                f"{folder} was trained with coredi.{name} {theirs!r}, this run asks for {ours!r}: "
                f"use --set coredi.{name}={theirs}"
            )
