"""What the weights' dtype loses of updates and decay, and what copies in fewer bits would lose of a tensor."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynamon.distributed.dtensor import holders, to_local
from dynamon.distributed.ranks import Ranks
from dynamon.distributed.reduction import PartialStats, ShardReduction
from dynamon.kernels import widest_dtype
from dynamon.kernels.constants import on_device
from dynamon.kernels.devices import reads_are_free
from dynamon.layers import Layer
from dynamon.layers.complex_pairs import as_real, real_dtype, real_numel
from dynamon.quantities.flat_pieces import Chunk, is_below, is_equal, largest_magnitudes, sum_over_entries, table_of

_SUMS = 6
_OFFSET = 256.0  # added to logarithms, so that what is summed is not negative
_NEAR = 4.0  # half distances; a step that is lost, or would be at twice its size, is at most 2
_FEWEST = 3.0  # moves, below which nothing tells how an optimizer rounds


@dataclass(frozen=True)
class ComputedStep:
    r"""The step that an optimizer computed for one parameter, before the parameter's dtype rounded it.

    Entry by entry :math:`-(a\, m / (1 - \beta_1^t) + b\, g + c\, w) / (r \sqrt{v / (1 - \beta_2^t)} + \epsilon)`, with
    the weight w before it. Tensors are this process's part.

    Attributes:
        before: The weight before the step.
        now: The weight after it.
        first: m; None for zero.
        second: v; None for zero.
        gradient: g, as the step used it; None for zero.
        factors: a, b, c, r, :math:`\epsilon`, :math:`\beta_1`, :math:`\beta_2`, the rate times decoupled decay, and
            what the weight is multiplied by where decay comes first.
        count: t, a number or a tensor of one number.
        is_known: Whether this is the step itself; else it is zero just where the step is, and the rest is not known.
        decays_first: Whether the weight is multiplied by 1 - rate x decay, and rounded, before the step is added.
        keeps: Whether the optimizer keeps what rounding takes, for its next steps.
    """

    before: Tensor
    now: Tensor
    first: Tensor | None
    second: Tensor | None
    gradient: Tensor | None
    factors: tuple[float, ...]
    count: float | Tensor
    is_known: bool
    decays_first: bool
    keeps: bool = False


def stored_shares(layers: Sequence[Layer], steps: Mapping[str, ComputedStep], ranks: Ranks) -> Tensor:
    """Count what rounding to the weights' dtype lost of a step.

    Args:
        layers: L layers, on one device.
        steps: Their steps by name, as far as they are known.
        ranks: The processes of the run, inside their :meth:`dynamon.distributed.ranks.Ranks.collective_section`.

    Returns:
        ``[5, L]`` in float32, for :func:`lost_shares`, the same on every process where weights are sharded; NaN for
        layers whose step is not known. Shares of the entries:

        - computed step not zero, the entry did not move beyond its own decay, and rounding explains it: half of the
          step rounds to no change, as far as the step itself is known;
        - decay not zero, and lost: decay alone rounds to no change, or where it is rounded together with the step, the
          entry did not move;
        - the entry moved although rounding to nearest would leave it where it is at twice the step;
        - what that share would be in the mean if rounding were without bias;

        and the mean logarithm to base 2 of step over half the distance to the weight's neighbours; NaN where the step
        itself is not known.

    Cost: 60 device calls for each quarter of the entries of one dtype and optimizer, at most 2^25 of them. No host
    synchronisation. Memory: 16 numbers for each entry of such a part. For shards one all-reduce of ``8 L`` numbers.
    """
    device, likes = layers[0].parameter.device, [layer.parameter for layer in layers]
    holding = holders(likes, ranks)
    wide = widest_dtype(device)
    sums = torch.zeros(_SUMS, len(layers), dtype=wide, device=device)
    forms: dict[tuple[object, ...], list[int]] = {}
    for i, layer in enumerate(layers):
        step = steps.get(layer.name)
        if step is not None and step.now.numel():
            forms.setdefault(_form(step), []).append(i)
    for members in forms.values():
        own = [steps[layers[i].name] for i in members]
        sums.index_add_(1, on_device(members, device, torch.int64), _sums_of(own).to(wide))
    known = on_device([layer.name in steps for layer in layers], device, torch.bool)[None]
    stats = ShardReduction(likes, holding, sums=_SUMS, known=1).reduce(PartialStats(sums=sums, known=known))
    sizes = on_device([real_numel(like) for like in likes], device, wide)
    *counts, logs, stepping = stats.sums.unbind()
    shares = [count / sizes for count in counts]
    mean = torch.where(stepping > 0, logs / stepping - _OFFSET, torch.nan)
    return torch.where(stats.known[0], torch.stack([*shares, mean]), torch.nan).float()


def _form(step: ComputedStep) -> tuple[object, ...]:
    """Return what steps must have in common to be computed in the same calls."""
    there = tuple(tensor is not None for tensor in (step.first, step.second, step.gradient))
    on_host = not isinstance(step.count, Tensor) or step.count.device.type == "cpu"
    return step.now.dtype, there, step.is_known, step.decays_first, on_host, step.factors[2] != 0


def _sums_of(steps: Sequence[ComputedStep]) -> Tensor:
    """Sum over the entries of T steps of one form, ``[6, T]``."""
    first, dtype, device = steps[0], steps[0].now.dtype, steps[0].now.device
    wide = torch.promote_types(dtype, torch.float32)
    counts = [step.count for step in steps]
    if isinstance(counts[0], Tensor) and counts[0].device.type != "cpu":
        table = table_of(list(zip(*(step.factors for step in steps), strict=True)), device, wide)
        times = torch.stack([to_local(count).reshape(()) for count in counts if isinstance(count, Tensor)]).to(wide)
    else:
        rows = [(*step.factors, float(step.count)) for step in steps]
        if len(set(rows)) == 1:  # one number serves all entries
            rows = rows[:1]
        *factors, moments = zip(*rows, strict=True)
        table, times = table_of(factors, device, wide), table_of([moments], device, wide)[0]
    a, b, c, root, eps, beta1, beta2, *decay = table.unbind()
    numbers = torch.stack([a / (1 - beta1**times), b, c, root / (1 - beta2**times).sqrt(), eps, *decay])

    def measure(chunk: Chunk) -> list[Tensor]:
        def flat(name: str) -> Tensor | None:
            found = [getattr(step, name) for step in steps]
            return None if found[0] is None else chunk.flat(found, wide)

        before, now = flat("before"), flat("now")
        assert before is not None and now is not None
        a, b, c, root, eps, shrink, kept = chunk.spread(numbers).unbind()
        step: Tensor | None = None
        for factor, tensor in ((a, flat("first")), (b, flat("gradient")), (c, before if first.factors[2] else None)):
            if tensor is not None:
                step = tensor * -factor if step is None else step.sub_(tensor * factor)
        if step is None:
            step = torch.zeros_like(before)
        if (squares := flat("second")) is not None:
            step /= squares.sqrt().mul_(root).add_(eps)
        return _rows(before, now, step, (shrink, kept), dtype, first)

    return sum_over_entries([step.now for step in steps], _SUMS, measure)


def _rows(
    before: Tensor, now: Tensor, step: Tensor, decay: tuple[Tensor, Tensor], dtype: torch.dtype, form: ComputedStep
) -> list[Tensor]:
    """Return for each entry whether its update and its decay were lost, and how its step compares with rounding."""
    shrink, kept = decay
    base = _held(before * kept, dtype) if form.decays_first else before
    decayed = before * shrink
    lost_decay = ~is_equal(decayed, 0.0) & (is_equal(base, before) if form.decays_first else is_equal(now, base))
    if not form.is_known:
        return [~is_equal(step, 0.0) & is_equal(now, base), lost_decay] + [torch.zeros_like(lost_decay)] * (_SUMS - 2)
    total = step if form.decays_first else step - decayed
    relative = total.abs() / _half_distance(base, dtype)
    # What is far above the distance cannot be lost. In float32 that is nearly all, and the host looks at the rest only.
    places = _few(is_below(relative, _NEAR)) if reads_are_free(base.device) else None
    own = [now, step, base, total, relative]
    lost, against, expected = _rounding(own if places is None else [one[places] for one in own], dtype)
    if places is not None:
        lost, against, expected = (x.new_zeros(base.shape).index_copy_(0, places, x) for x in (lost, against, expected))
    is_zero = is_equal(base, 0.0)
    if not reads_are_free(base.device) or is_zero.any():
        relative.masked_fill_(is_zero, 0.0)
    logs = relative.log2_().add_(_OFFSET).nan_to_num_(0.0, 0.0, 0.0).clamp_min_(0)
    return [lost, lost_decay, against, expected, logs, ~is_equal(logs, 0.0)]


def _held(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to a dtype and go back."""
    return values.to(dtype).to(values.dtype)


