"""Evaluate the training loss beside training, without leaving a trace in it."""
