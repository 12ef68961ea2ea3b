"""The two streams: scores, selection, the kept rows."""
