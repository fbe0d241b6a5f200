"""Rules on the loss, alone and with the sharpness."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from dynamon.health.finding import SEVERITIES, Finding
from dynamon.health.limits import (
    CLEAR_SIGMAS,
    CONSECUTIVE,
    FAR_ABOVE,
    FEW,
    GRADIENT_GROWTH,
    GROWING_NOISE_SIGMAS,
    LONG,
    LOSS_NOISE_SIGMAS,
    LOSS_ROUNDING,
    PAST,
)
from dynamon.health.rates import rate_is_zero
from dynamon.health.series import (
    final_stretch,
    find_stretches,
    merge_scalars,
    noise_level,
    resolution,
    running_median,
    scalar_at,
)
from dynamon.quantities.names import words
from dynamon.runs.history import RunData, Series

LOSS_TAG = "dynamon/loss"  # what training_step returned, as the monitors log it
_PROBE = "sharpness/probe_loss"
_OURS = ("dynamon/", "sharpness/", "gradient/", "progress/")
_NO_LOSS = {"val", "valid", "validation", "test", "testing", "eval", "dev", "probe"}  # of other data
_NO_LOSS |= {"scale", "scaler", "weight", "weights", "coefficient", "norm"}  # of a loss, but not one
_TOTAL = {"total", "sum", "overall", "full", "all"}
_SAY_NOTHING = _TOTAL | {"train", "training", "loss", "step", "epoch", "running", "avg", "mean", "smooth", "batch"}


@dataclass(frozen=True)
class JudgedLoss:
    """Which series is used as the training loss, and why.

    Attributes:
        tag: Its tag.
        source: ``"returned"`` by ``training_step``, ``"stated"``, recognised by its ``"name"``, measured on the
            ``"probe"``; or a ``"guess"``, the only candidate, or a ``"part"``, one of several that may all be parts of
            it.
    """

    tag: str
    source: str

    @property
    def reason(self) -> str:
        """The tag and why it was chosen."""
        why = {
            "returned": "what training_step returned",
            "stated": "as asked",
            "name": "by its name",
            "probe": "the loss on the probe; no tag has the name of a training loss",
            "guess": "a guess by its name: findings that rest on it count for less",
            "part": "the first of several that may be parts of the loss: findings that rest on it are notes",
        }
        return f"{self.tag}, {why[self.source]}"

    @property
    def name(self) -> str:
        """Its name in a sentence."""
        if self.source == "returned":
            return "The training loss"
        if self.source == "probe":
            return "The loss on the probe"
        taken = {"guess": ", assumed to be the training loss by its name,", "part": ", maybe a part of the loss,"}
        return f"{self.tag}{taken[self.source]}" if self.source in taken else f"The training loss ({self.tag})"


def judged_loss(scalars: Mapping[str, Series], stated: str | None = None) -> JudgedLoss | None:
    """Choose the scalar that the rules use as the training loss.

    The first of: what ``training_step`` returned; a tag whose words only say that it is the training loss or the total;
    the loss on the probe; any other tag with "loss" in its name that is not of other data.

    Args:
        scalars: By tag.
        stated: The tag, if the user has stated it.

    Returns:
        The choice with its reason, None if nothing looks like a loss.

    Example:
        >>> import numpy as np
        >>> from dynamon.health import judged_loss
        >>> from dynamon.runs import Series
        >>> one = Series(np.arange(3), np.ones(3))
        >>> print(judged_loss({"val/loss": one, "train/loss": one}).reason)
        train/loss, by its name
    """  # noqa: D400, D415
    if stated is not None:
        return JudgedLoss(stated, "stated")
    if LOSS_TAG in scalars:
        return JudgedLoss(LOSS_TAG, "returned")
    named = {tag: words(tag) for tag in scalars if not tag.startswith(_OURS)}
    likely = {t: w for t, w in named.items() if any("loss" in word for word in w) and not _NO_LOSS & set(w)}
    ranked = sorted(likely, key=lambda tag: _unlikeliness(likely[tag]))
    if ranked and not _unlikeliness(likely[ranked[0]])[0]:
        return JudgedLoss(ranked[0], "name")
    if _PROBE in scalars:
        return JudgedLoss(_PROBE, "probe")
    if not ranked:
        return None
    return JudgedLoss(ranked[0], "guess" if len(_without_ends(likely.values())) == 1 else "part")


def _unlikeliness(found: list[str]) -> tuple[int, bool, bool, bool]:
    """Count the words with another meaning; then: not called the total, not of training, of an epoch."""
    else_ = sum(word not in _SAY_NOTHING for word in found)
    return else_, not _TOTAL & set(found), not any("train" in word for word in found), "epoch" in found


def _without_ends(names: Iterable[list[str]]) -> set[tuple[str, ...]]:
    """Remove what Lightning appends to names: ``_step`` and ``_epoch`` are of one quantity."""
    return {tuple(w for w in name if w not in ("step", "epoch")) for name in names}


def loss_tag(scalars: Mapping[str, Series]) -> str | None:
    """Return the tag of :func:`judged_loss`."""
    judged = judged_loss(scalars)
    return None if judged is None else judged.tag


class Loss:
    """The training loss, smoothed.

    ``level`` is its running median at each of ``steps``, ``noise`` the standard deviation of a single reading,
    including rounding. Everything is compared by differences, with noise and with what had been gained, so that a loss
    may be negative or cross zero. If it is positive throughout, ratios are used as well.
    """

    def __init__(self, scalars: Mapping[str, Series], judged: JudgedLoss | None) -> None:
        self.judged = judged
        self.tags = (judged.tag,) if judged is not None and judged.tag in scalars else ()
        self.every_step, self.every_value = merge_scalars(scalars, *self.tags)
        finite = np.isfinite(self.every_value)
        bad = final_stretch(~finite)
        self.broken_for = len(finite) - bad  # readings, to the end
        self.broken_at = int(self.every_step[bad]) if self.broken_for else None
        self.steps, self.values = self.every_step[finite], self.every_value[finite]
        width = int(np.clip(len(self.values) // 20, CONSECUTIVE, 51))
        self.level = running_median(self.values, width)
        self.level[:2] = self.level[2:3] if len(self.level) > 2 else self.level[:2]  # a single reading is no level
        self.resolution = resolution(self.values)
        self.noise = max(noise_level(self.values), self.resolution / 2)

    def __len__(self) -> int:
        return len(self.level)

    @property
    def is_broken(self) -> bool:
        """Return whether the last reading is not finite."""
        return self.broken_for > 0

    @property
    def name(self) -> str:
        """Its name in a sentence."""
        return "The training loss" if self.judged is None else self.judged.name

    def severity(self, severity: str) -> str:
        """Reduce a severity if the loss is a guess."""
        source = "" if self.judged is None else self.judged.source
        if source == "part":
            return "note"
        lower = SEVERITIES.index(severity) + (source == "guess")
        return SEVERITIES[min(lower, len(SEVERITIES) - 1)]

    def rise(self, begin: float, end: float) -> float:
        """Return the rise of the level at step ``end`` above the lowest up to ``begin``; 0 if that is noise.

        A rise counts from a quarter of what had been gained by then, and above the noise.
        """
        last = int(np.searchsorted(self.steps, end, side="right"))
        first = min(max(int(np.searchsorted(self.steps, begin, side="right")), 1), last)
        if not first:
            return 0.0
        low, high = float(self.level[:first].min()), float(self.level[last - 1])
        gained = float(self.level[0]) - low
        return high - low if self.is_beyond(low, high, first) and high - low > gained / 4 else 0.0

    def is_beyond(self, low: float, high: float, first: int) -> bool:
        """Return whether one level is above another by more than noise.

        That is eight times the noise of all readings; or of those up to the ``first``-th, since the noise of a
        diverging loss grows with it; or, if the loss is positive, of its logarithm, and then it must have doubled.
        """
        rise = high - low
        if not rise > LOSS_ROUNDING * float(np.abs(self.values).max()):
            return False
        is_known = len(self.values) >= PAST  # the noise is not known from fewer readings
        if is_known and rise > LOSS_NOISE_SIGMAS * self.noise:
            return True
        before = max(noise_level(self.values[:first]), self.resolution / 2) if first >= PAST else math.inf
        if rise > max(LOSS_NOISE_SIGMAS * before, GROWING_NOISE_SIGMAS * self.noise):
            return True
        if self.values.min() <= 0:
            return False
        return math.log(high / low) > max(LOSS_NOISE_SIGMAS * noise_level(np.log(self.values)), math.log(2))

    @property
    def is_lost(self) -> bool:
        """Return whether 90 % of the last quarter of a positive loss are far above the beginning, however it jumps.

        Twice as high as the first three readings, or eight times the very first, if hardly any other is below it: a run
        may be lost with its first step. Both must exceed the noise of the logarithm.
        """
        last = self.values[-(len(self.values) // 4) :]
        if len(last) < LONG or self.values.min() <= 0:
            return False
        high, noise = float(np.quantile(last, 0.1)), CLEAR_SIGMAS * noise_level(np.log(self.values))
        three, first = float(self.values[:3].max()), float(self.values[0])
        if math.log(high / three) > max(math.log(2), noise):
            return True
        return math.log(min(high, float(np.quantile(self.values[1:], 0.05))) / first) > max(math.log(8), noise)


def broken_loss(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find a loss that is NaN or infinite to the end; a few such batches may pass."""
    if loss.broken_at is not None:
        lasts = loss.broken_for >= CONSECUTIVE
        yield Finding(
            "loss/nonfinite",
            loss.severity("fault" if lasts else "warning"),
            loss.broken_at,
            f"{loss.name} is not finite from step {loss.broken_at} on"
            + ("." if lasts else f", {loss.broken_for} readings so far."),
            "Go back to a checkpoint before that step. Usual causes: too large a learning rate, overflow in half "
            "precision, a logarithm or a division of zero; gradient clipping helps against rare large batches.",
            numbers={"readings": loss.broken_for},
            tags=loss.tags,
        )


