"""Blocks for diffusers' modular pipelines: one step that encodes a source for all that follow.

    blocks = CoLoGenBlocks()
    pipe = blocks.init_pipeline()
    pipe.update_components(prw=adapter, **flux.components)
    image = pipe(prompt="make the cap blue", image=photo, task="edit", output="images")[0]

The denoising blocks are diffusers' own: the recorded source reaches them by
`joint_attention_kwargs`. So a source that follows the time of the step is refused
(`source_timestep="current"`), and true CFG and step caches are `CoLoGenPipeline`'s.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.modular_pipelines.flux.decoders import FluxDecodeStep
from diffusers.modular_pipelines.flux.encoders import FluxTextEncoderStep
from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxCoreDenoiseStep
from diffusers.modular_pipelines.modular_pipeline import (
    ModularPipelineBlocks,
    PipelineState,
    SequentialPipelineBlocks,
)
from diffusers.modular_pipelines.modular_pipeline_utils import (
    ComponentSpec,
    InputParam,
    OutputParam,
)
from transformers import CLIPTextModel, CLIPTokenizer

from prw_flux.adapter import PRWAdapter
from prw_flux.pipeline import CoLoGenPipeline
from prw_flux.source_cache import FluxCall

COMPONENTS = {
    "scheduler": FlowMatchEulerDiscreteScheduler,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "tokenizer": CLIPTokenizer,
    "transformer": FluxTransformer2DModel,
    "prw": PRWAdapter,
}
INPUTS = ("image", "task", "route", "mask_image", "source_scale", "source_size", "height", "width")


class SourceStep(ModularPipelineBlocks):
    """Encode the source once; inputs are arguments of `CoLoGenPipeline.encode_source`."""

    model_name = "flux"

    @property
    def description(self) -> str:
        """What it does, for diffusers' listings."""
        return "Encodes the source image through a PRW adapter; without an image, does nothing."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """What is needed beside the denoising step's components."""
        return [ComponentSpec(name, kind) for name, kind in COMPONENTS.items()]

    @property
    def inputs(self) -> list[InputParam]:
        """Arguments of `encode_source`, all optional."""
        return [InputParam(name) for name in (*INPUTS, "joint_attention_kwargs")]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """What the steps that follow read: the source, and the size that belongs to it."""
        return [
            OutputParam("joint_attention_kwargs", type_hint=dict),
            OutputParam("height", type_hint=int),
            OutputParam("width", type_hint=int),
        ]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        """Run the source through the transformer; raises as `encode_source` does."""
        block_state = self.get_block_state(state)
        if block_state.image is not None:
            parts = {name: getattr(components, name) for name in COMPONENTS}
            pipe = CoLoGenPipeline(**parts, text_encoder_2=None, tokenizer_2=None)
            given = {name: getattr(block_state, name) for name in INPUTS}
            cache = pipe.encode_source(**{k: v for k, v in given.items() if v is not None})
            joint = block_state.joint_attention_kwargs or {}
            block_state.joint_attention_kwargs = {**joint, "prw": FluxCall(cache, "main")}
            block_state.height, block_state.width = cache.meta.height, cache.meta.width
        self.set_block_state(state, block_state)
        return components, state


class CoLoGenBlocks(SequentialPipelineBlocks):
    """Text, source, diffusers' denoising, decoding."""

    model_name = "flux"
    block_classes = [FluxTextEncoderStep, SourceStep, FluxCoreDenoiseStep, FluxDecodeStep]
    block_names = ["text_encoder", "source", "denoise", "decode"]

    @property
    def description(self) -> str:
        """What it does, for diffusers' listings."""
        return "FLUX.1 with a source image through a PRW adapter."

    @property
    def outputs(self) -> list[OutputParam]:
        """Images."""
        return [OutputParam.template("images")]
