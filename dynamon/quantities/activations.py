"""Statistics of what a module returns, and the parts of activation functions that are flat."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_INF = float("inf")
# Below the first and above the second input the slope is less than 1 % of the steepest one (GELU: in its exact form).
FLAT: dict[str, tuple[float, float]] = {
    "relu": (0.0, _INF),
    "relu6": (0.0, 6.0),
    "hardtanh": (-1.0, 1.0),
    "hardsigmoid": (-3.0, 3.0),
    "hardswish": (-3.0, _INF),
    "sigmoid": (-5.9864, 5.9864),
    "tanh": (-2.9932, 2.9932),
    "softsign": (-9.0, 9.0),
    "gelu": (-3.0217, _INF),
    "silu": (-6.1429, _INF),
    "mish": (-6.1588, _INF),
    "elu": (-4.6052, _INF),
    "selu": (-4.6052, _INF),
    "celu": (-4.6052, _INF),
    "softplus": (-4.5951, _INF),
    "logsigmoid": (-_INF, 4.5951),
    "leaky_relu": (-_INF, _INF),
    "prelu": (-_INF, _INF),
}


def flat_part(function: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> tuple[float, float]:
    """Return the inputs below and above which an activation function is flat.

    Args:
        function: Its name, a key of :data:`FLAT`.
        args: Its arguments after the input, as ``torch.nn.functional`` takes them.
        kwargs: Its other arguments.

    Returns:
        Two inputs. Above the second, and at or below the first, the slope is less than 1 % of the steepest one.

    Example:
        >>> from dynamon.quantities.activations import flat_part
        >>> flat_part("hardtanh", (0.0, 6.0)), flat_part("softplus", kwargs={"beta": 2.0})
        ((0.0, 6.0), (-2.29755, inf))
    """
    low, high = FLAT[function]
    names = {"hardtanh": ("min_val", "max_val"), "softplus": ("beta",), "celu": ("alpha",)}.get(function, ())
    given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
    if function == "hardtanh":
        return float(given.get("min_val", low)), float(given.get("max_val", high))
    if function == "softplus":
        return low / float(given.get("beta", 1.0)), high
    return low * float(given.get("alpha", 1.0)) if function == "celu" else low, high


def flat_units(inputs: Tensor, bounds: tuple[float, float], dim: int) -> Tensor:
    """Tell which units of an activation function are on its flat part for every entry.

    Args:
        inputs: The inputs of the function, floating point.
        bounds: What :func:`flat_part` returns.
        dim: The dimension of the units (channels or features).

    Returns:
        ``[C]``, bool, on the device of the inputs.

    Cost: one pass, some four calls; a copy of the inputs in one byte an entry, two where the function is flat on either
    side. No host synchronisation.

    Example:
        >>> import torch
        >>> from dynamon.quantities.activations import flat_units
        >>> flat_units(torch.tensor([[-1.0, 2.0], [-3.0, -4.0]]), (0.0, float("inf")), dim=1)
        tensor([ True, False])
    """
    low, high = bounds
    is_flat = inputs <= low
    if high < _INF:
        is_flat |= inputs >= high
    others = [i for i in range(inputs.ndim) if i != dim % inputs.ndim]
    return is_flat.all(others) if others else is_flat


def entry_statistics(output: Tensor) -> Tensor:
    r"""Sum up the entries of a tensor, in parts of the largest so that powers neither overflow nor vanish.

    Args:
        output: A real floating point tensor with at least one entry.

    Returns:
        ``[4]`` in float32, or float64 for float64, on its device: :math:`m = \max |x|`, :math:`\sum (x / m)^2`,
        :math:`\sum (x / m)^4` (zeros where m is zero) and the number of entries that are not zero (rounded to
        float32). NaN propagates, and where an entry is infinite the sums are NaN.

    Cost: ten calls, eleven for half precision; one copy in float32 at a time. No host synchronisation.

    Example:
        >>> import torch
        >>> from dynamon.quantities.activations import entry_statistics
        >>> entry_statistics(torch.tensor([0.0, -2.0, 1.0]))
        tensor([2.0000, 1.2500, 1.0625, 2.0000])
    """
    with torch.no_grad():
        wide = output.detach().to(torch.promote_types(output.dtype, torch.float32))
        low, high = torch.aminmax(wide)
        top = torch.maximum(-low, high)
        known = torch.count_nonzero(wide)
        scale = _divisor(top)
        squares = (wide.div_(scale) if wide.dtype != output.dtype else wide / scale).square_()
        second = squares.sum()
        fourth = squares.square_().sum()
        return torch.stack([top, second, fourth, known.to(second.dtype)])


def join_statistics(calls: Sequence[Tensor]) -> Tensor:
    """Join what :func:`entry_statistics` returns of several tensors, ``[4]`` each, to that of all their entries."""
    top, second, fourth, known = torch.stack(list(calls)).unbind(1)
    largest = top.amax()
    parts = (_divisor(top) / _divisor(largest)).square()
    return torch.stack([largest, (second * parts).sum(), (fourth * parts.square()).sum(), known.sum()])


def unscaled_sums(statistics: Tensor) -> Tensor:
    r"""Return :math:`\sum x^2` and :math:`\sum x^4`, ``[R, 2]``, from R results of :func:`entry_statistics`."""
    squares = _divisor(statistics[:, :1]).square()
    return statistics[:, 1:3] * torch.cat([squares, squares.square()], 1)


def _divisor(top: Tensor) -> Tensor:
    """Return the number itself, or where that is zero or subnormal the least normal one."""
    return top.clamp_min(torch.finfo(torch.float32).tiny)


def measurable(value: Any) -> Tensor | None:
    """Return the first tensor in what a module takes or returns that has statistics; None where there is none.

    Searched are tensors, and the entries of tuples, lists and mappings (outputs of Hugging Face's models are mappings).
    Left out are integers, complex and sparse tensors, nested ones, scalars and tensors without entries.

    Example:
        >>> import torch
        >>> from dynamon.quantities.activations import measurable
        >>> measurable({"ids": torch.arange(3), "states": (torch.ones(2, 3),)}).shape
        torch.Size([2, 3])
    """
    if isinstance(value, Tensor):
        fits = value.is_floating_point() and value.layout is torch.strided and not value.is_nested
        return value if fits and value.ndim and value.numel() else None
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return next((found for entry in value if (found := measurable(entry)) is not None), None)
    return None


def layer_states(module: nn.Module, output: Any) -> Sequence[Tensor]:
    """Return the last states of each layer of a recurrent module of several: its output is that of the last one.

    Example:
        >>> import torch
        >>> from dynamon.quantities.activations import layer_states
        >>> lstm = torch.nn.LSTM(3, 5, num_layers=2, bidirectional=True)
        >>> [state.shape for state in layer_states(lstm, lstm(torch.ones(7, 4, 3)))]
        [torch.Size([2, 4, 5]), torch.Size([2, 4, 5])]
    """
    if not isinstance(module, nn.RNNBase) or module.num_layers < 2:
        return ()
    states = measurable(output[1])  # of an LSTM those that its gates let out; cells come second
    return () if states is None else states.unflatten(0, (module.num_layers, -1)).unbind()
