"""Progressive Representation Weaving: routed LoRA experts that grow stage by stage in any model."""

from prw.call import Call, Record
from prw.config import Config
from prw.errors import CheckpointError, ConfigError, PRWError, StageError
from prw.injection import load, weave
from prw.losses import veteran_gate_loss
from prw.pool import Pool
from prw.router import Routing
from prw.weaving import Weave

__all__ = [
    "Call",
    "CheckpointError",
    "Config",
    "ConfigError",
    "PRWError",
    "Pool",
    "Record",
    "Routing",
    "StageError",
    "Weave",
    "load",
    "veteran_gate_loss",
    "weave",
]

__version__ = "0.1.0"
