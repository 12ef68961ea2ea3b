"""Operators. Plain ATen operations define each; on CUDA a Triton kernel replaces them where it saves time or memory."""
