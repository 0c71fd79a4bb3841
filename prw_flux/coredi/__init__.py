"""CoReDi (arXiv 2604.17492) and ReDi (2504.16064): semantic features beside the image latents."""

from prw_flux.coredi.collapse import Watch
from prw_flux.coredi.config import REDI, CoReDiConfig
from prw_flux.coredi.encoders import DinoV2, FeatureEncoder, FunctionEncoder, load_encoder
from prw_flux.coredi.losses import covariance, feature_loss, orthogonality, similarity
from prw_flux.coredi.model import CoReDi, Noised
from prw_flux.coredi.projection import Projection
from prw_flux.coredi.sampling import carrying, latent_only_guidance, representation_guidance
from prw_flux.coredi.statistics import effective_rank
from prw_flux.coredi.stream import FeatureStream, joined

__all__ = [
    "REDI",
    "CoReDi",
    "CoReDiConfig",
    "DinoV2",
    "FeatureEncoder",
    "FeatureStream",
    "FunctionEncoder",
    "Noised",
    "Projection",
    "Watch",
    "carrying",
    "covariance",
    "effective_rank",
    "feature_loss",
    "joined",
    "latent_only_guidance",
    "load_encoder",
    "orthogonality",
    "representation_guidance",
    "similarity",
]
