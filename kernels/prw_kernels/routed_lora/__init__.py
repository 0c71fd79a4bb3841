"""Routed LoRA: every token adds the low-rank residual of the one expert it was routed to."""

from prw_kernels.routed_lora.reference import routed_lora

__all__ = ["routed_lora"]
