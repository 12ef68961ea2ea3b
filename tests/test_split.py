"""The ditch stream compiled block by block: equal to the reference, and gradients leave the backward block after block."""
