"""Training dynamics for PyTorch Lightning: measured, shown, and fed back into the learning rates."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynamon.layers import describe_layers
    from dynamon.measuring import measure

__version__ = "0.1.0"
__all__ = ["__version__", "describe_layers", "measure"]


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is asked for: TensorBoard loads this package at every start."""
    if name == "describe_layers":
        from dynamon.layers import describe_layers

        return describe_layers
    if name == "measure":
        from dynamon.measuring import measure

        return measure
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
