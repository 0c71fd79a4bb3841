"""Routing: which expert a token goes to, and the tokens of each expert in whole tiles."""

from prw_kernels.routing.op import segments
from prw_kernels.routing.reference import Segments, segments_reference

__all__ = ["Segments", "segments", "segments_reference"]
