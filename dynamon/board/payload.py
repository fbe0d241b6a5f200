"""Convert a run to what the front end reads: plain JSON, arrays in base64."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamon.board.packing import packed
from dynamon.board.progress import packed_progress
from dynamon.board.summary import summarise
from dynamon.health import examine, loss_tag
from dynamon.quantities import REGISTRY
from dynamon.runs.history import RunData, Series

SCALAR_POINTS = 20_000
TABLE_POINTS = 4_000


def payload(run: RunData, name: str, loss: str | None = None, runs: int = 1) -> dict[str, Any]:
    """Pack a run for the board.

    Args:
        run: The run.
        name: Its name.
        loss: Tag of the training loss; None searches for one.
        runs: Number of runs on the page; of more than two each has a part of the points of two.

    Returns:
        ``scalars`` by tag and ``tables`` by quantity with arrays as little-endian base64: ``steps`` of both and
        ``values`` of scalars in float64, ``values`` of tables, ``[T, L]`` row by row, in float32; the original number
        of readings as ``total``; ``shown`` of the tables; ``findings``, ``checks``, ``progress`` and ``summary``,
        computed from all readings.

    Cost: about 5 bytes per value of a table. Of more than 4,000 readings of a table every k-th is packed; of more than
    20,000 points of a scalar the lowest and the highest of each bucket. A table without a single value is left out.
    """
    tag = loss or loss_tag(run.scalars)
    examined = examine(run, loss)
    part = 2 / max(runs, 2)
    tables = {key: pack_table(series, part) for key, series in run.tables.items() if not np.isnan(series.values).all()}
    return {
        "name": name,
        "last_step": run.last_step,
        "loss": tag if tag in run.scalars else None,
        "scalars": {key: pack_scalar(series, part) for key, series in run.scalars.items()},
        "tables": tables,
        "shown": display_hints(tables),
        "progress": packed_progress(run),
        "findings": [finding.as_dict() for finding in examined.findings],
        "checks": [check.as_dict() for check in examined.checks],
        "summary": {"name": name, **summarise(run, examined)},
    }


def display_hints(quantities: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return words, scale and rows of the per-layer quantities in the registry; the board works without them."""
    known = [REGISTRY[tag] for tag in quantities if tag in REGISTRY]
    return {one.tag: {"words": one.words, "scale": one.scale, "rows": one.rows} for one in known}


def pack_scalar(series: Series, part: float = 1) -> dict[str, Any]:
    """Pack a scalar with at most 20,000 points or a part of them, see :func:`payload`."""
    kept = _extremes(series.values, round(SCALAR_POINTS * part))
    return {
        "steps": packed(series.steps[kept], "<f8"),
        "values": packed(series.values[kept], "<f8"),
        "total": len(series),
    }


def pack_table(series: Series, part: float = 1) -> dict[str, Any]:
    """Pack a table with at most 4,000 readings or a part of them, see :func:`payload`."""
    stride = -(-len(series) // max(round(TABLE_POINTS * part), 1)) or 1
    return {
        "steps": packed(series.steps[::stride], "<f8"),
        "values": packed(series.values[::stride], "<f4"),
        "layers": list(series.layers or ()),
        "total": len(series),
    }


def _extremes(values: NDArray[Any], limit: int) -> NDArray[Any]:
    """Return the indices of at most ``limit`` values: lowest and highest of each bucket, NaN if one is in it."""
    limit = max(limit, 2)
    if len(values) <= limit:
        return np.arange(len(values))
    edges = np.linspace(0, len(values), limit // 2 + 1).astype(int)
    kept = [
        place
        for start, stop in zip(edges, edges[1:], strict=False)
        for place in (start + int(np.argmin(values[start:stop])), start + int(np.argmax(values[start:stop])))
    ]
    return np.unique(np.array(kept))
