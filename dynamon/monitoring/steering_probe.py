"""Give rules what they follow of a step: its effect on the loss of the next batch, before that is trained on."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dynamon.isolation.preserve import LossFn
from dynamon.layers import Layer
from dynamon.monitoring.failures import first_line
from dynamon.monitoring.loop import Loop
from dynamon.monitoring.messages import rank_zero_info, rank_zero_warn
from dynamon.monitoring.step_probe import StepProbe
from dynamon.optim import LayerwiseRates
from dynamon.quantities.progress import Couplings

_PATIENCE = 3  # readings in a row that may fail


class SteeringProbe:
    """Measures steps for the rules that ask for it (:attr:`dynamon.rates.Rule.needs_probe`).

    Call :meth:`batch_start` with every batch before it is trained on. Where a reading fails, ratios stay as they are,
    and that is said; after three in a row there are no more. With several processes a reading succeeds on all, or on
    none.

    Args:
        loop: The training loop.
        loss_fn: ``loss_fn(module, batch)``, or None for the loss of the loop.
        save: Whether checkpoints hold the weights that are kept for a reading.

    Cost: nothing at steps that no rule asks for, but one question to each rule.
    """

    def __init__(self, loop: Loop, loss_fn: LossFn | None = None, save: bool = True) -> None:
        """Measure nothing yet."""
        self._probe, self._save = StepProbe(loop, loop.ranks(), loss_fn), save
        self._asked: dict[int, tuple[str, int]] = {}  # by the place of the optimizer: what, and the rule's steps then
        self._failed = 0
        self._is_off = False
        self._told: set[int] = set()

    def start(self, name: str, steered: Sequence[LayerwiseRates], pending: Mapping[str, Any]) -> None:
        """Begin a run; where nothing can be measured in it, say why: ratios then stay as they are.

        Args:
            name: Of the caller, for messages.
            steered: What steers each optimizer.
            pending: What :meth:`state_dict` returned, or an empty mapping.
        """
        layers = _layers(steered)
        if layers and (reason := self._probe.off_reason(layers)) is not None:
            self._is_off = True
            rank_zero_warn(f"{name} cannot follow this run, and all ratios stay as they are: {reason}")
            return
        for rates in steered:
            self.follow(rates)
        self.load_state_dict(pending, steered)

    def follow(self, rates: LayerwiseRates) -> None:
        """Follow the weight decay in an optimizer's steps."""
        if self._probe not in rates.watch.followers:
            rates.watch.followers.append(self._probe)

    def batch_start(self, steered: Sequence[LayerwiseRates], batch: Any) -> None:
        """Measure on this batch the step that was asked for, if it was taken, and keep weights for the next.

        Args:
            steered: What steers each optimizer, in the same order at every call.
            batch: The batch, on the device, not trained on yet.
        """
        if self._is_off:
            return
        if self._probe.is_kept:
            stepped = {place for place, (_, steps) in self._asked.items() if steered[place].rule.steps > steps}
            if stepped:
                self._read([(place, steered[place]) for place in sorted(stepped)], batch)
            else:
                return  # in the middle of an accumulation window, or the step was skipped
        self._tell(steered)
        asked = {place: what for place, rates in enumerate(steered) if (what := rates.rule.asks_for()) is not None}
        if asked and not self._is_off:
            self._asked = {place: (what, steered[place].rule.steps) for place, what in asked.items()}
            self._probe.keep(_layers([steered[place] for place in asked]))

    def _read(self, stepped: Sequence[tuple[int, LayerwiseRates]], batch: Any) -> None:
        try:
            with self._probe.ranks.collective_section():
                if self._asked[stepped[0][0]][0] == "step":
                    if (reading := self._probe.read(batch)) is not None:
                        for _, rates in stepped:
                            rates.rule.learn(reading)
                else:
                    self._read_couplings([rates for _, rates in stepped], batch)
            self._failed = 0
        except Exception as error:  # steering must not end training: ratios stay as they are
            self._probe.forget()
            self._failed += 1
            if self._failed in (1, _PATIENCE):
                ends = "Ratios stay as they are." if self._failed == _PATIENCE else "Its ratios stay until the next."
                rank_zero_warn(f"{_name(stepped)}: a reading of a step failed: {first_line(error)} {ends}")
            self._is_off = self._failed >= _PATIENCE
        if self._probe.effects.reason is not None and not self._is_off:
            self._is_off = True
            rank_zero_warn(self._probe.effects.sentence(_name(stepped)))

    def _read_couplings(self, stepped: Sequence[LayerwiseRates], batch: Any) -> None:
        """Measure the groups of all optimizers together, and give each rule its own."""
        groups = {
            f"{place} {label}": names
            for place, rates in enumerate(stepped)
            for label, names in rates.rule.probe_groups.items()
        }
        found = self._probe.couplings(batch, groups)
        if found is None:
            return
        for place, rates in enumerate(stepped):
            labels = tuple(rates.rule.probe_groups)
            own = [found.names.index(f"{place} {label}") for label in labels]
            rates.rule.learn_couplings(Couplings(labels, found.matrix[np.ix_(own, own)], found.slopes[own], found.loss))

    def _tell(self, steered: Sequence[LayerwiseRates]) -> None:
        """Say once what each pilot has found."""
        for place, rates in enumerate(steered):
            if place not in self._told and rates.rule.verdict:
                self._told.add(place)
                rank_zero_info(f"{type(rates.rule).__name__}: {rates.rule.verdict}")

    def state_dict(self) -> dict[str, Any]:
        """Return the weights that are kept, and what was asked; nothing where no reading is pending."""
        if not self._save or not self._probe.is_kept:
            return {}
        return {"probe": self._probe.state_dict(), "asked": [[place, *what] for place, what in self._asked.items()]}

    def load_state_dict(self, state: Mapping[str, Any], steered: Sequence[LayerwiseRates]) -> None:
        """Go on with a reading that was pending."""
        self._probe.forget()
        self._asked = {int(place): (what, int(steps)) for place, what, steps in state.get("asked", [])}
        if self._asked and max(self._asked) < len(steered):
            self._probe.load_state_dict(state["probe"], _layers([steered[place] for place in self._asked]))


def _layers(steered: Sequence[LayerwiseRates]) -> list[Layer]:
    return [layer for rates in steered for layer in rates.layers if layer.parameter.requires_grad]


def _name(stepped: Sequence[tuple[int, LayerwiseRates]]) -> str:
    return type(stepped[0][1].rule).__name__
