"""Operators of the rewritten graph, each with a plain definition, a CPU implementation in blocks and Triton kernels."""

from .attention import selected_attention

__all__ = ["selected_attention"]
