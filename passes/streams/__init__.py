"""Streams: scores and selection from all tokens, and the forward on the kept rows."""
