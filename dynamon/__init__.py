"""Training dynamics for PyTorch and Lightning: measured, shown, and fed back into the learning rates."""

from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynamon.layers import describe_layers
    from dynamon.monitoring.snapshot import measure
    from dynamon.monitoring.watch import Watch

__version__ = "0.1.0"
__all__ = ["Watch", "__version__", "describe_layers", "measure"]

_HOMES = {
    "Watch": "dynamon.monitoring.watch",
    "describe_layers": "dynamon.layers",
    "measure": "dynamon.monitoring.snapshot",
}


def __getattr__(name: str) -> Any:
    """Import a function or module when it is first used.

    TensorBoard imports this package at every start, and its contents need torch: seconds, and hundreds of megabytes.
    """
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List what can be used, imported or not."""
    own = {module.name for module in iter_modules(__path__)}
    return sorted({*__all__, *own, "callbacks", "kernels", *(name for name in globals() if name.startswith("__"))})
