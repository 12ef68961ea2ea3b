"""Dynamo's graph becomes a functional ATen graph."""
