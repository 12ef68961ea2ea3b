"""Axes rules by family. Importing the package registers them."""

from . import attention, axes, custom

__all__ = ["attention", "axes", "custom"]
