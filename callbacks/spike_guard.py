"""Clip spikes layer by layer inside a Trainer, skip steps that are far out, and stop where they do not end."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from dynamon.board.custom_scalars import chart_layout
from dynamon.callbacks.lightning.checkpoints import SavedCheckpoints
from dynamon.callbacks.lightning.loop import TrainerLoop, step_of
from dynamon.callbacks.lightning.steering import holds_some_of
from dynamon.callbacks.lightning.step_callback import StepCallback
from dynamon.callbacks.lightning.strategy import strategy_reason
from dynamon.distributed.ranks import Ranks
from dynamon.layers import select
from dynamon.monitoring.arguments import check_arguments, check_switches
from dynamon.monitoring.budget import Budget
from dynamon.monitoring.loop import nothing_to_train
from dynamon.monitoring.messages import rank_zero_warn
from dynamon.monitoring.recorder import Recorder
from dynamon.optim import SpikeClipper, several_devices_reason, steerable_layers, unguarded_reason
from dynamon.optim.spike_arguments import check_numbers
from dynamon.quantities import Scope, meanings, quantities_of, with_tag_table
from dynamon.quantities.scales import Scale, inverse_scale


@with_tag_table(quantities_of("guard"))
class SpikeGuard(StepCallback):
    """Clips the gradient of each layer that leaves its own recent level, in every step of every optimizer.

    The factors act inside ``optimizer.step()``, after all monitors, after the rules of layerwise rates and after
    ``gradient_clip_val``: ``gradient/norm`` and ``gradient/norm_clipped`` are what they would be without the guard. The
    limits are those of :class:`dynamon.optim.SpikeClipper`, which does this in a loop of your own. While no layer is
    out of line, training is bitwise that without the guard.

    Tags, written every ``trainer.log_every_n_steps`` steps:

    {tags}

    Args:
        deviations: Standard deviations of the log norm above a layer's level at which its limit is, at least twice the
            level.
        memory: Steps over which levels are averaged.
        warmup: Steps at which a layer is only observed.
        floor: Smallest factor.
        skip: Skip a step whose total gradient norm, or loss, lies more than ``skip`` times as far above its level as
            its limit (in logarithms), or is not finite; None skips none. A skipped step leaves weights and optimizer
            state alone. ``trainer.global_step`` and schedulers go on, as where Lightning's gradient scaler skips a
            step; its scale stays. The loss is followed where there is one optimizer.
        stop_after: Stop training after so many steps in a row that were clipped or skipped, with a warning that names
            the last checkpoint before the first of them; None never stops. With several processes this is decided
            together at every ``stop_after``-th step.
        layers: Globs for the layers shown one by one. All layers are guarded.
        loggers: Loggers to write to by part of the class name, class or object; None for all.
        apply: False for a dry run: what would be done is computed and logged, and training is bitwise that without.

    Attributes:
        stopped: The sentence with which training was stopped, or None.

    Raises:
        ValueError: On arguments out of range; when fit starts, if an optimizer cannot be guarded, with the reason.
        TypeError: On arguments of the wrong type.

    Cost: see :class:`dynamon.optim.SpikeClipper`. With ``skip``, optimizers that are not fused wait for the device each
    step, and under DDP the loss takes a small all-reduce. At a reading, and once spikes are ``stop_after - 1`` in a
    row, the host waits for the norms of the step.
    """

    panels = chart_layout(quantities_of("guard"))
    tags = meanings(quantities_of("guard", scope=Scope.SCALAR))
    quantities = meanings(quantities_of("guard", scope=Scope.PER_LAYER))

    def __init__(
        self,
        *,
        deviations: float = 4.0,
        memory: int = 100,
        warmup: int = 25,
        floor: float = 1e-3,
        skip: float | None = None,
        stop_after: int | None = None,
        layers: Sequence[str] | None = None,
        loggers: Sequence[Any] | None = None,
        apply: bool = True,
    ) -> None:
        """Check the arguments."""
        super().__init__()
        check_numbers(deviations, memory, warmup, floor, skip)
        check_arguments(None, None, 0.0, layers=layers, loggers=loggers)
        check_switches(apply=apply)
        if stop_after is not None and (type(stop_after) is not int or stop_after < 1):
            raise ValueError(f"stop_after must be a whole number of 1 or more steps, or None, got {stop_after!r}.")
        self.deviations, self.memory, self.warmup, self.floor = deviations, memory, warmup, floor
        self.skip, self.stop_after, self.apply = skip, stop_after, apply
        self.stopped: str | None = None
        self._patterns, self._loggers = layers, loggers
        self._recorder = Recorder(loggers, self.quantities)
        self._guards: dict[Optimizer, SpikeClipper] = {}
        self._alone: list[Optimizer] = []  # what holds nothing to guard
        self._state: list[Any] = []
        self._past: list[Any] = []  # of a copy: states of the original
        self._saved = SavedCheckpoints()
        self._loss: Tensor | None = None
        self._ranks: Ranks | None = None
        self._is_guarding = False
        self._next_step = 0

    @property
    def factors(self) -> dict[str, float]:
        """The factor of each layer in the last step, by parameter name; in a dry run the one it would have had."""
        return {name: factor for guard in self._guards.values() for name, factor in guard.factors.items()}

    @property
    def limits(self) -> dict[str, float]:
        """The limit of each layer's gradient norm in the next step, by parameter name."""
        return {name: limit for guard in self._guards.values() for name, limit in guard.limits.items()}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the surroundings."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not trainer.barebones:
            self._recorder.check(TrainerLoop(trainer, pl_module))

    def begin_turn(self, goes_on: bool) -> None:
        """Begin anew; a fit that goes on takes up what was learned, as from a checkpoint, and keeps its history."""
        if not self._is_given:
            self._state, self._saved = [], SavedCheckpoints()
        if goes_on:
            self._state = self._state or self.state_dict()["optimizers"]
        else:
            self._recorder, self._next_step = Recorder(self._loggers, self.quantities), 0
        self._release()
        self.stopped, self._past = None, []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what cannot be guarded, before anything runs."""
        for optimizer in trainer.optimizers:
            reason = unguarded_reason(optimizer) if holds_some_of(pl_module, optimizer) else None
            if reason is not None:
                raise ValueError(f"{type(self).__name__}: {reason}")
            unskipped = None if self.skip is None else unguarded_reason(optimizer, skips=True)
            if unskipped is not None:
                rank_zero_warn(f"{type(self).__name__} clips, and skips no step: {unskipped}")
        trained = (p for p in pl_module.parameters() if p.requires_grad and not is_lazy(p))
        reason = strategy_reason(trainer) or several_devices_reason(trained)
        if reason is not None:
            raise ValueError(f"{type(self).__name__} cannot guard this run: {reason}")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach to the optimizers and take up a saved state."""
        loop = TrainerLoop(trainer, pl_module)
        self._go_back_to(step_of(trainer))
        nothing = nothing_to_train(pl_module)
        if nothing is not None:
            rank_zero_warn(f"{type(self).__name__} guards nothing: {nothing}")
            return
        self._ranks = loop.ranks() if self.skip is not None else None
        self._attach(trainer, pl_module)
        self._is_guarding = True
        self.write_layout(loop)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Close the row of the last step."""
        TrainerLoop(trainer, pl_module).row.close()
        self._go_back_to(step_of(trainer))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Follow the loss of the window."""
        if self.skip is None or len(trainer.optimizers) != 1 or loss.numel() != 1:
            return
        scaler = TrainerLoop(trainer, pl_module).scaler
        scale: Scale = 1.0 if scaler is None else inverse_scale(scaler)
        own = loss.detach().double().reshape(1) * scale
        self._loss = own if self._loss is None else self._loss + own

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Take the last place among the hooks of the step, and the loss of all processes."""
        if any(self._is_new(trainer, each) for each in trainer.optimizers):
            self._attach(trainer, pl_module)  # the strategy was given new optimizers
        loss, self._loss = self._loss, None
        guard = self._guards.get(optimizer)
        if guard is None:
            return
        guard.act_last()
        if loss is not None and self._ranks is not None:
            own = loss
            guard.observe_loss(self._ranks.sum_or_nan(lambda: own, 1) / self._ranks.size)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what was done now and then, and stop where it does not end."""
        loop = TrainerLoop(trainer, pl_module)
        for guard in self._guards.values():
            guard.restore()
        self._next_step = step_of(trainer) + 1
        self._saved.look(trainer)
        acted = any(guard.has_acted for guard in self._guards.values())
        if acted and trainer._logger_connector.should_update_logs and not trainer.barebones:
            self._record(loop)
        if acted and self.stop_after is not None and self.apply:
            self._stop_if(trainer, self.stop_after)
        self.send_row(loop)

    def _record(self, loop: TrainerLoop) -> None:
        found = [guard.recent() for guard in self._guards.values()]
        smallest = {name: factor for _, _, factors in found for name, factor in factors.items()}
        steps, clipped = sum(steps for steps, _, _ in found), sum(clipped for _, clipped, _ in found)
        names = [la.name for guard in self._guards.values() for la in select(guard.layers, self._patterns)]
        skipped = sum(guard.counts.skipped for guard in self._guards.values())
        headlines = {
            "guard/clipped": clipped / steps if steps else np.nan,
            "guard/smallest": min(smallest.values(), default=1.0),
            "guard/skipped": float(skipped),
        }
        self._recorder.scalars(headlines, headline=True)
        self._recorder.layers("guard/factor", np.array([smallest[name] for name in names]), names)
        self._recorder.flush(loop, loop.step, Budget(None))

    def _stop_if(self, trainer: pl.Trainer, most: int) -> None:
        """Stop training after so many steps in a row that were out of line."""
        several = trainer.world_size > 1
        is_near = max(guard.counts.in_a_row for guard in self._guards.values()) >= most - 1
        if trainer.should_stop or not (self._next_step % most == 0 if several else is_near):
            return
        for guard in self._guards.values():
            guard.settle()
        row = max(guard.counts.in_a_row for guard in self._guards.values())
        if not trainer.strategy.reduce_boolean_decision(row >= most, all=False):
            return
        first = trainer.global_step - row * len(trainer.optimizers)
        path = self._saved.before(first)
        saved = f"The last checkpoint before is {path}." if path else "No checkpoint was saved before."
        self.stopped = (
            f"{type(self).__name__} stops training at step {step_of(trainer)}: the last {row} steps were clipped or "
            f"skipped. {saved}"
        )
        trainer.should_stop = True
        rank_zero_warn(self.stopped)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the optimizers back as they were."""
        for guard in self._guards.values():
            guard.settle()
        self._let_go()

    def _let_go(self) -> None:
        self._is_guarding, self._loss = False, None
        for guard in self._guards.values():
            guard.remove()

    def state_dict(self) -> dict[str, Any]:
        """The guards' levels and counts, by parameter name, and the checkpoints seen: numbers and texts."""
        if not self._guards or self._state:
            return {"optimizers": self._state or self._past, "checkpoints": self._saved.state()}
        states = [guard.state_dict() for guard in self._guards.values()]
        return {"optimizers": states, "checkpoints": self._saved.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the optimizers are there; in the middle of training take it up at once."""
        if not self.takes_state():
            return
        self._state = list(state_dict["optimizers"])
        self._saved = SavedCheckpoints(state_dict["checkpoints"])
        if self._is_guarding and self._stage == "fit":
            for guard, state in zip(self._guards.values(), self._state, strict=False):
                guard.load_state_dict(state)
            self._state = []

    def __getstate__(self) -> dict[str, Any]:
        """A copy has the arguments, the history and a state to be saved; it guards nothing, and begins anew."""
        ended = {"_guards": {}, "_alone": [], "_is_guarding": False, "_ranks": None, "_loss": None}
        return {**super().__getstate__(), **ended, "_past": self.state_dict()["optimizers"]}

    def __repr__(self) -> str:
        """The arguments that are not the default, and what was done."""
        counts = [guard.counts for guard in self._guards.values()]
        steps, clipped = sum(c.steps for c in counts), sum(c.clipped for c in counts)
        done = f"{clipped} of {steps} steps clipped, {sum(c.skipped for c in counts)} skipped" if counts else "at rest"
        return f"{type(self).__name__}({done}{'' if self.apply else ', dry run'})"

    def _is_new(self, trainer: pl.Trainer, optimizer: Optimizer) -> bool:
        """Return whether an optimizer of the Trainer's is neither guarded nor left alone so far."""
        return optimizer not in self._guards and not any(known is optimizer for known in self._alone)

    def _attach(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Guard the Trainer's optimizers, going on from a saved state or from those they replace."""
        states = self._state or [guard.state_dict() for guard in self._guards.values()]
        self._release()
        self._state = []
        for optimizer in trainer.optimizers:
            waits = any(is_lazy(p) for group in optimizer.param_groups for p in group["params"])
            if unguarded_reason(optimizer) is not None or not (waits or steerable_layers(pl_module, optimizer)):
                self._alone.append(optimizer)
                continue
            guard = SpikeClipper(
                optimizer,
                pl_module,
                deviations=self.deviations,
                memory=self.memory,
                warmup=self.warmup,
                floor=self.floor,
                skip=None if unguarded_reason(optimizer, skips=True) else self.skip,
                apply=self.apply,
            )
            if len(self._guards) < len(states):
                guard.load_state_dict(states[len(self._guards)])
            self._guards[optimizer] = guard

    def _release(self) -> None:
        for guard in self._guards.values():
            guard.remove()
        self._guards, self._alone = {}, []
