"""The one network whose Fréchet distance is called FID."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import final

import numpy as np
import torch

from prw_flux.evaluation.encoders import Encoder, EncoderError, Vectors
from prw_flux.tasks.base import Image


@final
class InceptionEncoder(Encoder):
    """Inception-v3's 2048 pool features, of torch-fidelity: what a distance may be called FID of.

    Args:
        where: "torch-fidelity" for the weights that the library fetches, or a file of them.
        device: where it runs.

    Raises:
        EncoderError: torch-fidelity is not installed, or the weights are not there.
    """

    kind = "inception"

    def __init__(self, where: str, device: str = "cpu") -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except Exception as problem:  # without a fitting torchvision it fails in many ways
            raise EncoderError(
                f"FID needs Inception-v3 of torch-fidelity, which cannot be imported ({problem}): "
                "pip install torch-fidelity torchvision, or leave --fid out."
            ) from None
        file = None if where == "torch-fidelity" else where
        if file is not None and not Path(file).is_file():
            raise EncoderError(f"There are no Inception weights at {file}.")
        self.name, self._device = "torch-fidelity", device
        try:
            self._model = (
                FeatureExtractorInceptionV3(
                    "inception-v3-compat", ["2048"], feature_extractor_weights_path=file
                )
                .eval()
                .to(device)
            )
        except Exception as problem:
            detail = " ".join(str(problem).split())[:200]
            raise EncoderError(f"Inception-v3 cannot be loaded: {detail}") from problem

    @torch.no_grad()
    def images(self, images: Sequence[Image]) -> Vectors:
        """N pictures -> float32 [N, 2048]; the network brings them to 299 x 299 itself."""
        return np.concatenate([self._one(image) for image in images])

    def _one(self, image: Image) -> Vectors:
        x_BCHW = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(self._device)
        return np.asarray(self._model(x_BCHW)[0].float().cpu().numpy(), np.float32)
