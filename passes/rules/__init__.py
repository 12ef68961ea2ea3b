"""Axes rules by family. Importing the package registers them."""

from . import attention, axes, custom, layout

__all__ = ["attention", "axes", "custom", "layout"]
