"""Layerwise learning rates inside a Trainer."""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from dynamon.board.custom_scalars import chart_layout, merge_layouts
from dynamon.callbacks.lightning.loop import TrainerLoop, step_of
from dynamon.callbacks.lightning.steering import (
    can_be_steered,
    check_steering,
    headlines,
    holds_some_of,
    noise_is_shown,
    noise_row,
    rates_and_ratios,
    say_unsteered,
    unsteerable_reason,
    wants_parts,
)
from dynamon.callbacks.lightning.step_callback import StepCallback
from dynamon.callbacks.lightning.strategy import averages_gradients
from dynamon.distributed.dtensor import any_sharded
from dynamon.isolation.preserve import LossFn
from dynamon.layers import select
from dynamon.monitoring.accumulation import begins_window, compares_ranks, has_windows
from dynamon.monitoring.arguments import check_switches
from dynamon.monitoring.budget import Budget
from dynamon.monitoring.loop import nothing_to_train
from dynamon.monitoring.messages import rank_zero_warn
from dynamon.monitoring.recorder import Recorder
from dynamon.monitoring.stated import say_geometry
from dynamon.monitoring.steering_probe import SteeringProbe
from dynamon.optim import LayerwiseRates, unsupported_reason
from dynamon.optim.stepping import GONE, has_gradients
from dynamon.quantities import REGISTRY, Scope, meanings, quantities_of, with_tag_table
from dynamon.rates import Rule

_NOISE = REGISTRY["noise/dual"]  # shown where the rule follows it and no monitor in the Trainer does
_RATES = chart_layout(quantities_of("steering"))


