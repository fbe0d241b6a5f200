"""The probe: samples of training that sharpness is measured on, kept for the whole run."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from dynamon.callbacks.meter import Cadence, Meter, Run
from dynamon.probe import LossFn, batch_weight, take_samples, training_loss, undisturbed

SAVED_NUMBERS = 2**26  # a probe, or vectors to start from, enter a checkpoint up to this size
_SEED = 20_240_801


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

    def state_dict(self) -> dict[str, Any]:
        """The samples, where they are not many and hold nothing that a checkpoint could not load safely."""
        numbers = _numbers([[entry["batch"] for entry in kept] for kept in self._sets])
        return {"sets": self._sets} if numbers is not None and numbers <= SAVED_NUMBERS else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the samples; without them new ones are kept."""
        sets = [list(kept) for kept in state.get("sets", [])]
        self._resumed_without = not sets
        for place, kept in enumerate(sets[: len(self._sets)]):
            self._sets[place] = kept


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
