"""Pack arrays for the board: base64, or lists that JSON can hold."""

import base64
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray


def packed(values: NDArray[Any], kind: str) -> str:
    """Return an array as base64, row by row in a dtype such as ``"<f4"``; beyond float32 it is infinite there."""
    with np.errstate(over="ignore"):
        return base64.b64encode(np.ascontiguousarray(values, dtype=kind).tobytes()).decode()


def numbers(values: NDArray[Any]) -> list[float | None]:
    """Return an array as numbers, None where one is not finite."""
    return [value if math.isfinite(value) else None for value in values.tolist()]
