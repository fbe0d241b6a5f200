"""Find out in which geometry an optimizer descends: stated, from its class, from its name, or assumed."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.optim import Optimizer

from dynamon.quantities.names import word_runs

FAMILIES = ("sign", "euclidean", "spectral")
STATED = "dynamon_geometry"  # the attribute of an optimizer or its class

_TORCH = {
    "sign": "Adam AdamW NAdam RAdam Adamax SparseAdam Adafactor RMSprop Rprop Adagrad Adadelta",
    "euclidean": "SGD ASGD LBFGS",
    "spectral": "Muon",
}
_CLASSES = {
    getattr(torch.optim, name): family
    for family, names in _TORCH.items()
    for name in names.split()
    if hasattr(torch.optim, name)
}
# Whole words in the names of classes that are not torch's. Shampoo and SOAP are steepest descent in the spectral norm,
# Prodigy in that of Adam: Bernstein and Newhouse, arXiv 2409.20325. If several words match, the first row counts.
_WORDS = {
    "spectral": "muon scion lanton dion shampoo soap",
    "sign": "adam adamw nadam radam adamax adamp adan adema ademamix adafactor adabelief adabound adamod yogi laprop "
    "lamb lion tiger sign signsgd signum rmsprop rprop adagrad adadelta prodigy sophia came ranger",
    "euclidean": "sgd sgdw sgdp asgd lars lbfgs",
}
_FAMILY_OF = {word: family for family in ("euclidean", "sign", "spectral") for word in _WORDS[family].split()}
_WRAPPED = ("base_optimizer", "optimizer", "optim", "_optimizer")


@dataclass(frozen=True)
class Geometry:
    """A geometry, and how it is known.

    Attributes:
        family: ``"sign"``, ``"euclidean"`` or ``"spectral"``, see :func:`dynamon.norms.update_norm`.
        source: ``"stated"``, ``"class"`` (one of torch's, or derived from it), ``"name"``, or ``"nothing"``.
    """

    family: str
    source: str

    @property
    def is_guess(self) -> bool:
        """Whether only a name indicates it, or nothing."""
        return self.source in ("name", "nothing")


def optimizer_geometry(optimizer: Optimizer, stated: str | None = None) -> Geometry:
    """Return the geometry an optimizer descends in.

    In this order: ``stated``; the attribute ``dynamon_geometry`` of the optimizer or its class; torch's class that it
    is or derives from, unless the deriving class is named like another optimizer; the optimizer it wraps; whole words
    in the names of its classes; ``"euclidean"``.

    Args:
        optimizer: Any optimizer.
        stated: The family, if the caller knows it.

    Raises:
        ValueError: If what is stated is not one of the three families.
    """
    source = "geometry" if stated is not None else f"{STATED} of {type(optimizer).__name__}"
    stated = getattr(optimizer, STATED, None) if stated is None else stated
    if stated is not None:
        if stated not in FAMILIES:
            raise ValueError(f"{source} must be 'sign', 'euclidean' or 'spectral', got {stated!r}.")
        return Geometry(stated, "stated")
    for cls in type(optimizer).__mro__:
        if cls in _CLASSES:
            return Geometry(_CLASSES[cls], "class")
        if cls.__name__.lower() in _FAMILY_OF:
            return Geometry(_FAMILY_OF[cls.__name__.lower()], "name")
    inner = next((one for one in map(vars(optimizer).get, _WRAPPED) if isinstance(one, Optimizer)), None)
    if inner is not None:
        return optimizer_geometry(inner)
    found = {_FAMILY_OF[word] for word in _words(optimizer) if word in _FAMILY_OF}
    known = next((family for family in _WORDS if family in found), None)
    return Geometry("euclidean", "nothing") if known is None else Geometry(known, "name")


def optimizer_family(optimizer: Optimizer, stated: str | None = None) -> str:
    """Return the family of an optimizer's geometry, see :func:`dynamon.norms.geometry.optimizer_geometry`.

    Args:
        optimizer: Any optimizer.
        stated: The family, if the caller knows it.

    Returns:
        ``"sign"`` for optimizers that divide by the gradient's own size entry by entry or take its sign, ``"spectral"``
        for those that orthogonalise, ``"euclidean"`` for SGD and unknown ones.

    Example:
        >>> import torch
        >>> from dynamon.norms import optimizer_family
        >>> optimizer = torch.optim.AdamW([torch.zeros(2, 2, requires_grad=True)])
        >>> optimizer_family(optimizer), optimizer_family(optimizer, "spectral")
        ('sign', 'spectral')
    """
    return optimizer_geometry(optimizer, stated).family


def geometry_assumption(optimizer: Optimizer) -> str | None:
    """Return what is assumed of an optimizer whose geometry is a guess, and how to state it; None if it is known."""
    found = optimizer_geometry(optimizer)
    if not found.is_guess:
        return None
    name = type(optimizer).__name__
    why = "by its name" if found.source == "name" else "like SGD, since it is unknown"
    return (
        f"{name} is assumed to descend in {found.family!r} geometry, {why}: gradient/dual and noise use its norms. "
        f"To state it, pass geometry='sign', 'euclidean' or 'spectral' to the monitor, or set {STATED} on its class."
    )


def _words(optimizer: Optimizer) -> Iterator[str]:
    for cls in type(optimizer).__mro__:
        yield from word_runs(cls.__name__)
