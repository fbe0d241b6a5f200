"""The type of arrays on the host."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
