"""Processes that measure together, and tensors of which each holds a part."""
