"""Capture: turn Dynamo's graph into a functional ATen graph."""
