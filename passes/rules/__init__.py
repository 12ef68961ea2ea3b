"""Rule tables."""

from . import axes, custom, rows

__all__ = ["axes", "custom", "rows"]