def diverging(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find a loss that rose and has not come back."""
    if len(loss) < 2 * CONSECUTIVE:
        return
    lowest = int(np.argmin(loss.level))
    low, end, start = float(loss.level[lowest]), float(loss.level[-1]), float(loss.level[0])
    rise = loss.rise(loss.steps[lowest], loss.steps[-1])
    if loss.is_lost:
        lowest, low, start = 0, float(loss.values[0]), float(loss.values[0])
        rise = end - low
    if not rise or rise < (start - low) / 2:
        return
    begin = int(loss.steps[lowest + int(np.argmax(loss.level[lowest:] > low + rise / 10))])
    lost = loss.is_lost or (end > start and loss.is_beyond(start, end, lowest + 1))
    as_meant = _is_steady(loss, lowest) and _is_calm(data, loss, lowest)
    where = f", above the {start:.4g} it began with" if lost else " and has not come back"
    yield Finding(
        "loss/rising",
        "note" if as_meant else loss.severity("fault" if lost else "warning"),
        begin,
        f"{loss.name} rose from {low:.4g} to {end:.4g}{where}"
        + (", steadily and without larger gradients." if as_meant else "."),
        "An objective that changes does that: annealed terms, a curriculum, an adversary, moving targets. If yours "
        "does not, lower the learning rate."
        if as_meant
        else "Lower the learning rate or lengthen the warm-up; look at what the data and the schedule did at that "
        "step.",
        numbers={"lowest": low, "last": end, "first": start},
        tags=loss.tags,
    )


def _is_steady(loss: Loss, lowest: int) -> bool:
    """Return whether no fifth of the readings since the lowest contributed more than half of the rise."""
    since = loss.level[lowest:]
    width = max(len(since) // 5, 1)
    return len(since) > PAST and float((since[width:] - since[:-width]).max()) <= (since[-1] - since[0]) / 2


def _is_calm(data: RunData, loss: Loss, lowest: int) -> bool:
    """Return whether gradients are known and did not grow during the rise, and steps stayed within the curvature."""
    norms = data.scalars.get("gradient/norm")
    if norms is None:
        return False
    before = norms.values[norms.steps <= loss.steps[lowest]]
    after = norms.values[norms.steps > (loss.steps[lowest] + loss.steps[-1]) / 2]
    if not len(before) or not len(after) or not np.isfinite(after).all():
        return False
    ratios = scalar_at(data, "sharpness/stability_ratio", loss.steps[lowest:])
    is_within = not np.isfinite(ratios).all() or float(np.median(ratios)) <= 1
    return is_within and float(np.median(after)) < GRADIENT_GROWTH * float(np.median(before))


def constant_loss(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find a loss that is the same number to the end: zero, or any other in full precision."""
    values = loss.every_value
    if not len(values) or not np.isfinite(values[-1]):
        return
    start, last = final_stretch(values == values[-1]), float(values[-1])
    count, is_zero = len(values) - start, last == 0
    if count < (FEW if is_zero and not start else LONG) or start and not is_zero and count < len(values) / 2:
        return
    if count < FEW * max((stop - begin for begin, stop in find_stretches(values[:start] == last, 1)), default=0):
        return  # such stretches come and go
    since = loss.every_step[start:]
    norms = scalar_at(data, "gradient/norm", since)
    if rate_is_zero(data, since) or (norms == 0).all() or (start and not is_zero and loss.resolution):
        return  # reported by other rules, or rounding
    step = int(since[0])
    yield Finding(
        "loss/constant",
        loss.severity("warning" if is_zero or not start else "note"),
        step,
        f"{loss.name} is exactly {last:.6g} at all {count} readings from step {step} on.",
        "Nothing is left to learn from it, or it is cut off from what changes: look for a mask that leaves nothing, "
        "labels that are all ignored, a clamp, a detached result, batches that are all the same.",
        numbers={"loss": last, "readings": count},
        tags=loss.tags,
    )


def unstable(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find sharpness far above the threshold while the loss rises; alone it is not a fault."""
    steps, values = merge_scalars(data.scalars, "sharpness/stability_ratio", "sharpness/stability_ratio_unconverged")
    for start, stop in find_stretches(values > FAR_ABOVE, 3):
        until = float(steps[stop]) if stop < len(steps) else math.inf
        rise = loss.rise(float(steps[start]), until)
        broken = loss.is_broken and loss.broken_at is not None and loss.broken_at <= until
        if rise or broken:
            ratio = float(np.median(values[start:stop]))
            rose = "the loss is no longer finite" if broken and not rise else f"the loss rose by {rise:.3g}"
            yield Finding(
                "sharpness/unstable",
                loss.severity("fault"),
                int(steps[start]),
                f"The stability ratio was {ratio:.3g} in the median of {stop - start} consecutive readings, far above "
                f"1, while {rose}: steps are larger than the curvature allows.",
                "Lower the learning rate (divide it by the ratio as a first guess) or lengthen the warm-up. A ratio "
                "around 1 is normal; a loss that is not smooth need not obey it.",
                numbers={"stability_ratio": ratio, "readings": stop - start, "rise": rise},
                tags=("sharpness/stability_ratio", *loss.tags),
            )
            return
