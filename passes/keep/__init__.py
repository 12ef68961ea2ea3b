"""Keep: which values of other tokens are kept for the kept rows, and which are recomputed."""
