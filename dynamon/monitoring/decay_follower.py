"""Follow what decoupled weight decay leaves of the weights, through all steps of all optimizers."""

from collections.abc import Callable, Mapping

from torch import Tensor
from torch.optim import Optimizer

from dynamon.optim import LayerwiseRates, steering_of
from dynamon.quantities.weight_decay import DecayRetention

_Names = Callable[[], Mapping[int, str]]


class DecayFollower:
    """Tells a :class:`dynamon.quantities.weight_decay.DecayRetention` of every step, with the ratios of its steering.

    It is a :class:`dynamon.optim.stepping.Follower`: what goes wrong inside of a step is raised by :meth:`check`.

    Args:
        names: Returns layer names by the ``id`` of the parameter, as they were read last.
        read_names: Reads the names again; None for ``names``.

    Attributes:
        retention: What is left by layer.
    """

    def __init__(self, names: _Names = dict, read_names: _Names | None = None) -> None:
        """Start before any step."""
        self.retention = DecayRetention()
        self._names, self._read_names = names, read_names
        self._lost: Exception | None = None

    def find_names(self, names: _Names, read_names: _Names) -> None:
        """Take the names from a run that has begun."""
        self._names, self._read_names = names, read_names

    def step_begins(self, optimizer: Optimizer) -> None:
        """Note the rates of a step, whether it is measured or not."""
        rates = steering_of(optimizer)
        try:
            self.retention.note(optimizer, None if rates is None else rates.groups)
        except Exception as error:  # training goes on; the next measurement fails of it
            self._lost = error

    def step_ends(self, optimizer: Optimizer, skipped: Tensor | None) -> None:
        """Follow the decay of a step."""
        rates = steering_of(optimizer)
        try:
            ratios = None if rates is None or not rates.scale_weight_decay else ratios_of(rates, self._names())
            self.retention.take(optimizer, self._names, ratios, skipped, self._read_names)
        except Exception as error:  # inside of the optimizer step: told at its end
            self._lost = error

    def check(self) -> None:
        """Raise what went wrong since the last call."""
        lost, self._lost = self._lost, None
        if lost is not None:
            raise lost


def ratios_of(rates: LayerwiseRates, names: Mapping[int, str]) -> dict[str, float]:
    """Return the factors that steering had on the rates of the step that was taken last, by layer name."""
    applied = rates.applied
    return {names.get(id(la.parameter), la.name): applied[la.name] for la in rates.layers}
