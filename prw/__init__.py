"""Progressive Representation Weaving: routed LoRA experts that grow stage by stage in any model."""

from prw.call import Call, Record
from prw.config import Config
from prw.errors import CheckpointError, ConfigError, PRWError, StageError
from prw.hub import from_pretrained
from prw.injection import load, weave
from prw.losses import entropy_loss, load_balance_loss, veteran_gate_loss, z_loss
from prw.merging import Fidelity
from prw.pool import Pool
from prw.router import NoisyTop1, Router, RouterPass, Routing, Top1
from prw.weaving import Weave

__all__ = [
    "Call",
    "CheckpointError",
    "Config",
    "ConfigError",
    "Fidelity",
    "NoisyTop1",
    "PRWError",
    "Pool",
    "Record",
    "Router",
    "RouterPass",
    "Routing",
    "StageError",
    "Top1",
    "Weave",
    "entropy_loss",
    "from_pretrained",
    "load",
    "load_balance_loss",
    "veteran_gate_loss",
    "weave",
    "z_loss",
]

__version__ = "0.1.0"
