"""The joint flow matching loss and the three regularisers, as pure functions.

Time runs from data (t = 0) to noise (t = 1), as in `prw_flux.flow`; the papers' t is 1 - t.
Shapes: B samples, T tokens, F channels of a packed feature token, R x C feature grid, D encoder
width, K projected channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prw_flux.coredi.statistics import mean_and_covariance
from prw_flux.flow import flow_loss


def feature_loss(
    velocity_BTF: Tensor,
    clean_BTF: Tensor,
    noise_BTF: Tensor,
    keep_B: Tensor | None = None,
    *,
    stop_gradient: bool = True,
) -> Tensor:
    """mean_B keep_B mean |v_z - sg[eps_z - z_0]|^2, the second half of the joint loss.

    ReDi, Eq. 18; CoReDi adds sg, the stop-gradient, on the target alone. The projection still
    learns through the noisy features that the transformer reads. Without sg it could make its
    target easy to predict instead of useful.

    Args:
        velocity_BTF: predicted velocity of the feature tokens.
        clean_BTF: projected features z_0, packed.
        noise_BTF: eps_z, independent of the image's noise.
        keep_B: 0 for samples whose features were dropped, else 1; None keeps all.
        stop_gradient: False only to show what happens without it.

    Returns:
        Scalar, float32 (float64 for float64 inputs).
    """
    target = clean_BTF.detach() if stop_gradient else clean_BTF
    return flow_loss(velocity_BTF, target, noise_BTF, keep_B)


def orthogonality(weight_DK: Tensor) -> Tensor:
    """||P^T P - I||_F^2: 0 where the columns of P are orthonormal, as principal components are."""
    with torch.autocast(weight_DK.device.type, enabled=False):
        gram_KK = weight_DK.mT @ weight_DK
    return (gram_KK - torch.eye(len(gram_KK)).to(gram_KK)).square().sum()


def covariance(z: Tensor, *, unit: bool = False) -> Tensor:
    """(1/K) sum over i != j of C_ij^2, C the covariance of [..., K] over everything and all ranks.

    As in VICReg (arXiv 2105.04906) and Barlow Twins; 0 where no two channels are correlated.

    Args:
        z: [..., K], of variance 1 where it is batch normalised.
        unit: divide C by the standard deviations first, or channels would shrink to please it.
    """
    c_KK = mean_and_covariance(z.flatten(0, -2))[1]
    if unit:
        scale_K = c_KK.diagonal().clamp_min(1e-12).rsqrt()
        c_KK = c_KK * torch.outer(scale_K, scale_K)
    return (c_KK.square().sum() - c_KK.diagonal().square().sum()) / len(c_KK)


def similarity(z_BRCK: Tensor, features_BRCD: Tensor, margin: float = 0.25) -> Tensor:
    """mean over images and pairs of places of relu(|cos(z_i, z_j) - cos(f_i, f_j)| - margin).

    The distance half of VA-VAE's vision-foundation loss (arXiv 2501.01423, Eq. 5): places that the
    encoder finds alike stay alike after the projection. It needs no head of its own; the other
    half, which does, is not here.

    Args:
        z_BRCK: projected features.
        features_BRCD: the encoder's.
        margin: difference that costs nothing.
    """
    gap_BGG = _cosines(z_BRCK) - _cosines(features_BRCD).to(z_BRCK.dtype)
    return F.relu(gap_BGG.abs() - margin).mean()


def _cosines(x_BRCD: Tensor) -> Tensor:
    """[B, R C, R C]"""
    unit_BGD = F.normalize(x_BRCD.flatten(1, 2), dim=-1)
    with torch.autocast(x_BRCD.device.type, enabled=False):
        return unit_BGD @ unit_BGD.mT
