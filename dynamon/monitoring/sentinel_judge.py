"""Judge the steps that the sentinel looks at, once their numbers are on the host."""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from dynamon.monitoring.fingerprint import fingerprint
from dynamon.monitoring.run_context import RunContext
from dynamon.monitoring.sentinel_check import StepCheck
from dynamon.monitoring.sentinel_inputs import BatchSample, InputSeries
from dynamon.monitoring.sentinel_norms import StepNumbers, StepRow
from dynamon.monitoring.sentinel_tracker import Judged, StepTracker
from dynamon.monitoring.spike_record import SpikeRecord

_FOLLOWED = 8  # steps that are to be looked at after one at which a spike lasts

_Taken = Sequence[tuple[int, StepNumbers]]  # by place of the optimizer that took the step


@dataclass
class HeldBatch:
    """Hold a batch of a step: its index, what it holds while that is kept, entries of it, and its loss."""

    index: int
    held: Any
    entries: BatchSample
    loss: Tensor | None


@dataclass
class Look:
    """Hold a step that is on its way to the host: the rows of the optimizers that took it, and its batches.

    One that is only checked is judged if the check says so.
    """

    step: int
    rows: Sequence[tuple[int, StepRow]]
    batches: Sequence[HeldBatch]
    is_check: bool = False


class StepJudge:
    """Judges steps by the usual levels of each optimizer, and records spikes.

    Attributes:
        follow: The last step that is to be looked at because a spike lasts, or has lasted; -1 for none.
    """

    def __init__(self) -> None:
        """Start before any step."""
        self._trackers: list[StepTracker] = []
        self._of: dict[Optimizer, int] = {}
        self._saved: dict[str, Any] = {}
        self._record, self._inputs = SpikeRecord(), InputSeries()
        self._queue: deque[Look] = deque()
        self.follow = -1

    def tracker(self, run: RunContext, optimizer: Optimizer) -> StepTracker:
        """Return the levels of an optimizer, which begin anew for layers that have joined it."""
        at = self._of.get(optimizer)
        if at is None or not self._trackers[at].norms.is_complete(optimizer):
            run.hook(optimizer)
            tracker = StepTracker(optimizer, run.all_layers, len(self._trackers) if at is None else at)
            if at is None:
                at = self._of[optimizer] = tracker.place
                self._trackers.append(tracker)
            else:
                tracker.load_state_dict(self._trackers[at].state_dict())
                self._trackers[at] = tracker
            if str(at) in self._saved:
                tracker.load_state_dict(self._saved.pop(str(at)))
        return self._trackers[at]

    def add(self, look: Look) -> None:
        """Add a step whose numbers are on their way."""
        self._queue.append(look)

    def held(self) -> Iterator[HeldBatch]:
        """Return the batches of steps that are not judged yet, the oldest first."""
        for look in self._queue:
            yield from look.batches

    def forget(self) -> None:
        """Forget the steps that are not judged yet."""
        self._queue.clear()

    def wait(self) -> None:
        """Wait for the numbers that are on their way."""
        for look in self._queue:
            for _, row in look.rows:
                row.wait()

    def judge_arrived(self, run: RunContext, check: StepCheck | None) -> tuple[bool, bool]:
        """Judge the steps whose numbers are there.

        Args:
            run: The run.
            check: Learns from all of them, and tells which of those that are only checked are judged; while a spike
                lasts all are. None where it has seen them already.

        Returns:
            Whether there is something to tell, and whether a step that was only checked is out of line.
        """
        has_news = has_found = False
        while self._queue and all(row.has_arrived for _, row in self._queue[0].rows):
            look = self._queue.popleft()
            found = [(at, row.read(len(self._trackers[at].names))) for at, row in look.rows]
            taken = [(at, numbers) for at, numbers in found if numbers is not None]
            if not taken:
                continue
            is_out = check is not None and self._is_out(check, taken)
            if look.is_check and not is_out and not self._record.is_open:
                has_news |= self._note_loss(run, look.step, self._trackers[taken[0][0]], taken[0][1].losses)
                continue
            has_found |= look.is_check and is_out
            has_news |= self._judge(look, taken)
            self._record.send(run)
        return has_news, has_found

    def _is_out(self, check: StepCheck, taken: _Taken) -> bool:
        return check.is_out([(at, self._trackers[at].norms, numbers) for at, numbers in taken])

    def note_loss(self, run: RunContext, step: int, optimizer: Optimizer, losses: Sequence[float]) -> bool:
        """Look for a shift in the losses of a step that is not judged; whether there is something to tell."""
        return self._note_loss(run, step, self._trackers[self._of[optimizer]], losses)

    def _note_loss(self, run: RunContext, step: int, tracker: StepTracker, losses: Sequence[float]) -> bool:
        shift, ended = tracker.see_loss(step, losses)
        if shift is not None or ended is not None:
            self._record.note_shift(step, shift, ended)
            self._record.send(run)
        return shift is not None

    def _judge(self, look: Look, taken: _Taken) -> bool:
        """Judge a step by all optimizers that took it; whether there is something to tell."""
        inputs = self._inputs.numbers([batch.entries for batch in look.batches], taken[0][1].samples)
        largest, samples = np.fmax.reduce(inputs), sum(batch.entries.samples for batch in look.batches)
        judged = [
            self._trackers[at].judge(look.step, numbers, samples, None if i else largest)
            for i, (at, numbers) in enumerate(taken)
        ]
        has_begun = self._record.add(look.step, judged)
        if self._record.is_open:
            self.follow = look.step + _FOLLOWED
        if has_begun:
            self._record.spiked(self._of_batch(look, taken[-1][1].losses, inputs, judged[0]))
        return has_begun or judged[0].shift is not None

    def _of_batch(self, look: Look, losses: Sequence[float], inputs: NDArray[Any], judged: Judged) -> dict[str, float]:
        """Describe the batch of a spike: of an accumulation window the unusual one, or that with the largest loss."""
        worst, described = look.batches[-1], dict[str, float]()
        if judged.inputs is not None:
            series, rises = judged.inputs
            worst = look.batches[int(np.nanargmax(inputs[:, series]))]
            described = self._inputs.describe(series, rises)
        elif len(losses) == len(look.batches) > 1:
            worst = look.batches[int(np.argmax([loss if math.isfinite(loss) else math.inf for loss in losses]))]
        described["spike/batch"] = float(worst.index)
        if worst.held is not None:
            described["spike/fingerprint"] = float(fingerprint(worst.held))
        return described

    def log(self, run: RunContext, is_end: bool = False) -> None:
        """Record the largest deviations since the last time."""
        self._record.log(run, is_end)

    def state_dict(self) -> dict[str, Any]:
        """Return the levels of each optimizer, by its place, and the spikes so far."""
        levels = {str(at): tracker.state_dict() for at, tracker in enumerate(self._trackers)}
        own = {"record": self._record.state_dict(), "inputs": self._inputs.state_dict()}
        return {"levels": {**levels, **self._saved}, **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them up."""
        self._saved = dict(state["levels"])
        self._trackers, self._of, self.follow = [], {}, -1
        self._queue.clear()
        self._record.load_state_dict(state["record"])
        if "inputs" in state:
            self._inputs.load_state_dict(state["inputs"])
