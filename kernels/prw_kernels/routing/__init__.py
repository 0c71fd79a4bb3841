"""Routing: which expert a token goes to, and the tokens of each expert in whole tiles."""

from prw_kernels.routing.op import route, segments
from prw_kernels.routing.reference import Routed, Segments, route_reference, segments_reference

__all__ = ["Routed", "Segments", "route", "route_reference", "segments", "segments_reference"]
