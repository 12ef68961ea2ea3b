"""Lower: the rewritten graph in chunks and segments, ready to be compiled."""
