"""The probe: samples of training that sharpness is measured on, kept for the whole run."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from dynamon.callbacks.meter import Cadence, Meter, Run
from dynamon.effects import changes, outside_state
from dynamon.probe import LossFn, batch_weight, take_samples, training_loss, undisturbed

SAVED_NUMBERS = 2**26  # a probe, or vectors to start from, enter a checkpoint up to this size
_SEED = 20_240_801
_SAME = 1e-3  # two evaluations of a loss differ by less where a GPU adds up in another order


class ProbeMeter(Meter):
    """Keeps copies of the first batches, and evaluates the training loss on them without leaving a trace.

    Measures nothing itself: other meters hold it and ask. A second set, of the batches that follow, serves the
    bracket between a small probe's curvature and the whole training set's.

    Args:
        loss_fn: ``loss_fn(module, batch)``, or None for ``training_step``.
        batches: How many batches to keep.
        fraction: Share of each batch.
        size: Samples to keep in all, instead of ``batches`` and ``fraction``.
        weight: Name of an entry of the batch whose sum weighs it (a mask of tokens), or None for its samples.
        second: Whether to keep the second set.
    """

    name = "probe"

    def __init__(
        self,
        loss_fn: LossFn | None,
        batches: int,
        fraction: float,
        size: int | None = None,
        weight: str | None = None,
        second: bool = False,
    ) -> None:
        """No samples yet."""
        super().__init__(Cadence(1, interval=1, share=1.0))
        self.loss_fn = loss_fn
        self.share = batches * fraction  # of one batch, roughly: what an evaluation costs in training steps
        self._batches, self._fraction, self._size, self._weight = batches, fraction, size, weight
        self._sets: list[list[dict[str, Any]]] = [[], []] if second else [[]]
        self.off = False
        self._resumed_without = False
        self._halvings = 0
        self._checked = loss_fn is not None

    def start(self, run: Run) -> None:
        """Say what cannot be measured."""
        self.off = True
        if run.trainer.world_size > 1:
            rank_zero_warn("sharpness is off: it is measured in one process only so far, and there are several.")
        elif self.loss_fn is None and not run.module.automatic_optimization:
            rank_zero_warn(
                "sharpness is off: with manual optimisation training_step would train; "
                "pass loss_fn=lambda module, batch: ... to have it measured."
            )
        else:
            self.off = False

    def is_missed(self) -> bool:
        """It has no readings of its own."""
        return False

    def batch_start(self, run: Run, batch: Any) -> None:
        """Keep a share of the first batches."""
        waiting = [kept for kept in self._sets if not self._is_full(kept)]
        if self.off or not waiting:
            return
        if self._resumed_without:
            self._resumed_without = False
            rank_zero_info(
                "the checkpoint did not hold the probe, so it is taken anew: sharpness before and after differ by that."
            )
        with run.charge(self.name):
            kept = waiting[0]
            most = None if self._size is None else self._size - sum(entry["samples"] or 0 for entry in kept)
            part, samples = take_samples(batch, 1.0 if self._size else self._fraction, most)
            weight = batch_weight(part, self._weight) if self._weight else float(samples or 1)
            index = run.trainer.fit_loop.epoch_loop.batch_idx
            kept.append({"batch": part, "index": index, "samples": samples, "weight": weight})

    def _is_full(self, kept: Sequence[dict[str, Any]]) -> bool:
        if self._size is None or (kept and kept[-1]["samples"] is None):
            return len(kept) >= self._batches
        return sum(entry["samples"] for entry in kept) >= self._size

    @property
    def ready(self) -> bool:
        """Whether there is something to measure on."""
        return not self.off and bool(self._sets[0])

    @property
    def samples(self) -> int | None:
        """Samples in the probe, None where they cannot be told apart."""
        counts = [entry["samples"] for entry in self._sets[0]]
        return None if None in counts else sum(counts)

    @property
    def second_ready(self) -> bool:
        """Whether the second set is there too."""
        return len(self._sets) > 1 and bool(self._sets[1]) and self._is_full(self._sets[1])

    def loss(self, run: Run, second: bool = False) -> Tensor:
        """Mean loss over the probe's batches by their weights."""
        return self.weighted(lambda batch, index: training_loss(run.module, batch, self.loss_fn, index), second)

    def weighted(self, evaluate: Callable[[Any, int], Tensor], second: bool = False) -> Tensor:
        """Weighted mean of something evaluated on each batch."""
        kept = self._sets[1 if second else 0]
        values = torch.stack([evaluate(entry["batch"], entry["index"]) for entry in kept])
        weights = values.new_tensor([entry["weight"] for entry in kept])
        return (values * weights).sum() / weights.sum()

    def check(self, run: Run) -> None:
        """Once, before the first measurement: evaluate the loss twice, and be off if that changed anything for good.

        Raises:
            ValueError: Instead, under ``strict=True``.
        """
        if self._checked:
            return
        step, marks, losses = run.module.training_step, [], []
        for _ in range(2):
            marks.append(outside_state(run.module, step))
            with evaluation(run):
                losses.append(float(self.loss(run).detach()))
        marks.append(outside_state(run.module, step))
        self._checked = True
        # What changed the first time only is a cache that has been filled.
        changed = [name for name in changes(*marks[1:]) if name in changes(*marks[:2])]
        reason = f"it changes {', '.join(changed[:3])}" if changed else _difference(*losses)
        if reason is None:
            return
        self.off = True
        sentence = (
            f"sharpness is off: training_step has effects outside the module that cannot be undone ({reason}); pass "
            "loss_fn=lambda module, batch: ... that computes the loss and nothing else."
        )
        if run.strict:
            raise ValueError(sentence)
        rank_zero_warn(sentence)

    def halve(self) -> str | None:
        """Keep half of the samples, or of the batches where there are no samples to leave out.

        Returns:
            One sentence the first time, None later and where nothing can be left out.
        """
        before = sum(_size(kept) for kept in self._sets)
        self._sets = [self._half(kept) for kept in self._sets]
        if sum(_size(kept) for kept in self._sets) == before:
            return None
        self._halvings += 1
        self._want_less(1)
        return f"The probe is halved to {_size(self._sets[0])} samples." if self._halvings == 1 else None

    def _half(self, kept: list[dict[str, Any]]) -> list[dict[str, Any]]:
        halves = []
        for entry in kept:
            part, samples = take_samples(entry["batch"], 0.5)
            if samples is None:
                return kept
            weight = batch_weight(part, self._weight) if self._weight else float(samples)
            halves.append({**entry, "batch": part, "samples": samples, "weight": weight})
        return halves

    def _want_less(self, times: int) -> None:
        """What is still to be kept is as small as what is there."""
        self._fraction, self.share = self._fraction / 2**times, self.share / 2**times
        if self._size is not None:
            self._size = max(2, min(self._size // 2**times, _size(self._sets[0]) or self._size))

    def state_dict(self) -> dict[str, Any]:
        """The samples, where they are not many and hold nothing that a checkpoint could not load safely."""
        numbers = _numbers([[entry["batch"] for entry in kept] for kept in self._sets])
        state: dict[str, Any] = {"halvings": self._halvings} if self._halvings else {}
        return {**state, "sets": self._sets} if numbers is not None and numbers <= SAVED_NUMBERS else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the samples; without them new ones are kept."""
        sets = [list(kept) for kept in state.get("sets", [])]
        self._resumed_without = not sets
        for place, kept in enumerate(sets[: len(self._sets)]):
            self._sets[place] = kept
        self._halvings = int(state.get("halvings", 0))
        if self._halvings:
            self._want_less(self._halvings)


@contextmanager
def evaluation(run: Run) -> Iterator[None]:
    """Where the training loss may be evaluated again: nothing inside leaves a trace on the run."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(undisturbed(run.module, _SEED))
        stack.enter_context(_loggers_muted(run.trainer))
        stack.enter_context(run.trainer.precision_plugin.train_step_context())
        yield


def trained_parameters(run: Run) -> dict[str, Tensor]:
    """The parameters that the optimizers move, by the names of their layers."""
    moving = {id(p) for o in run.trainer.optimizers for group in o.param_groups for p in group["params"]}
    tensors = {layer.name: layer.parameter for layer in run.all_layers}
    return {name: p for name, p in tensors.items() if p.requires_grad and id(p) in moving}


def check_probe(probe_batches: int, probe_fraction: float, loss_fn: object, probe_size: int | None = None) -> None:
    """Raise ValueError naming the argument that is out of range."""
    if probe_batches < 1:
        raise ValueError(f"probe_batches must be 1 or more, got {probe_batches}.")
    if not 0 < probe_fraction <= 1:
        raise ValueError(f"probe_fraction must lie in (0, 1], got {probe_fraction}.")
    if probe_size is not None and probe_size < 2:
        raise ValueError(f"probe_size must be 2 samples or more, or None, got {probe_size}.")
    if loss_fn is not None and not callable(loss_fn):
        raise ValueError(f"loss_fn must be a function of (module, batch), got {type(loss_fn).__name__}.")


def _size(kept: Sequence[dict[str, Any]]) -> int:
    return sum(entry["samples"] or 0 for entry in kept)


def _difference(first: float, second: float) -> str | None:
    """What to say of two evaluations of one loss; None where they agree."""
    if math.isclose(first, second, rel_tol=_SAME) or not math.isfinite(first + second):
        return None
    return f"on the same samples with the same random numbers its loss was {first:.6g}, then {second:.6g}"


@contextmanager
def _loggers_muted(trainer: pl.Trainer) -> Iterator[None]:
    """What ``training_step`` writes to ``self.logger`` itself is written for its own batches only."""
    loggers = trainer.loggers
    trainer.loggers = [DummyLogger()] if loggers else []
    try:
        yield
    finally:
        trainer.loggers = loggers


def _numbers(batch: Any) -> int | None:
    """How many numbers a probe holds, None where it holds objects that a checkpoint cannot take safely."""
    if type(batch) is Tensor:
        return batch.numel()
    if type(batch) is dict:
        batch = [*batch.keys(), *batch.values()]
    if type(batch) in (list, tuple):
        counts = [_numbers(item) for item in batch]
        return None if any(c is None for c in counts) else sum(c for c in counts if c is not None)
    return 1 if type(batch) in (int, float, str, bool, type(None)) else None
