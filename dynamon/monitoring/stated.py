"""Hold what the user states of layers and optimizers, and say once what is assumed of the others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakSet

from torch import nn
from torch.optim import Optimizer

from dynamon.layers import ROLES
from dynamon.layers.roles import role_assumption
from dynamon.monitoring.arguments import BadArgumentError
from dynamon.monitoring.messages import rank_zero_info
from dynamon.norms.geometry import FAMILIES, geometry_assumption, optimizer_family

_told: "WeakSet[Optimizer | nn.Module]" = WeakSet()  # of which was said what is assumed


@dataclass(frozen=True)
class Stated:
    """Hold what the user states of a model and its optimizers.

    Attributes:
        roles: Roles of layers by glob.
        geometry: The geometry of all optimizers, or of some by the name of their class.

    Raises:
        TypeError: On another type.
        ValueError: On a role or a geometry that does not exist.
    """

    roles: Mapping[str, str] | None = None
    geometry: str | Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if not isinstance(self.roles, Mapping | None):
            raise TypeError(f"roles must map globs to roles, like {{'stem.*': 'embedding'}}, got {self.roles!r}.")
        for glob, role in (self.roles or {}).items():
            if role not in ROLES:
                raise ValueError(f"roles has {role!r} for {glob!r}; choose one of {', '.join(ROLES)}.")
        if not isinstance(self.geometry, str | Mapping | None):
            raise TypeError(f"geometry must be a string or map class names to strings, got {self.geometry!r}.")
        wrong = [family for family in self._families().values() if family not in FAMILIES]
        if wrong:
            raise ValueError(f"geometry must be one of {', '.join(FAMILIES)}, got {wrong[0]!r}.")

    def _families(self) -> Mapping[str, str]:
        """The stated geometries by class name, "" for all classes."""
        return {"": self.geometry} if isinstance(self.geometry, str) else self.geometry or {}

    def check(self, optimizers: Sequence[Optimizer]) -> None:
        """Raise BadArgumentError where a geometry is stated of an optimizer that is not there."""
        names = sorted({type(optimizer).__name__ for optimizer in optimizers})
        unknown = [name for name in self._families() if name not in ("", *names)]
        if unknown and names:
            raise BadArgumentError(
                f"geometry has {unknown[0]!r}, and the optimizers are {', '.join(names)}: its keys are their classes. "
                "roles= is for layers."
            )

    def family(self, optimizer: Optimizer) -> str:
        """Return the geometry of an optimizer; where it is a guess, say so once."""
        families = self._families()
        stated = families.get(type(optimizer).__name__, families.get(""))
        if stated is None:
            say_geometry(optimizer)
        return optimizer_family(optimizer, stated)


def say_geometry(optimizer: Optimizer) -> None:
    """Say once of an optimizer what is assumed of it, where its geometry is a guess."""
    _say_once(optimizer, geometry_assumption(optimizer))


def say_roles(module: nn.Module, roles: Mapping[str, str] | None) -> None:
    """Say once of a model which roles of its layers are a guess."""
    _say_once(module, role_assumption(module, roles))


def _say_once(thing: Optimizer | nn.Module, sentence: str | None) -> None:
    if sentence is not None and thing not in _told:
        rank_zero_info(sentence)
    _told.add(thing)
