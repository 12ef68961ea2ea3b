"""What the two streams keep or recompute beside the kept rows."""
