"""Follow the learning rates of all parameter groups through every step."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from dynamon.health.limits import RATE_JUMP
from dynamon.monitoring.levels import WARM_UP
from dynamon.monitoring.run_context import RunContext
from dynamon.optim import steering_of

_SAME = 1.01  # times the largest rate so far: a restart comes back to the rate that it began with


class RateWatch:
    """Finds the steps at which the learning rate of a parameter group more than doubles from one step to the next.

    Only a rise beyond every rate that the group has had counts: a restart of a schedule comes back to what was there.
    After a resume the rate before it is what counts, so that a schedule which begins anew is found. The first 16 steps
    of a group are not judged: a warm-up doubles its rate there.

    Rates are those of the groups, without the ratios of steering. Numbers and tensors on the host are read; a rate that
    is a tensor on another device is left out, since the host would have to wait for it.

    Cost: host work of about a microsecond per group and step; nothing is asked of the device.
    """

    def __init__(self) -> None:
        """Start before any step."""
        self._groups: dict[Optimizer, list[list[float]]] = {}  # steps seen, last rate and largest rate of each group
        self._saved: list[list[list[float]]] = []
        self._rise = 1.0

    def see(self, optimizer: Optimizer) -> None:
        """Note the rates that a step is about to use."""
        steering = steering_of(optimizer)
        known = self._groups.get(optimizer)
        if known is None:
            place = len(self._groups)
            known = self._groups[optimizer] = self._saved[place] if place < len(self._saved) else []
        for at, group in enumerate(optimizer.param_groups if steering is None else steering.groups):
            if at == len(known):
                known.append([0, 0.0, 0.0])
            rate: Any = group.get("lr", 0.0)
            if isinstance(rate, Tensor):
                if rate.device.type != "cpu":
                    continue
                rate = float(rate)
            seen, last, largest = known[at]
            if seen >= WARM_UP and rate > _SAME * largest > 0:
                self._rise = max(self._rise, rate / (last or largest))
            known[at] = [seen + 1, rate, max(rate, largest)]

    def log(self, run: RunContext) -> bool:
        """Record a jump at the step that was seen last, and return whether there was one."""
        rise, self._rise = self._rise, 1.0
        if rise < RATE_JUMP:
            return False
        run.recorder.hand_on(run.loop, run.step, run.budget, {"lr/rise": rise}, {})
        return True

    def state_dict(self) -> list[list[list[float]]]:
        """Return what is known of each group, by the place of its optimizer."""
        return [[list(group) for group in groups] for groups in self._groups.values()] or self._saved

    def load_state_dict(self, state: Sequence[Sequence[Sequence[float]]]) -> None:
        """Take it up: what comes next is compared with the rates of the last step."""
        self._groups, self._rise = {}, 1.0
        self._saved = [[[seen, last, last] for seen, last, _ in groups] for groups in state]