def _few(mask: Tensor) -> Tensor | None:
    """Return where a mask on the host is set; None where that is in more than a quarter of the entries."""
    is_set = mask.numpy()
    return torch.from_numpy(np.flatnonzero(is_set)) if np.count_nonzero(is_set) < len(is_set) // 4 else None


def _rounding(entries: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Say which entries lost their update, which moved against rounding to nearest, and how many would by chance.

    By chance: the mean number of moves of unbiased rounding where rounding to nearest makes none.
    """
    now, step, base, total, relative = entries
    stays = is_equal(now, base)
    # Else something other than rounding holds the entry.
    lost = ~is_equal(step, 0.0) & stays & is_equal(_held(base + total / 2, dtype), base)
    rounds_away = is_equal(_held(base + 2 * total, dtype), base) & ~is_equal(total, 0.0)
    expected = (relative / 2).nan_to_num_(0.0, 0.0) * (rounds_away & ~is_equal(base, 0.0))
    return lost, rounds_away & ~stays, expected


def _half_distance(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Return half of the distance of numbers, in float32 or float64, to their neighbours of a dtype, away from zero."""
    bits, exponent = (torch.int32, 0xFF << 23) if numbers.dtype == torch.float32 else (torch.int64, 0x7FF << 52)
    powers = (numbers.view(bits) & exponent).view(numbers.dtype)  # without sign and fraction
    # Below the smallest normal number all neighbours are equally far apart.
    return powers.clamp_min_(torch.finfo(dtype).tiny).mul_(torch.finfo(dtype).eps / 2)


def lost_shares(
    rows: NDArray[np.float64], sizes: NDArray[np.float64], groups: Sequence[object], keeps: Sequence[bool]
) -> NDArray[np.float64]:
    """Turn the numbers of :func:`stored_shares` into readings.

    An optimizer that rounds stochastically, or keeps what is rounded away (Kahan summation, a copy of the weights in
    float32), loses nothing in the mean although most entries do not move in a step. It is recognised by entries that
    move although rounding to nearest forbids it, at least half as many as unbiased rounding would move; they are
    counted over all layers of an optimizer and a dtype.

    Args:
        rows: ``[5, L]``, on the host.
        sizes: ``[L]`` numbers of entries.
        groups: For each layer its optimizer and dtype.
        keeps: Whether the layer's optimizer is known to keep what is rounded away.

    Returns:
        ``[3, L]``: shares of updates and of decay that are lost, and step over half the distance between neighbouring
        numbers (geometric mean over entries).
    """
    lost, lost_decay, against, expected, logs = rows.astype(np.float64)
    moves: dict[object, NDArray[np.float64]] = {}
    for i, group in enumerate(groups):
        pair = np.nan_to_num(np.array([against[i], expected[i]])) * sizes[i]
        moves[group] = moves.get(group, np.zeros(2)) + pair
    unbiased = {group for group, (seen, mean) in moves.items() if seen >= max(_FEWEST, mean / 2)}
    nothing = np.array([kept or group in unbiased for kept, group in zip(keeps, groups, strict=True)])
    for share in (lost, lost_decay):
        share[nothing & np.isfinite(share)] = 0.0
    return np.stack([lost, lost_decay, np.exp2(logs)])


FORMATS = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
RANGES = ("underflow_bf16", "underflow_fp16", "underflow_e4m3", "underflow_e5m2", "overflow_bf16", "overflow_fp16")

_UNDER = 4  # how many of them are of underflow


def range_shares(tensors: Sequence[Tensor], likes: Sequence[Tensor], ranks: Ranks) -> Tensor:
    """Count the entries that copies in fewer bits would turn into zero or infinity.

    bfloat16 and float16 hold the entries as they are. The eight-bit formats (e4m3fn and e5m2) hold them times the
    largest finite number of the format over the largest magnitude of the tensor, one scale for each tensor taken from
    the tensor itself ("current scaling"), so that nothing overflows. Rounding is to nearest, ties to even.

    Args:
        tensors: T tensors on one device, of sharded ones the parts here.
        likes: What each is laid out as.
        ranks: The processes of the run, inside their :meth:`dynamon.distributed.ranks.Ranks.collective_section`.

    Returns:
        ``[6, T]`` in float32 in the order of ``RANGES``: shares of all entries, zeros and what is not finite included.
        NaN in the rows of eight-bit formats where the largest magnitude is zero or not finite.

    Cost: 30 device calls for each quarter of the entries, at most 2^25 of them; no host synchronisation. For shards two
    all-reduces, of the largest magnitudes and of the counts.
    """
    holding = holders(likes, ranks)
    parts = [as_real(tensor.detach()) for tensor in tensors]
    device = parts[0].device
    wide = widest_dtype(device)
    filled = [part if part.numel() else part.new_zeros(1) for part in parts]
    tops = holding.maximum(largest_magnitudes(filled))
    tops = torch.where(torch.isfinite(tops) & (tops > 0), tops, torch.nan)
    compared = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
    limits = torch.stack([_limit(name, tops) for name in RANGES]).to(compared)

    def measure(chunk: Chunk) -> list[Tensor]:
        sizes = chunk.flat(parts, compared).abs()
        under, over = chunk.spread(limits).split([_UNDER, len(RANGES) - _UNDER])
        below = [is_below(sizes, bound) for bound in (*under, 0.0)]
        sizes.neg_()
        return [*below, *(is_below(sizes, -bound) for bound in (*over, torch.inf))]

    found = sum_over_entries(parts, len(RANGES) + 2, measure)
    counts = torch.cat(
        [found[:_UNDER] - found[_UNDER], found[_UNDER + 1 : -1] - found[-1]]
    )  # without zeros, infinities
    sums = ShardReduction(likes, holding, sums=len(RANGES)).reduce(PartialStats(sums=counts)).sums
    shares = sums / on_device([real_numel(like) for like in likes], device, wide)
    return torch.where(limits.isnan(), torch.nan, shares).float()


def _limit(name: str, tops: Tensor) -> Tensor:
    """Return from where on copies of T tensors lose entries, given the tensors' largest magnitudes ``[T]``."""
    fate, kind = name.split("_")
    if fate == "overflow":
        return torch.full_like(tops, _overflow(FORMATS[kind]))
    scaled = FORMATS[kind].itemsize == 1
    return (tops / torch.finfo(FORMATS[kind]).max if scaled else torch.ones_like(tops)) * _half_least(FORMATS[kind])


def _half_least(dtype: torch.dtype) -> float:
    """Return half of the smallest positive number of a dtype: what is not larger rounds to zero."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2


def _overflow(dtype: torch.dtype) -> float:
    """Return the number from which on rounding gives infinity."""
    found = torch.finfo(dtype)
    return found.max + 2.0 ** math.floor(math.log2(found.max)) * found.eps / 2


def bits_of(layers: Sequence[Layer]) -> NDArray[np.float64]:
    """Return the significant bits of each weight's dtype: 8 of bfloat16, 11 of float16, 24 of float32."""
    return np.array([1 - math.log2(torch.finfo(real_dtype(layer.parameter)).eps) for layer in layers])
