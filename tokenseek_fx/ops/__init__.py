"""Operators: each defined by plain ATen operations, with a Triton kernel on CUDA where one is faster or smaller."""
