"""Attention by position: masks, eager attention, attention received."""
