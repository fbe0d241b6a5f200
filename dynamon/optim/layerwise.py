"""Apply layerwise learning rates on top of any optimizer, without touching its parameter groups."""

import sys
import warnings
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import ref

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from dynamon.distributed.dtensor import reshard
from dynamon.distributed.ranks import has_several_processes, ran_out_of_memory
from dynamon.kernels import waiter
from dynamon.layers import known_layers
from dynamon.norms import optimizer_family
from dynamon.optim.assignment import RatioAssignment, parameters_of
from dynamon.optim.steering import steerable_layers, steered
from dynamon.optim.stepping import (
    Nesting,
    StepWatch,
    closure_of,
    has_gradients,
    runs_hooks,
    with_closure,
    wrapped_optimizers,
)
from dynamon.optim.unsupported import check_arguments, check_decoupled_decay, check_devices, check_step
from dynamon.optim.views import GroupViews, are_same
from dynamon.quantities.gradient_reader import GradientReader
from dynamon.quantities.readings import PendingReadings
from dynamon.quantities.scales import Scale
from dynamon.quantities.windows import Window
from dynamon.rates import Rule
from dynamon.rates.merging import RatioMerging, relative_error


class LayerwiseRates:
    """Scales the learning rate of each layer during ``optimizer.step()``.

    For the duration of a step the optimizer sees a view of its ``param_groups`` in which parameters are regrouped by
    ratio, with scaled rates. The original groups are restored when the step returns. If the step raised, they are
    restored at the next step or ``state_dict()`` call, keeping changes made in between. So schedulers, ``state_dict``,
    checkpoints and gradient clipping see only the user's groups. The view is made after the closure has returned.
    Entries that the optimizer writes into its groups are carried back. With all ratios 1 no view is made.

    A step has at most ``max_groups`` groups. Where ratios ask for more, similar ones are merged
    (:class:`dynamon.rates.merging.RatioMerging`), and :attr:`merging_error` gives the distance from the rule's ratios.
    Ratios of exactly 1 and at a bound of the rule are not merged.

    Works without Lightning: create it once, then train as before. Gradients are read when the step begins. If they are
    clipped before, call :meth:`observe` between ``backward`` and clipping.

    Sharded parameters (FSDP2, DTensor) work: create it after ``fully_shard`` and the optimizer, on every process.
    Readings are reduced by one all-reduce, so that all processes use bitwise the same ratios.

    Args:
        optimizer: Any ``torch.optim.Optimizer`` whose groups have an ``lr``.
        rule: A :class:`dynamon.rates.Rule`, not shared with another ``LayerwiseRates``.
        model: The module whose parameters are steered. Parameters of the optimizer that the module does not hold, and
            complex ones, keep ratio 1.
        lag: 1 (default): readings of a step act at the next, so that nothing waits for the device. 0: as published.
        apply: False for a dry run: the rule follows the run, :attr:`wanted` holds its ratios, and nothing is changed.
        scale_weight_decay: Decoupled weight decay, which AdamW and similar optimizers multiply by the rate, scales with
            the rate. False divides ``weight_decay`` by the ratio, so that weights decay at the base rate.
        read_every: Read the gradients for the rule at every k-th step only. What the rule counts as updates is then k
            steps. At 10, reading costs about a fifth.
        max_groups: Largest number of parameter groups in a step. An optimizer with as many groups of its own gets one
            for each of them, and a second one where some of its ratios are 1. None: every layer has exactly its own
            ratio, as in the published rule. Rules that are :attr:`exact <dynamon.rates.Rule.exact>` are never merged.
        roles: Roles by glob, as ``overrides`` of :func:`dynamon.layers.describe_layers`.
        geometry: ``"sign"``, ``"euclidean"`` or ``"spectral"``, the geometry that chooses the norms of the readings. By
            default :func:`dynamon.norms.optimizer_family` tells it from the optimizer.

    Attributes:
        layers: The steered layers.
        reader: Reads their gradients.
        rule: The rule.
        watch: Watches the optimizer's steps.
        charge: Context manager factory around the rule's work in a step, for timing; may be set.
        idle: Context manager factory around waits for queued training work, on devices without CUDA events; may be set.
        in_half_precision: Set it where training runs under 16-bit autocast, whose rounding is not noise.
        agrees_with_others: Set it on every process under DDP where windows are given to :meth:`observe`: batch sizes
            may differ between processes, and all must use the same ratios.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the optimizer does not support layerwise rates (the message has the reason), is already steered
            or shares no parameter with the model; if the gradients to be read are on several devices; if an argument is
            out of range; or on ``scale_weight_decay=False`` without decoupled weight decay.
        RuntimeError: In a step that is compiled or captured in a CUDA graph.

    Cost: the rule's readings (noise: a pass over the gradients, a stored copy), and more groups per optimizer call.

    Example:
        >>> import torch
        >>> from dynamon.optim import LayerwiseRates
        >>> from dynamon.rates import FixedRates
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> rates = LayerwiseRates(optimizer, FixedRates({"1.*": 0.5}), model)
        >>> rates.ratios
        {'0.weight': 1.0, '0.bias': 1.0, '1.weight': 0.5, '1.bias': 0.5}
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rule: Rule,
        model: nn.Module,
        *,
        lag: int = 1,
        apply: bool = True,
        scale_weight_decay: bool = True,
        read_every: int = 1,
        max_groups: int | None = 16,
        roles: Mapping[str, str] | None = None,
        geometry: str | None = None,
    ) -> None:
        """Attach to the optimizer's step."""
        check_arguments(optimizer, rule, model, lag, read_every)
        if optimizer in steered:
            raise ValueError(f"this {type(optimizer).__name__} is steered already; remove the other steering first.")
        if not scale_weight_decay:
            check_decoupled_decay(optimizer)
        self.optimizer, self.rule, self.model, self.lag = optimizer, rule, model, lag
        self.apply, self.scale_weight_decay, self.read_every = apply, scale_weight_decay, read_every
        self.in_half_precision = self.agrees_with_others = False
        self._roles, self._family = roles, optimizer_family(optimizer, geometry)
        merging = None if max_groups is None else RatioMerging(max_groups, rule.bounds)
        self._assignment = RatioAssignment(None if rule.exact else merging)
        self._phase = 0  # steps observed, modulo read_every
        self._checked = self._spared = False
        self._attach()
        if not self.layers and not self._lazy:
            raise ValueError("the optimizer holds no parameter of the model: there is nothing to steer.")
        self._waiting: PendingReadings | None = None
        self._observed, self._begun = False, False  # the step to come was read, the rule knows of it
        self._key: Hashable = None  # of what was read last
        self._read_at = 0  # the evaluation of the closure that was read
        self._nesting = Nesting()
        self.charge: Callable[[], AbstractContextManager[None]] = nullcontext
        self.idle: Callable[[], AbstractContextManager[None]] = nullcontext
        self._views = GroupViews(optimizer, scale_weight_decay)
        self._taken: tuple[list[str], NDArray[Any], NDArray[Any]] | None = None  # names; ratios asked for, taken
        steered[optimizer] = ref(self)
        self.watch = StepWatch(optimizer)
        hooked = list(filter(runs_hooks, (optimizer, *wrapped_optimizers(optimizer))))
        self._handles = [
            *(each.register_step_pre_hook(self._before_step) for each in hooked),
            *(each.register_step_post_hook(self._after_step) for each in hooked),
            hooked[0].register_state_dict_pre_hook(lambda *_: self.restore()),
            hooked[0].register_load_state_dict_pre_hook(lambda *_: self.restore()),
        ]

    def _attach(self) -> None:
        """Describe the parameters that the optimizer holds now; those that cannot be steered keep the base rate."""
        self._held = parameters_of(self.optimizer)
        self._lazy = [p for p in self._held if is_lazy(p)]  # they get their shape in a first batch
        reshard(self.model)
        if not self._lazy and not self._checked:
            self.rule.check(known_layers(self.model, self._roles))
            self._checked = True
        self.layers = steerable_layers(self.model, self.optimizer, self._roles)
        if self.rule.needs_gradients:
            check_devices(self.optimizer, self.layers)
        self.reader = GradientReader(self.layers, self._family)
        self._start_rule()

    def _start_rule(self) -> None:
        self._names = [layer.name for layer in self.layers]
        self.rule.places = self._assignment.assign(self.optimizer, self.layers)
        self.rule.start(self.layers, self.reader.norms)
        if self.rule.noise is not None and self.rule.noise.source == "successive":
            self.reader.follow_trends()

    def _asked_for(self) -> NDArray[Any]:
        """Return the rule's ratios ``[L]``, checked."""
        ratios = np.array(self.rule.ratios(), np.float64)
        if ratios.shape != (len(self.layers),):
            rule = type(self.rule).__name__
            raise ValueError(f"{rule}.ratios() must be [L] for {len(self.layers)} layers, got {list(ratios.shape)}.")
        return ratios

    def _follow_optimizer(self) -> None:
        """Attach again if parameters joined, left, were replaced or got a shape; other layers keep their state."""
        if are_same(parameters_of(self.optimizer), self._held) and all(map(is_lazy, self._lazy)):
            return
        self.settle()
        self.reader.forget_ranks()
        step, rule, gradients = self.reader.step, self.rule.state_dict(), self.reader.state_dict()
        self._attach()
        self.rule.load_state_dict(rule)
        self.reader.step = step
        self.reader.load_state_dict(gradients)

    @property
    def ratios(self) -> dict[str, float]:
        """The ratio of each layer in the next step, by parameter name, unless readings change it."""
        return self.wanted if self.apply else dict.fromkeys(self._names, 1.0)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups as you made them, also while a step sees others."""
        return self._views.groups

    @property
    def applied(self) -> dict[str, float]:
        """The ratio of each layer in the last step, by parameter name; 1 before the first."""
        return self.asked if self.apply else dict.fromkeys(self._names, 1.0)

    @property
    def asked(self) -> dict[str, float]:
        """The same, but in a dry run the ratio that the step would have had."""
        if self._taken is None:
            return dict.fromkeys(self._names, 1.0)
        names, _, taken = self._taken
        return dict(zip(names, taken.tolist(), strict=True))

    @property
    def merging_error(self) -> float:
        """Largest relative error that merging made in the ratios of the last step."""
        return 0.0 if self._taken is None else relative_error(self._taken[2], self._taken[1])

    @property
    def is_observed(self) -> bool:
        """Whether the gradients of the coming step have been read, or need not be."""
        return self._observed

    @property
    def wanted(self) -> dict[str, float]:
        """The rule's ratio of each layer, merged, by parameter name; :attr:`ratios` unless this is a dry run."""
        return dict(zip(self._names, self._assignment.merge(self._asked_for()).tolist(), strict=True))

    def __repr__(self) -> str:
        """Name the rule and the optimizer."""
        rule, what = type(self.rule).__name__, f"{len(self.layers)} layers of {type(self.optimizer).__name__}"
        return f"LayerwiseRates({rule} on {what}{'' if self.apply else ', dry run'})"

    def base_rates(self) -> dict[str, float]:
        """Return the learning rate of each layer's group, before the ratio."""
        rate = {id(p): float(group["lr"]) for group in self._views.groups for p in group["params"]}
        return {layer.name: rate[id(layer.parameter)] for layer in self.layers}

    def observe(
        self,
        scale: Scale = 1.0,
        key: Hashable = None,
        local_scale: Scale | None = None,
        window: Window | None = None,
    ) -> None:
        """Read the gradients now, for the step that follows.

        Args:
            scale: Factor on the gradients, if an AMP scaler has not unscaled them yet: a number, or a 0-d tensor on
                their device, which is not waited for.
            key: Identifies the step, so that several callers read it once. Without a key every call is a new step.
            local_scale: The same factor for the gradients that :meth:`watch_ranks` kept; None for ``scale``.
            window: What the gradients were accumulated over. A rule compares the gradients of two steps only if their
                windows are equal. Pass it in a loop with windows of different lengths.
        """
        if not self.watch.is_last:
            return  # the closure will run again, and the step uses what it leaves then
        self._observed = True
        self._follow_optimizer()
        self.reader.in_half_precision, self.reader.agrees_with_others = self.in_half_precision, self.agrees_with_others
        self._key = object() if key is None else key
        is_new = self.reader.begin(self._key)
        if not self.layers or not self.rule.needs_gradients:
            return
        if is_new:
            self.settle()
            self._phase = (self._phase + 1) % self.read_every
        else:
            if not self.watch.is_repeated or self._read_at == self.watch.evaluation:
                return
            self.reader.again()
            self._waiting = None
        self._read_at = self.watch.evaluation
        try:
            if self._phase == 0:
                self._waiting = self.reader.read(scale, dual=False, local_scale=local_scale, window=window)
                if self.lag == 0:
                    self.settle()
            elif self._phase == self.read_every - 1:
                self.reader.store(scale, window)
        except Exception as error:  # out of memory is tolerated, everything else is raised again
            self._go_without(error)

    def _go_without(self, error: Exception) -> None:
        """Keep the ratios if a single process ran out of memory; with several processes raise, since all must read."""
        if has_several_processes() or not ran_out_of_memory(error):
            raise error
        self._waiting = None
        self.reader.again()
        self.reader.settle_part(None)
        if not self._spared:
            self._spared = True
            warnings.warn(
                f"{type(self.rule).__name__}: the gradients of a step could not be read: out of memory. Ratios "
                "stay unchanged at such steps. read_every=10 reads fewer of them.",
                stacklevel=2,
            )

    def give_up(self) -> None:
        """Discard the observation of a step that is not taken, so that the next step is observed."""
        self._observed = False

    def observe_part(self, share: float, scale: Scale = 1.0) -> None:
        """Store the gradients accumulated so far, between the backward passes of an accumulation window.

        For rules that compare two independent parts of a window (``NoiseAdaptiveRates(source="independent")``). Does
        nothing for other rules, and in windows that are not read.

        Args:
            share: Samples accumulated so far divided by those of the whole window, in (0, 1); 0.5 is best.
            scale: Factor on the gradients, if an AMP scaler has not unscaled them yet.
        """
        if self._compares_parts():
            try:
                self.reader.store_part(share, scale)
            except Exception as error:  # out of memory is tolerated, everything else is raised again
                self._go_without(error)

    def watch_ranks(self, group: Any = None) -> None:
        """Compare the gradients of the processes at the coming step; under DDP, before its first backward pass.

        For rules that compare independent gradients (``NoiseAdaptiveRates(source="independent")``). Does nothing for
        other rules, and at steps that are not read. All processes must call it at the same steps.

        Args:
            group: The process group; None for all processes.
        """
        if self._compares_parts():
            self.reader.watch_ranks(group)

    def _compares_parts(self) -> bool:
        noise = self.rule.noise
        return noise is not None and noise.source == "independent" and self._phase == self.read_every - 1

    def settle(self) -> None:
        """Pass pending readings to the rule, so that its state is complete."""
        if self._waiting is not None:
            wait = waiter(self.layers[0].parameter.device)
            if wait is not None:  # the copy would wait for all that training has queued
                with self.idle():
                    wait()
            self.rule.update(self._waiting.wait())
            self._waiting = None

    def restore(self) -> None:
        """Put the original groups back after a step that raised, keeping what the user changed since."""
        self._nesting.clear()
        if self._views.are_shown:
            self._views.recover()
            self._observed = self._begun = False

    def remove(self) -> None:
        """Detach from the optimizer, which then steps with its own rates."""
        self.restore()
        self.reader.forget_ranks()
        self.watch.remove()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        steered.pop(self.optimizer, None)

    def state_dict(self, save_gradient: bool = True, everywhere: bool = True) -> dict[str, Any]:
        """Return the rule's state and the stored gradient, loadable under ``weights_only=True``.

        The gradient of sharded parameters is gathered into host memory, so every process must call this.

        Args:
            save_gradient: False makes the state smaller. A resumed run then skips one noise update, so that it is not
                bitwise equal to an uninterrupted one.
            everywhere: False leaves out the gradient of sharded parameters on all processes but the first, which writes
                checkpoints.
        """
        self.settle()
        stored = self.reader.state_dict(everywhere) if save_gradient and self.rule.needs_gradients else {"previous": {}}
        rule = self.rule.state_dict()
        state = {"kind": type(self.rule).__name__, "rule": rule, "gradients": stored}
        if merged := self._assignment.state_dict():
            state["merged"] = merged
        return state if self.read_every == 1 else {**state, "phase": self._phase}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state from :meth:`state_dict`; one of another rule is ignored."""
        self._waiting = None
        if state["kind"] != type(self.rule).__name__:
            return
        self.rule.load_state_dict(state["rule"])
        self.reader.load_state_dict(state["gradients"])
        self._phase = int(state.get("phase", 0)) % self.read_every
        self._assignment.load_state_dict(state.get("merged", {}))

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        check_step(optimizer, self.apply)
        if self._nesting.begins(sys._getframe(1)):
            self.restore()  # left over where the last step raised
            self._begun = False
        elif optimizer is self.optimizer:
            self._views.leave()
        else:
            return None  # inside of a wrapper's step: it shares the groups
        if closure_of(optimizer, args, kwargs) is None:
            self._enter()
            return None
        return with_closure(optimizer, args, kwargs, self._then_enter)

    def _then_enter(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def closure_then_view() -> Any:
            self._views.leave()  # some optimizers call their closure twice
            result = closure()
            self._enter()
            return result

        return closure_then_view

    def _enter(self) -> None:
        """Replace the optimizer's groups by views with the current ratios."""
        self._views.leave()
        if has_gradients(self.optimizer):  # else nothing moves
            self._tell_rule()
        if not self._assignment.fits(self.optimizer):
            self._assignment.assign(self.optimizer, self.layers)
        asked = self._asked_for()
        self._taken = self._names, asked, self._assignment.merge(asked, is_taken=True)
        if self.apply:
            self._views.enter(self._assignment.by_parameter(self._taken[2]))

    def _tell_rule(self) -> None:
        """Read the gradients unless they have been read, and call the rule's ``begin_step`` once."""
        if not self._observed or self.watch.is_repeated and self._read_at != self.watch.evaluation:
            self.observe(key=self._key if self._observed else None)
        if not self._begun and self.layers:
            self._begun = True
            with self.charge():
                self.rule.begin_step()

    def _after_step(self, *_: Any) -> None:
        if self._nesting.ends(sys._getframe(1)):
            self._views.leave()
            self._observed = self._begun = False
