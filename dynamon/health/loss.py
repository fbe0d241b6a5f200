"""What the loss says, alone and with the sharpness."""

import math
from collections.abc import Iterator, Mapping

import numpy as np

from dynamon.health.finding import Finding
from dynamon.health.series import IN_A_ROW, merged, noise_of, running_median, stretches
from dynamon.history import RunData, Series

_LOSS_NOISES = 8.0  # the same for the loss, whose batches come in an order and may resemble their neighbours
_FAR_ABOVE = 2.0  # stability ratio: a probe's may well read some tenths above 1
_LOSSES = ("train/loss", "train_loss", "loss", "training/loss", "training_loss", "train/loss_step", "train_loss_step")


def loss_tag(scalars: Mapping[str, Series]) -> str | None:
    """The tag under which the training loss was logged; the loss on the probe where none looks like one."""
    for tag in _LOSSES:
        if tag in scalars:
            return tag
    likely = [tag for tag in scalars if "train" in tag.lower() and "loss" in tag.lower()]
    likely += ["sharpness/probe_loss"] if "sharpness/probe_loss" in scalars else []
    return likely[0] if likely else None


class Loss:
    """The training loss, smoothed.

    ``level`` is its running median at each of ``steps``, ``noise`` the standard deviation of a single reading.
    """

    def __init__(self, scalars: Mapping[str, Series], tag: str | None) -> None:
        self.tags = (tag,) if tag is not None and tag in scalars else ()
        steps, values = merged(scalars, *self.tags)
        finite = np.isfinite(values)
        broken = np.flatnonzero(~finite)
        self.broken_at = int(steps[broken[0]]) if len(broken) else None
        self.is_broken = bool(len(values)) and not finite[-1]
        self.steps, self.values = steps[finite], values[finite]
        width = int(np.clip(len(self.values) // 20, IN_A_ROW, 51))
        self.level = running_median(self.values, width)
        self.noise = noise_of(self.values)

    def __len__(self) -> int:
        return len(self.level)

    def rise(self, begin: float, end: float) -> float:
        """By how much the level at step ``end`` lies above the lowest up to ``begin``; 0 where that is noise.

        A rise counts from a quarter of what had been gained by then, and above eight times the noise; where the loss is
        positive, the noise of its logarithm serves as well, since that of a diverging loss grows with it.
        """
        last = int(np.searchsorted(self.steps, end, side="right"))
        first = min(max(int(np.searchsorted(self.steps, begin, side="right")), 1), last)
        if not first:
            return 0.0
        low = float(self.level[:first].min())
        rise = float(self.level[last - 1]) - low
        gained = float(self.level[0]) - low
        is_known = len(self.values) >= 4 * IN_A_ROW  # the noise, from a few readings it is not
        beyond = is_known and rise > _LOSS_NOISES * self.noise or self._times(low, float(self.level[last - 1]))
        return rise if beyond and rise > max(gained / 4, 1e-6 * abs(low)) else 0.0

    @property
    def is_lost(self) -> bool:
        """Whether nine tenths of the last quarter lie far above the beginning, however it jumps.

        Twice as high as the first three readings, or eight times the very first: a run may be lost with its first step.
        """
        last = self.values[-(len(self.values) // 4) :]
        if len(last) < IN_A_ROW**2 or self.values[0] <= 0:
            return False
        return float(np.quantile(last, 0.1)) > min(2 * float(self.values[:3].max()), 8 * float(self.values[0]))

    def _times(self, low: float, high: float) -> bool:
        """Whether a positive loss has doubled at least, and that beyond its relative noise."""
        if not len(self.values) or self.values.min() <= 0:
            return False
        return math.log(high / low) > max(_LOSS_NOISES * noise_of(np.log(self.values)), math.log(2))


def broken_loss(data: RunData, loss: Loss) -> Iterator[Finding]:
    """The loss is NaN or infinite to the end."""
    if loss.is_broken and loss.broken_at is not None:
        yield Finding(
            "loss/nonfinite",
            "fault",
            loss.broken_at,
            f"The training loss is not finite from step {loss.broken_at} on.",
            "Go back to a checkpoint before that step. Usual causes: too large a learning rate, overflow in half "
            "precision, a logarithm or a division of zero; gradient clipping helps against rare large batches.",
            tags=loss.tags,
        )


def diverging(data: RunData, loss: Loss) -> Iterator[Finding]:
    """The loss rose and has not come back."""
    if len(loss) < 2 * IN_A_ROW:
        return
    lowest = int(np.argmin(loss.level))
    low, end, start = float(loss.level[lowest]), float(loss.level[-1]), float(loss.level[0])
    rise = end - low if loss.is_lost else loss.rise(loss.steps[lowest], loss.steps[-1])
    if not rise or rise < (start - low) / 2:
        return
    begin = int(loss.steps[lowest + int(np.argmax(loss.level[lowest:] > low + rise / 10))])
    lost = loss.is_lost or (end > start and bool(loss.rise(loss.steps[0], loss.steps[-1])))
    yield Finding(
        "loss/rising",
        "fault" if lost else "warning",
        begin,
        f"The training loss rose from {low:.4g} to {end:.4g}"
        + (f", above the {start:.4g} it began with." if lost else " and has not come back."),
        "Lower the learning rate or lengthen the warm-up; look at what the data and the schedule did at that step.",
        numbers={"lowest": low, "last": end, "first": start},
        tags=loss.tags,
    )


def unstable(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Sharpness far above the threshold is a fault only where the loss rises with it."""
    steps, values = merged(data.scalars, "sharpness/stability_ratio", "sharpness/stability_ratio_unconverged")
    for start, stop in stretches(values > _FAR_ABOVE, 3):
        until = float(steps[stop]) if stop < len(steps) else math.inf
        rise = loss.rise(float(steps[start]), until)
        broken = loss.is_broken and loss.broken_at is not None and loss.broken_at <= until
        if rise or broken:
            ratio = float(np.median(values[start:stop]))
            rose = "the loss is no longer finite" if broken and not rise else f"the loss rose by {rise:.3g}"
            yield Finding(
                "sharpness/unstable",
                "fault",
                int(steps[start]),
                f"The stability ratio was {ratio:.3g} in the median of {stop - start} readings in a row, far above 1, "
                f"while {rose}: steps are larger than the curvature allows.",
                "Lower the learning rate (divide it by the ratio as a first guess) or lengthen the warm-up. A ratio "
                "around 1 is normal; a loss that is not smooth need not obey it.",
                numbers={"stability_ratio": ratio, "readings": stop - start, "rise": rise},
                tags=("sharpness/stability_ratio", *loss.tags),
            )
            return
