"""Training dynamics for PyTorch Lightning: measured, shown, and fed back into the learning rates."""

from dynamon.layers import describe_layers
from dynamon.measure import measure

__version__ = "0.1.0"
__all__ = ["__version__", "describe_layers", "measure"]
