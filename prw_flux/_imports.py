"""Imports diffusers' FLUX pipeline without transformers' remarks on torchvision.

The remarks are about image processors that FLUX.1 names and nothing here uses; they would stand
before the output of every command.
"""

from transformers.utils import logging

_level = logging.get_verbosity()
logging.set_verbosity_error()
try:
    import diffusers.pipelines.flux.pipeline_flux  # noqa: F401
finally:
    logging.set_verbosity(_level)
