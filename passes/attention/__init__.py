"""Attention that masks by position: reading masks and eager attention, and attention received."""
