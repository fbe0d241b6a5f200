"""Keep the weights before a step, and measure on the next batch what the step did to the loss."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from dynamon.curvature.along.progress import LastStep
from dynamon.curvature.operators.parameters import FlatParameters
from dynamon.distributed.dtensor import is_sharded, to_local
from dynamon.distributed.ranks import Ranks
from dynamon.isolation.preserve import LossFn, NoLossError, training_loss
from dynamon.isolation.samples import count_samples
from dynamon.layers import Layer, measurable_layers
from dynamon.layers.complex_pairs import real_dtype
from dynamon.monitoring.decay_follower import DecayFollower
from dynamon.monitoring.effect_check import EffectCheck
from dynamon.monitoring.evaluation import evaluation, why_not_evaluated
from dynamon.monitoring.failures import forget_frames
from dynamon.monitoring.loop import Loop
from dynamon.monitoring.plain_loop import PlainLoop
from dynamon.monitoring.samples import batch_sizes
from dynamon.monitoring.weight_copies import copied, matching, whole_copies
from dynamon.optim.stepping import StepWatch, uses_gradients_at_once
from dynamon.quantities.progress import Couplings, StepReading

ReadingT = TypeVar("ReadingT")
COPIES = 7  # of the weights, in float32 at least, while a reading is taken


class StepProbe:
    """Keeps the weights before a step, and measures what the step did to the loss of the batch that comes next.

    That batch is the probe: the step has not seen it, and it arrives by itself, so that no loader, sampler or random
    stream is touched. The loss is evaluated on it before it is trained on, at both weights with the same random
    numbers, and nothing of that leaves a trace on the run. Several steps may lie between: the reading is then of all of
    them together.

    It follows the decay of the steps: append it to the ``followers`` of what watches the optimizers.

    Args:
        loop: The training loop.
        ranks: The processes that measure together.
        loss_fn: ``loss_fn(module, batch)``, or None for the loss of the loop.
        effects: What is known of the effects of an evaluation; None to find it out.

    Attributes:
        loop: The training loop.
        ranks: The processes.
        effects: What is known of the effects of an evaluation.

    Memory: one copy of the weights from :meth:`keep` to the reading, seven while it is taken, and that of a training
    step.
    """

    def __init__(
        self, loop: Loop, ranks: Ranks, loss_fn: LossFn | None = None, effects: EffectCheck | None = None
    ) -> None:
        """Keep nothing yet."""
        self.loop, self.ranks, self._loss_fn = loop, ranks, loss_fn
        self.effects = EffectCheck(loss_fn) if effects is None else effects
        self.effects.is_done |= loss_fn is None and loop.loss_source is None
        self._before: dict[str, Tensor] = {}
        self._layers: dict[str, Layer] = {}
        self._failure: Exception | None = None  # of the copies, told where all processes measure together
        self._left: dict[str, float] = {}  # by decay before a resume
        self._decay = DecayFollower()

    @property
    def module(self) -> nn.Module:
        """The module that is trained."""
        return self.loop.module

    @property
    def is_kept(self) -> bool:
        """Return whether weights are kept for a reading."""
        return bool(self._layers)

    def off_reason(self, layers: Sequence[Layer]) -> str | None:
        """Return why nothing can be measured in this run, in one sentence; None where it can.

        Args:
            layers: The layers that are trained.
        """
        trained = [layer.parameter for layer in layers]
        if any(uses_gradients_at_once(p) for p in self.module.parameters()):
            return (
                "hooks work in the backward pass, so that weight decay cannot be told from the step of the optimizer."
            )
        if len({(p.device, real_dtype(p)) for p in trained}) > 1:
            return "trained parameters have several dtypes or devices, and gradients are taken in one."
        whole = sum(not is_sharded(p) for p in trained)
        if 0 < whole < len(trained):
            return f"{whole} of {len(trained)} trained parameters are not sharded, and gradients are taken of shards."
        return why_not_evaluated(self, trained, self._loss_fn)

    def keep(self, layers: Sequence[Layer], copies: Callable[[], Mapping[str, Tensor]] | None = None) -> None:
        """Keep weights, before a step changes them; what was kept before is dropped.

        What goes wrong is raised by the reading: it may go wrong on one process only, and the others would wait there.

        Args:
            layers: Layers that are trained.
            copies: Returns copies of their weights by name; None to make them.
        """
        self._layers, self._failure = {layer.name: layer for layer in layers}, None
        own = {name: layer.parameter.detach() for name, layer in self._layers.items()}
        try:
            made = copied(own) if copies is None else copies()
            self._before = {name: to_local(copy) for name, copy in made.items()}
        except Exception as error:  # see above
            forget_frames(error)
            self._before, self._failure = {}, error
        names = {id(layer.parameter): layer.name for layer in layers}
        self._decay, self._left = DecayFollower(lambda: names), {}

    def only(self, parameters: Collection[int]) -> None:
        """Drop what was kept of layers whose parameter is not among some, by ``id``: no optimizer stepped them."""
        self._layers = {name: layer for name, layer in self._layers.items() if id(layer.parameter) in parameters}
        self._before = {name: weight for name, weight in self._before.items() if name in self._layers}

    def forget(self) -> None:
        """Drop what was kept."""
        self._before, self._layers, self._failure = {}, {}, None

    def step_begins(self, optimizer: Optimizer) -> None:
        """Note the rates of a step."""
        if self._before:
            self._decay.step_begins(optimizer)

    def step_ends(self, optimizer: Optimizer, skipped: Tensor | None) -> None:
        """Note what its decay has left."""
        if self._before:
            self._decay.step_ends(optimizer, skipped)

    def read(self, batch: Any) -> StepReading | None:
        """Measure what was done since :meth:`keep`, and drop what was kept, unless training skips this batch.

        All processes must call it together, inside of their :meth:`dynamon.distributed.ranks.Ranks.collective_section`.

        Args:
            batch: A batch that is not trained on yet.

        Returns:
            The reading; None where nothing is kept, where training skips this batch, and where :attr:`effects` has a
            reason not to evaluate the loss.
        """
        samples = count_samples(batch, batch_sizes(self.loop.loaders))
        return self._measure(batch, lambda step: step.read(math.nan if samples is None else float(samples)))

    def couplings(self, batch: Any, groups: Mapping[str, Sequence[str]]) -> Couplings | None:
        """Measure how the steps of groups of layers interact, and drop what was kept; as :meth:`read`.

        Args:
            batch: A batch that is not trained on yet.
            groups: The names of the layers of each group.
        """
        return self._measure(batch, lambda step: step.couplings(groups))

    def _measure(self, batch: Any, take: Callable[[LastStep], ReadingT]) -> ReadingT | None:
        """Take something of the step where the loss of a batch may be evaluated."""
        before, layers, failure = self._before, self._layers, self._failure
        self.forget()
        if failure is not None:
            raise failure
        self._decay.check()
        left = self._decay.retention.state_dict()
        there = {id(p) for p in self.module.parameters()}
        owned = {name: layers[name].parameter for name in before if id(layers[name].parameter) in there}
        if not owned:
            return None
        index = self.loop.batch_index
        try:
            if self._has_effects(batch, index, owned):
                return None
            weights = [before[name] for name in owned]
            fractions = [left.get(name, 1.0) * self._left.get(name, 1.0) for name in owned]
            with self._evaluation(owned) as params:
                return take(LastStep(lambda: self._loss(batch, index), params, weights, fractions, self.ranks))
        except NoLossError:  # training skips this batch, so the next one serves; with several processes it cannot
            if self.ranks.is_distributed:
                raise
            self._before, self._layers = before, layers
            return None

    def _evaluation(self, owned: Mapping[str, Tensor]) -> AbstractContextManager[FlatParameters]:
        return evaluation(self, owned, gathers=False, draw=1 + self.loop.step)

    def _loss(self, batch: Any, index: int) -> Tensor:
        if self._loss_fn is None:
            return self.loop.loss(batch, index)
        return training_loss(self.loop.model, batch, self._loss_fn)

    def _has_effects(self, batch: Any, index: int, owned: Mapping[str, Tensor]) -> bool:
        """Find out, the first time, whether an evaluation changes anything for good, on any process."""

        def evaluate() -> float:
            with self._evaluation(owned):
                return float(self._loss(batch, index).detach())

        if not self.effects.is_done:
            self.effects.clear()
            found = self.ranks.all_gather_object(self.effects.find(self.loop, evaluate))
            self.effects.settle(next((text for text in found if text is not None), None))
        return self.effects.reason is not None

    def state_dict(self) -> dict[str, Any]:
        """Return the weights that are kept, and what decay has left of them since; whole ones, in main memory."""
        left = self._decay.retention.state_dict()
        lost = {name: left.get(name, 1.0) * self._left.get(name, 1.0) for name in self._before}
        return {"before": whole_copies(self._before, self._layers.values()), "left": lost}

    def load_state_dict(self, state: Mapping[str, Any], layers: Sequence[Layer]) -> None:
        """Go on with what was kept of layers that are there still.

        Args:
            state: From :meth:`state_dict`.
            layers: The layers that are trained.
        """
        before = matching(layers, state.get("before", {}))
        self.keep([layer for layer in layers if layer.name in before], lambda: before)
        self._left = dict(state.get("left", {}))


class StepObserver:
    """Measures in a loop of your own what a step has done to the loss, layer by layer; without Lightning.

    Call :meth:`keep` before ``optimizer.step()``, and :meth:`read` on the next batch before it is trained on. Training
    does not notice it: random numbers, buffers and ``.grad`` are put back, and no loader is touched. Processes of DDP
    and FSDP2 must call it together.

    Args:
        model: The model, with what wraps it.
        optimizer: The optimizer or several.
        loss_fn: ``loss_fn(model, batch) -> scalar``, the loss that is trained on. It must change nothing but the model.

    Attributes:
        layers: The layers that the optimizers hold, in the order of the arrays in a reading.

    Raises:
        ValueError: If the loss cannot be evaluated again here (the message has the reason), or the optimizers hold no
            parameter of the model.

    Example:
        >>> import torch
        >>> from dynamon.monitoring.step_probe import StepObserver
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> loss_fn = lambda model, batch: (model(batch) - batch.sum(1, keepdim=True)).square().mean()
        >>> observer = StepObserver(model, optimizer, loss_fn)
        >>> for batch in torch.randn(3, 32, 4):
        ...     if observer.is_kept:
        ...         reading = observer.read(batch)
        ...     loss_fn(model, batch).backward()
        ...     observer.keep()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> reading.names, bool(reading.total_decrease > 0)
        (('weight', 'bias'), True)
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], loss_fn: LossFn) -> None:
        """Watch the optimizers' steps."""
        self._optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        self._loop = PlainLoop(model, self._optimizers, loss_fn, None, 1, None, None, (), None, ())
        held = {id(p) for one in self._optimizers for group in one.param_groups for p in group["params"]}
        every = measurable_layers(self._loop.module)
        self.layers = [la for la in every if id(la.parameter) in held and la.parameter.requires_grad]
        self._probe = StepProbe(self._loop, self._loop.ranks())
        reason = (
            self._probe.off_reason(self.layers) if self.layers else "the optimizers hold no parameter of the model."
        )
        if reason is not None:
            self._loop.remove()
            raise ValueError(f"StepObserver cannot measure this run: {reason}")
        self._watches = [StepWatch(one) for one in self._optimizers]
        for watch in self._watches:
            watch.followers.append(self._probe)

    @property
    def is_kept(self) -> bool:
        """Return whether weights are kept for a reading."""
        return self._probe.is_kept

    def keep(self) -> None:
        """Keep the weights, before ``optimizer.step()``. Cost: one copy of the weights, held until the reading."""
        self._probe.keep(self.layers)
        for optimizer, watch in zip(self._optimizers, self._watches, strict=True):
            watch.clear()
            if watch.is_blind:  # it is taken to step once
                self._probe.step_begins(optimizer)
                self._probe.step_ends(optimizer, None)

    def read(self, batch: Any) -> StepReading | None:
        """Measure on a batch what was done since :meth:`keep`; None where nothing is kept. Cost: two gradients."""
        self._loop.end_batch()  # other random numbers in each reading
        with self._probe.ranks.collective_section():
            return self._probe.read(batch)

    def couplings(self, batch: Any, groups: Mapping[str, Sequence[str]]) -> Couplings | None:
        """Measure how the steps of G groups of layers interact, instead of :meth:`read`. Cost: G + 1 gradients.

        Args:
            batch: A batch that is not trained on yet.
            groups: The names of the layers of each group.

        Raises:
            ValueError: If a layer is not in :attr:`layers`, or is in two groups.
        """
        self._loop.end_batch()
        with self._probe.ranks.collective_section():
            return self._probe.couplings(batch, groups)

    def forget(self) -> None:
        """Drop what was kept."""
        self._probe.forget()

    def close(self) -> None:
        """Leave no hook on the optimizers."""
        self._probe.forget()
        self._loop.remove()
        for watch in self._watches:
            watch.remove()
