"""The rewritten graph in chunks and segments."""
