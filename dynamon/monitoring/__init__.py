"""The engine that measures quantities of a run."""
