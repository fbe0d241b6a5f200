"""A run as the front end takes it: plain JSON, arrays in base64."""

import base64
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamon.health import findings, loss_tag
from dynamon.quantities import REGISTRY
from dynamon.runs.history import RunData, Series

SCALAR_POINTS = 20_000
TABLE_POINTS = 4_000


def payload(run: RunData, name: str, loss: str | None = None) -> dict[str, Any]:
    """Pack a run for the board.

    Args:
        run: What is known of it.
        name: What to call it.
        loss: Tag of the training loss; None looks for one.

    Returns:
        ``scalars`` by tag and ``tables`` by quantity with arrays as little-endian base64: ``steps`` of both and
        ``values`` of scalars in float64, ``values`` of tables, ``[T, L]`` row by row, in float32; the number of
        readings there were as ``total``; ``shown`` of the tables; ``findings``, taken from all of them.

    Cost: about 5 bytes a value of a table. Beyond 4,000 readings every so many-th of a table is packed; of more than
    20,000 points of a scalar the lowest and the highest of each bucket. A table without a single value is left out.
    """
    tag = loss or loss_tag(run.scalars)
    tables = {key: pack_table(series) for key, series in run.tables.items() if not np.isnan(series.values).all()}
    return {
        "name": name,
        "last_step": run.last_step,
        "loss": tag if tag in run.scalars else None,
        "scalars": {key: pack_scalar(series) for key, series in run.scalars.items()},
        "tables": tables,
        "shown": display_hints(tables),
        "findings": [finding.as_dict() for finding in findings(run, loss)],
    }


def display_hints(quantities: Iterable[str]) -> dict[str, dict[str, str]]:
    """Give the words and the scale of those per-layer quantities that the registry has; the board does without."""
    return {tag: {"words": REGISTRY[tag].words, "scale": REGISTRY[tag].scale} for tag in quantities if tag in REGISTRY}


def pack_scalar(series: Series) -> dict[str, Any]:
    """A scalar of at most 20,000 points, see :func:`payload`."""
    kept = _extremes(series.values, SCALAR_POINTS)
    return {
        "steps": _packed(series.steps[kept], "<f8"),
        "values": _packed(series.values[kept], "<f8"),
        "total": len(series),
    }


def pack_table(series: Series) -> dict[str, Any]:
    """A table of at most 4,000 readings, see :func:`payload`."""
    stride = -(-len(series) // TABLE_POINTS) or 1
    return {
        "steps": _packed(series.steps[::stride], "<f8"),
        "values": _packed(series.values[::stride], "<f4"),
        "layers": list(series.layers or ()),
        "total": len(series),
    }


def _extremes(values: NDArray[Any], limit: int) -> NDArray[Any]:
    """Indices of at most ``limit`` values: the lowest and the highest of each bucket, NaN where one is in it."""
    if len(values) <= limit:
        return np.arange(len(values))
    edges = np.linspace(0, len(values), limit // 2 + 1).astype(int)
    kept = [
        place
        for start, stop in zip(edges, edges[1:], strict=False)
        for place in (start + int(np.argmin(values[start:stop])), start + int(np.argmax(values[start:stop])))
    ]
    return np.unique(np.array(kept))


def _packed(values: NDArray[Any], kind: str) -> str:
    with np.errstate(over="ignore"):  # beyond float32 is infinite there
        return base64.b64encode(np.ascontiguousarray(values, dtype=kind).tobytes()).decode()
