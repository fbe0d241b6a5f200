"""Rounding of float32 products under the user's settings, which bounds must allow for."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# The last bit of 10 and of 7 bits of mantissa; tensor cores may truncate.
_ROUNDINGS = {"tf32": 2.0**-10, "bf16": 2.0**-8}
_OF_FLOAT32 = (torch.float32, torch.complex64)
_SPARE = 4  # the errors of Gram iteration's steps add up to twice the first one's, and not all are along the maximum


def product_rounding(matrix: Tensor) -> float:
    """Return the relative rounding that products apply to entries of a matrix like this; 0 in its own dtype.

    TensorFloat-32 keeps 10 bits of mantissa (``torch.set_float32_matmul_precision("high")`` on a GPU). On a CPU the
    same setting permits bfloat16 or TensorFloat-32 units; their use is assumed.

    Args:
        matrix: A tensor with the dtype and device in question.
    """
    return _rounding(matrix, "matmul")


def convolution_rounding(kernel: Tensor) -> float:
    """Return the same for convolutions, which GPUs compute in TensorFloat-32 by default."""
    return _rounding(kernel, "conv")


def product_allowance(matrix: Tensor) -> float:
    """Return by how much such products can change a largest singular value, relative: four roundings.

    Entries rounded towards zero lower it by one rounding in the first product, and by half of that at each further step
    of Gram iteration; the rest is for roundings of either sign.
    """
    return _SPARE * product_rounding(matrix)


def _rounding(tensor: Tensor, kind: str) -> float:
    if tensor.dtype not in _OF_FLOAT32 or tensor.device.type not in ("cpu", "cuda"):
        return 0.0
    return _of_setting(tensor.device.type, kind)


def _of_setting(device: str, kind: str) -> float:
    backends: Any = torch.backends  # torch's own types lack the parts below
    if device == "cuda":
        chosen = backends.cuda.matmul.fp32_precision if kind == "matmul" else backends.cudnn.conv.fp32_precision
    else:
        chosen = backends.mkldnn.matmul.fp32_precision if kind == "matmul" else backends.mkldnn.conv.fp32_precision
    return _ROUNDINGS.get(chosen, 0.0)


# What torch.compiler.assume_constant_result does, without importing the compiler: settings are read when it compiles.
_of_setting._dynamo_marked_constant = True  # type: ignore[attr-defined]


def own_dtype(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which autocast does not turn products of float32 into half precision."""
    kind = tensor.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)
