"""Evaluations of the training loss beside training that leave no trace in it."""
