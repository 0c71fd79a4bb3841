"""Routed LoRA: every token adds the low-rank residual of the one expert it was routed to."""

from prw_kernels.routed_lora.linear import routed_linear
from prw_kernels.routed_lora.op import routed_lora
from prw_kernels.routed_lora.reference import reference

__all__ = ["reference", "routed_linear", "routed_lora"]
