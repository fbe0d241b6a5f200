"""Turn what was watched on all processes into readings by module and head, with one copy to the host."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynamon.distributed.ranks import Ranks
from dynamon.kernels import widest_dtype
from dynamon.monitoring.activation_modules import residual_blocks
from dynamon.monitoring.activation_watch import ActivationWatch, Row
from dynamon.quantities.activations import join_statistics, unscaled_sums

Table = tuple[NDArray[Any], tuple[str, ...]]
_SUMS = 6  # entries, squares, fourth powers, entries that are not zero, entries with a gradient, squares of gradients


@dataclass(frozen=True)
class Layout:
    """Hold which rows there are, the same on all processes.

    Attributes:
        rows: Names of outputs in the order of the model.
        units: Number of units by name of an activation function, several where it met tensors of several widths.
        heads: Names of heads.
        blocks: Names of the blocks of a residual stream.
    """

    rows: tuple[str, ...]
    units: dict[str, list[int]]
    heads: tuple[str, ...]
    blocks: frozenset[str]

    @classmethod
    def of(cls, watch: ActivationWatch, ranks: Ranks) -> "Layout":
        """Join those of all processes, inside of :meth:`dynamon.distributed.ranks.Ranks.collective_section`."""
        own = {
            "rows": {name: row.place for name, row in watch.rows.items()},
            "units": {name: list(row.flat) for name, row in watch.rows.items() if row.flat},
            "heads": {
                (*watch.places[name], name): sorted({head for one in calls for head in one.heads})
                for name, calls in watch.heads.items()
            },
            "blocks": [watch.blocks[place] for place in residual_blocks(watch.passages)],
        }
        known: list[dict[str, Any]] = ranks.all_gather_object(own)
        places = {name: place for one in known for name, place in one["rows"].items()}
        units: dict[str, list[int]] = {}
        heads: dict[tuple[int, int, str], set[int]] = {}
        for one in known:
            for name, sizes in one["units"].items():
                units[name] = sorted({*units.get(name, []), *sizes})
            for key, numbers in one["heads"].items():
                heads[key] = heads.get(key, set()) | set(numbers)
        return cls(
            tuple(sorted(places, key=lambda name: (places[name], name))),
            units,
            tuple(f"{key[-1]}.{head}" for key in sorted(heads) for head in sorted(heads[key])),
            frozenset(name for one in known for name in one["blocks"]),
        )


def read_activations(
    watch: ActivationWatch, ranks: Ranks, device: torch.device, samples: int | None
) -> dict[str, Table]:
    """Reduce what was watched.

    Args:
        watch: What was watched on this process.
        ranks: The processes.
        device: Where numbers are reduced.
        samples: Samples behind the mean loss on this process: gradients are multiplied by them, and left out where
            their number is not known.

    Returns:
        Numbers and names by tag; NaN where a row has no such reading. Tags without any row are left out.

    Cost: a few calls, one copy to the host, and on several processes a gather of names and two all-reduces.
    """
    layout = Layout.of(watch, ranks)
    sums, maxima = _packed(watch, layout, device, samples)
    ranks.sum(sums)
    ranks.maximum(maxima)
    host = torch.cat([sums, maxima]).cpu().numpy()  # the one copy
    return _finished(layout, host[: len(sums)], host[len(sums) :])


def _packed(watch: ActivationWatch, layout: Layout, device: torch.device, samples: int | None) -> tuple[Tensor, Tensor]:
    """Put what is summed, and what the largest is taken of, into one vector each."""
    wide = widest_dtype(device)
    rows = [watch.rows.get(name, Row((0, 0))) for name in layout.rows]
    counts = torch.tensor([[row.entries, row.graded] for row in rows], dtype=wide, device="cpu").reshape(-1, 2)
    counts = counts.to(device)
    entries = _rows([_joined(row.statistics, device, wide) for row in rows], 4, device, wide)
    lengths = _rows([_length(row.gradients, device, wide) for row in rows], 1, device, wide)
    if samples is not None and watch.scale is not None:
        lengths = lengths / watch.scale.to(device, wide)
    squares = (lengths * (torch.nan if samples is None else samples)).square()
    table = torch.cat([counts[:, :1], unscaled_sums(entries), entries[:, 3:], counts[:, 1:], squares], 1)
    heads = _heads(watch, layout, device, wide)
    alive = [
        ~watch.rows[name].flat[size] if _has(watch, name, size) else torch.zeros(size, dtype=torch.bool)
        for name, sizes in layout.units.items()
        for size in sizes
    ]
    units = torch.cat([mask.to(device) for mask in alive]).to(wide) if alive else table.new_zeros(0)
    return torch.cat([table.flatten(), heads[1:].flatten()]), torch.cat([entries[:, 0], heads[0], units])


def _has(watch: ActivationWatch, name: str, size: int) -> bool:
    return name in watch.rows and size in watch.rows[name].flat


def _rows(found: Sequence[Tensor | None], width: int, device: torch.device, wide: torch.dtype) -> Tensor:
    """Stack one row each, zeros where there is none."""
    nothing = torch.zeros(width, dtype=wide, device=device)
    return (
        torch.stack([nothing if one is None else one.reshape(width) for one in found])
        if found
        else nothing.new_zeros(0, width)
    )


def _joined(calls: Sequence[Tensor], device: torch.device, wide: torch.dtype) -> Tensor | None:
    """Join the statistics of several calls."""
    if len(calls) < 2:
        return calls[0].to(device, wide) if calls else None
    return join_statistics([one.to(device, wide) for one in calls])


def _length(calls: Sequence[Tensor], device: torch.device, wide: torch.dtype) -> Tensor | None:
    if len(calls) < 2:
        return calls[0].to(device, wide) if calls else None
    return torch.linalg.vector_norm(torch.stack([one.to(device) for one in calls]).to(wide))


def _heads(watch: ActivationWatch, layout: Layout, device: torch.device, wide: torch.dtype) -> Tensor:
    """Return the largest logit, the sum of relative entropies and the number of rows of each head, ``[3, H]``."""
    columns: dict[str, Tensor] = {}
    for name, calls in watch.heads.items():
        for call in calls:
            found = call.sums.to(device, wide)
            for column, head in zip(found.unbind(1), call.heads, strict=True):
                known = columns.get(f"{name}.{head}")
                if known is not None:
                    column = torch.cat([torch.maximum(known[:1], column[:1]), known[1:] + column[1:]])
                columns[f"{name}.{head}"] = column
    nothing = torch.tensor([-torch.inf, 0.0, 0.0], dtype=wide, device=device)
    if not layout.heads:
        return nothing.new_zeros(3, 0)
    return torch.stack([columns.get(name, nothing) for name in layout.heads], 1)


def _finished(layout: Layout, sums: NDArray[Any], maxima: NDArray[Any]) -> dict[str, Table]:
    """Turn sums into readings."""
    rows, heads = len(layout.rows), len(layout.heads)
    entries, second, fourth, known, graded, gradient = sums[: _SUMS * rows].reshape(rows, _SUMS).T
    entropy, counted = sums[_SUMS * rows :].reshape(2, heads)
    largest, top, units = np.split(maxima, [rows, rows + heads])
    with np.errstate(divide="ignore", invalid="ignore"):
        is_there = np.where(entries > 0, 1.0, np.nan)
        rms = np.sqrt(second / entries)
        columns = {
            "rms": rms,
            "max": largest * is_there,
            "kurtosis": np.where(second > 0, entries * fourth / second**2, np.nan),
            "zero": 1 - known / entries,
            "gradient": np.sqrt(gradient / graded),
        }
        per_head = {"max_logit": np.where(np.isneginf(top), np.nan, top), "entropy": entropy / counted}
    found: dict[str, Table] = {f"activation/{tag}": (row, layout.rows) for tag, row in columns.items()}
    of_blocks = [name in layout.blocks for name in layout.rows]
    found["activation/residual"] = rms[of_blocks], tuple(name for name in layout.rows if name in layout.blocks)
    found["activation/saturated"] = _shares(layout, units)
    found |= {f"attention/{tag}": (row, layout.heads) for tag, row in per_head.items()}
    if np.isnan(columns["gradient"]).all():
        del found["activation/gradient"]
    return {tag: table for tag, table in found.items() if table[1]}


def _shares(layout: Layout, alive: NDArray[Any]) -> Table:
    """Return the share of flat units by activation function, in the order of the rows."""
    parts = np.split(alive, np.cumsum([sum(sizes) for sizes in layout.units.values()])[:-1]) if layout.units else []
    shares: Mapping[str, float] = {name: 1 - float(part.mean()) for name, part in zip(layout.units, parts, strict=True)}
    names = tuple(name for name in layout.rows if name in shares)
    return np.array([shares[name] for name in names]), names
