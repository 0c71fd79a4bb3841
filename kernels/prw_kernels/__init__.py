"""Operators for routed low-rank experts: one folder per op, each with its plain PyTorch truth."""

from prw_kernels.routed_lora import routed_linear, routed_lora

__all__ = ["routed_linear", "routed_lora"]