@with_tag_table([*quantities_of("steering"), _NOISE])
class LayerwiseLR(StepCallback):
    """Steers every optimizer of the Trainer with one learning-rate ratio a layer, as a rule gives it.

    Ratios act only inside ``optimizer.step()``: schedulers, ``optimizer.state_dict()``, checkpoints,
    ``LearningRateMonitor`` and gradient clipping see the groups and rates you made. A run saved with steering
    resumes without it, and the other way round.

    Tags, written every ``trainer.log_every_n_steps`` steps:

    {tags}

    ``noise/dual`` is there where the rule follows it and no monitor in the Trainer shows it.

    Per-layer quantities are written as described in :class:`dynamon.callbacks.GradientMonitor`.

    Args:
        rule: A :class:`dynamon.rates.Rule`; each optimizer gets a copy of its own.
        lag: 1: readings of a step act at the next, nothing waits for the device. 0: they act at once.
        save_gradient: Keep the previous gradient in checkpoints, so that a resumed run is bitwise the one
            that never stopped. False saves its memory and skips one noise update after a resume.
        layers: Globs for the layers shown one by one. All layers are steered.
        loggers: Loggers to write to by part of the class name, class or object; None for all.
        apply: False for a dry run: ratios and the rates they would give are computed and logged, and training is
            bitwise that without the callback.
        scale_weight_decay: Decoupled weight decay (AdamW) scales with the rate. False keeps it at the base rate.
        read_every: Read gradients for the rule at every so many-th step only; its updates are then so many steps
            apart. At 10 reading costs about a fifth.
        loss_fn: ``loss_fn(module, batch) -> scalar`` for rules that follow the loss of the next batch
            (:class:`dynamon.rates.BalancedRates`); None for ``training_step``. Needed in manual optimisation.
        max_groups: Groups of parameters in a step at most: near ratios are brought together, see
            :class:`dynamon.optim.LayerwiseRates`. None: every layer has the ratio of the rule to the bit.

    Raises:
        ValueError: On arguments out of range; when fit starts, if an optimizer cannot take layerwise rates,
            with the reason, and for a rule that compares independent gradients without accumulation or DDP.
    """

    panels = _RATES
    tags = meanings(quantities_of("steering", scope=Scope.SCALAR))
    quantities = meanings([*quantities_of("steering", scope=Scope.PER_LAYER), _NOISE])

    def __init__(
        self,
        rule: Rule,
        lag: int = 1,
        save_gradient: bool = True,
        layers: Sequence[str] | None = None,
        loggers: Sequence[Any] | None = None,
        *,
        apply: bool = True,
        scale_weight_decay: bool = True,
        read_every: int = 1,
        max_groups: int | None = 16,
        loss_fn: LossFn | None = None,
    ) -> None:
        """Check the arguments."""
        super().__init__()
        check_steering(rule, lag, read_every, max_groups, loss_fn)
        check_switches(save_gradient=save_gradient, apply=apply, scale_weight_decay=scale_weight_decay)
        self.rule, self.lag, self.save_gradient = rule, lag, save_gradient
        self.apply, self.scale_weight_decay, self.read_every = apply, scale_weight_decay, read_every
        self.max_groups, self.loss_fn = max_groups, loss_fn
        self._patterns, self._loggers = layers, loggers
        self._recorder = Recorder(loggers, self.quantities)
        self._steered: dict[Optimizer, LayerwiseRates] = {}
        self._in_force: dict[Optimizer, dict[str, float]] = {}  # base rates
        self._state: list[Any] = []
        self._probe: SteeringProbe | None = None
        self._pending: dict[str, Any] = {}  # what a checkpoint held of the probe
        self._budget = Budget(None)
        self._is_off = False
        self._passes = 0  # backward passes since the last step
        self._gone: int | None = 0  # the first steps that had no gradients after one; None once there were some
        self._shows_noise = self._told = False
        self._is_steering = False  # training goes on
        self._next_step = 0
        self._left_alone: list[Optimizer] = []  # what holds nothing to steer
        self._past: tuple[list[Any], dict[str, float]] = ([], {})  # of a copy: states and ratios of the original

    @property
    def overhead(self) -> float:
        """Time of steering over the training time without it, so far."""
        return self._budget.overhead

    @property
    def ratios(self) -> dict[str, float]:
        """The ratio of each layer, merged, by parameter name; in a dry run the one that would be in force."""
        if not self._steered:
            return dict(self._past[1])
        return {name: ratio for rates in self._steered.values() for name, ratio in rates.wanted.items()}

    def one_of_a_kind(self) -> type:
        """Two callbacks must not steer one optimizer."""
        return LayerwiseLR

    def rates_for(self, optimizer: Optimizer) -> LayerwiseRates | None:
        """Return what steers an optimizer, or None."""
        return self._steered.get(optimizer)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the surroundings."""
        self._shows_noise = self.rule.needs_gradients and not noise_is_shown(trainer)
        super().setup(trainer, pl_module, stage)
        self.panels = merge_layouts([_RATES, chart_layout([_NOISE], "3 Rates")]) if self._shows_noise else _RATES
        if stage == "fit" and not trainer.barebones:
            self._recorder.check(TrainerLoop(trainer, pl_module))

    def begin_turn(self, goes_on: bool) -> None:
        """Begin anew; a fit that goes on takes up what was learned, as from a checkpoint, and keeps its history."""
        if not self._is_given:
            self._state, self._pending = [], {}
        layers = [layer.parameter for rates in self._steered.values() for layer in rates.layers]
        if goes_on and not any_sharded(layers):
            self._state = self._state or self.state_dict()["optimizers"]
        else:
            self._recorder, self._budget, self._next_step = self._new_recorder(), Budget(None), 0
        self._release()
        self._past = ([], {})

    def _new_recorder(self) -> Recorder:
        return Recorder(self._loggers, [tag for tag in self.quantities if self._shows_noise or tag != _NOISE.tag])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse optimizers that cannot be steered, before anything runs."""
        for optimizer in trainer.optimizers:
            reason = unsupported_reason(optimizer) if holds_some_of(pl_module, optimizer) else None
            if reason is not None:
                raise ValueError(f"{type(self).__name__}: {reason}")
        reason = unsteerable_reason(self.rule, TrainerLoop(trainer, pl_module))
        if reason is not None:
            raise ValueError(f"{type(self).__name__} cannot steer this run: {reason}")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach to the optimizers and take up a saved state."""
        self._passes, self._gone, self._is_off = 0, 0, False
        loop = TrainerLoop(trainer, pl_module)
        loop.begin_windows()
        self._go_back_to(step_of(trainer))
        nothing = nothing_to_train(pl_module)
        if nothing is not None:
            rank_zero_warn(f"{type(self).__name__} steers nothing: {nothing}")
            return
        self._attach(trainer, pl_module)
        if self.rule.needs_probe:
            self._probe = SteeringProbe(loop, self.loss_fn, self.save_gradient)
            self._probe.start(type(self).__name__, list(self._steered.values()), self._pending)
        for rates in self._steered.values():
            if self.rule.needs_gradients:
                rates.reader.warm_up()
        self._is_steering = True
        self.write_layout(loop)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The clock runs; a rule that compares the processes has their own gradients kept."""
        loop = TrainerLoop(trainer, pl_module)
        loop.row.close()
        self._budget.start()
        self._go_back_to(step_of(trainer))
        if any(self._is_new(trainer, optimizer) for optimizer in trainer.optimizers):
            self._attach(trainer, pl_module)  # the strategy was given new optimizers
        if self._probe is not None:
            with self._budget.charge("steering", pl_module.device):
                self._probe.batch_start(list(self._steered.values()), batch)
        if not self.rule.needs_gradients:
            return
        loop.windows.batch_start(loop, batch)
        if wants_parts(self.rule) and compares_ranks(loop) and begins_window(loop):
            with self._budget.charge("steering", pl_module.device):
                for rates in self._steered.values():
                    rates.watch_ranks()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Follow what gradients are accumulated over."""
        if self.rule.needs_gradients:
            loop = TrainerLoop(trainer, pl_module)
            loop.windows.before_backward(loop)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the first half of an accumulation window, for a rule that compares the halves."""
        self._passes += 1
        if not self.rule.needs_gradients:
            return
        loop = TrainerLoop(trainer, pl_module)
        loop.windows.after_backward(loop)
        if not wants_parts(self.rule) or not has_windows(loop):
            return
        for optimizer, rates in self._steered.items():
            share = loop.windows.half(loop, optimizer)
            if share is not None:
                with self._budget.charge("steering", pl_module.device):
                    rates.observe_part(share, loop.scale_before_step())

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Read the gradients before they are clipped."""
        with self._budget.charge("steering", pl_module.device):
            if self._is_new(trainer, optimizer):
                self._attach(trainer, pl_module)  # the strategy was given new optimizers
            rates = self._steered.get(optimizer)
            if rates is None or not self._has_gradients(trainer, optimizer):
                return
            window, loop = None, TrainerLoop(trainer, pl_module)
            if self.rule.needs_gradients:
                window = loop.windows.before_step(loop, optimizer)
                rates.reader.settle_part(loop.windows.share(loop, optimizer, window))
            compares = wants_parts(self.rule) and compares_ranks(loop)
            local = loop.scale_before_step() if compares else None
            rates.observe(loop.gradient_scale(optimizer), (trainer.global_step, loop.step), local, window)
            if self._is_shown(trainer):
                # Before the step: the scheduler has moved on by the time it is over.
                self._in_force[optimizer] = rates.base_rates()

    def _has_gradients(self, trainer: pl.Trainer, optimizer: Optimizer) -> bool:
        """Return whether there is something to take a step with; steering ends where there never is."""
        passes, self._passes = self._passes, 0
        if has_gradients(optimizer):
            self._gone = None
            return True
        if any(has_gradients(each) for each in trainer.optimizers):
            self._gone = None
        elif passes and self._gone is not None:
            self._gone += 1
            if self._gone == GONE:
                self._release()
                self._is_off = True
                rank_zero_warn(
                    f"{type(self).__name__} is off: gradients are gone before the optimizer's step, so that its rates "
                    "have no effect (an optimizer that works in backward, or zero_grad before the step)."
                )
        return False

    @staticmethod
    def _is_shown(trainer: pl.Trainer) -> bool:
        """Return whether this batch's rates are logged."""
        return trainer._logger_connector.should_update_logs and not trainer.barebones

    def _is_new(self, trainer: pl.Trainer, optimizer: Optimizer) -> bool:
        """Return whether an optimizer of the Trainer's is neither steered nor left alone so far."""
        if optimizer in self._steered or self._is_off:
            return False
        return optimizer in trainer.optimizers and not any(known is optimizer for known in self._left_alone)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the rates now and then."""
        for rates in self._steered.values():
            rates.restore()
            rates.give_up()  # where a scaler has skipped the step
        taken = {optimizer for optimizer, rates in self._steered.items() if rates.watch.may_have_stepped}
        if not self._in_force and self._is_shown(trainer):  # steps that Lightning does not announce
            self._in_force = {optimizer: self._steered[optimizer].base_rates() for optimizer in taken}
        in_force, self._in_force = {o: base for o, base in self._in_force.items() if o in taken}, {}
        for rates in self._steered.values():
            rates.watch.clear()
        self._next_step = step_of(trainer) + 1
        self._budget.start()
        if any(in_force.values()):
            with self._budget.charge("steering"):
                self._record(TrainerLoop(trainer, pl_module), in_force)
        self.send_row(TrainerLoop(trainer, pl_module))

    def _record(self, loop: TrainerLoop, in_force: dict[Optimizer, dict[str, float]]) -> None:
        base, ratio = rates_and_ratios(self._steered, in_force)
        names = [la.name for rates in self._steered.values() for la in select(rates.layers, self._patterns)]
        self._recorder.scalars(headlines(base.values(), self._steered.values(), self._budget.overhead), headline=True)
        self._recorder.layers("lr/ratio", np.array([ratio[name] for name in names]), names)
        self._recorder.layers("lr/effective", np.array([base[name] * ratio[name] for name in names]), names)
        if self._shows_noise:
            row = noise_row(list(self._steered.values()), names)
            if np.isfinite(row).any():
                self._recorder.layers("noise/dual", row, names)
        self._recorder.flush(loop, loop.step, self._budget)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validation is not training time."""
        self._budget.stop()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the optimizers back as they were; ratios stay readable."""
        self._budget.stop()
        for rates in self._steered.values():
            rates.settle()
        self._let_go()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop the clock, and give the optimizers back as they were."""
        self._budget.stop()
        super().on_exception(trainer, pl_module, exception)

    def _let_go(self) -> None:
        self._is_steering, self._probe = False, None
        for rates in self._steered.values():
            rates.remove()

    def state_dict(self) -> dict[str, Any]:
        """The rules' states and previous gradients: numbers and tensors by parameter name."""
        if not self._steered or self._state:
            return {"optimizers": self._state or self._past[0]}
        states = [rates.state_dict(self.save_gradient, everywhere=False) for rates in self._steered.values()]
        pending = {} if self._probe is None else self._probe.state_dict()
        return {"optimizers": states, **({"pending": pending} if pending else {})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the optimizers are there; in the middle of training take it up at once.

        What was learned since that state was saved is then undone: from the trial steps of a search, say.
        """
        if not self.takes_state():
            return
        self._state, self._pending = list(state_dict["optimizers"]), dict(state_dict.get("pending", {}))
        if self._is_steering and self._stage == "fit":
            self._budget.rewind()
            for rates, state in zip(self._steered.values(), self._state, strict=False):
                rates.load_state_dict(state)
            self._state = []
            if self._probe is not None:
                self._probe.load_state_dict(self._pending, list(self._steered.values()))

    def __getstate__(self) -> dict[str, Any]:
        """A copy has the arguments, the history and a state to be saved; it steers nothing, and begins anew."""
        sharded = any_sharded([layer.parameter for rates in self._steered.values() for layer in rates.layers])
        past = ([] if sharded else self.state_dict()["optimizers"], self.ratios)
        ended = {
            "_steered": {},
            "_in_force": {},
            "_left_alone": [],
            "_is_steering": False,
            "_past": past,
            "_probe": None,
        }
        return {**super().__getstate__(), **ended}

    def __repr__(self) -> str:
        """The rule, and the range of the ratios."""
        ratios = self.ratios.values()
        said = f"ratios {min(ratios):.3g} to {max(ratios):.3g} over {len(ratios)} layers" if ratios else "no layers yet"
        return f"{type(self).__name__}({type(self.rule).__name__}, {said})"

    def _attach(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Steer the Trainer's optimizers, going on from a saved state or from those they replace."""
        state = self._state or [rates.state_dict() for rates in self._steered.values()]
        self._release()
        self._state = []
        for optimizer in trainer.optimizers:
            if not can_be_steered(pl_module, optimizer):
                self._left_alone.append(optimizer)
                continue
            index = len(self._steered)
            rates = LayerwiseRates(
                optimizer,
                copy.deepcopy(self.rule),
                pl_module,
                lag=self.lag,
                apply=self.apply,
                scale_weight_decay=self.scale_weight_decay,
                read_every=self.read_every,
                max_groups=self.max_groups,
            )
            rates.in_half_precision = "16" in str(trainer.precision)
            rates.agrees_with_others = averages_gradients(trainer)
            if index < len(state):
                rates.load_state_dict(state[index])
            rates.charge = partial(self._budget.charge, "steering", pl_module.device)
            rates.idle = self._budget.waiting
            self._steered[optimizer] = rates
            if self._probe is not None:
                self._probe.follow(rates)
            if self.rule.needs_gradients:
                say_geometry(optimizer)
        if not self._told:
            self._told = say_unsteered(type(self).__name__, pl_module, self._left_alone)

    def _release(self) -> None:
        for rates in self._steered.values():
            rates.remove()
        self._steered, self._left_alone, self._in_force = {}, [], {}
