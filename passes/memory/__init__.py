"""Memory: the tensors that are saved for backward."""
