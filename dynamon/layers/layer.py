"""One weight tensor of a model: its name, its role, and the matrices that it holds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamon.distributed.dtensor import is_sharded
from dynamon.layers.complex_pairs import COMPLEX, real_numel
from dynamon.quantities.names import is_chosen

ROLES = ("hidden", "embedding", "head", "conv", "vector")


@dataclass(frozen=True)
class ConvGeometry:
    """How a convolution applies its kernel; the fields are the module's arguments of the same names."""

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    transposed: bool
    padding_mode: str


@dataclass(frozen=True)
class Layer:
    """One weight tensor of a model.

    Attributes:
        name: Parameter name, the first one if the weight is tied, without the segments that ``torch.compile`` and
            checkpoint wrappers insert.
        role: ``"hidden"``, ``"embedding"``, ``"head"``, ``"conv"`` or ``"vector"``.
        parameter: The tensor itself.
        aliases: Further names of the same tensor (tied weights).
        rows_are_tokens: True for embeddings stored ``[tokens, d]``, whose linear map is the transpose.
        blocks: Number of matrices in the tensor: packed along the outputs (queries, keys and values in one, the gates
            of an LSTM), stacked along the first dimension (experts), or the groups of a convolution.
        conv: The geometry if the tensor is the weight of a convolution.
        inputs_first: True for matrices stored ``[in, out]``, as in Hugging Face's ``Conv1D``.
    """

    name: str
    role: str
    parameter: Tensor
    aliases: tuple[str, ...] = ()
    rows_are_tokens: bool = False
    blocks: int = 1
    conv: ConvGeometry | None = None
    inputs_first: bool = False

    def __repr__(self) -> str:
        """Show name, role and shape, and no weights."""
        shape = " x ".join(map(str, self.parameter.shape)) or "scalar"
        further = f", {self.blocks} blocks" if self.blocks > 1 else ""
        further += f", also {', '.join(self.aliases)}" if self.aliases else ""
        return f"Layer({self.name!r}, {self.role}, {shape}{further})"

    def matrices(self, tensor: Tensor | None = None) -> Tensor:
        """Return the matrices of the linear maps in a tensor that is stored as the weight is.

        Args:
            tensor: A gradient, a step, or any tensor of the parameter's shape; the weight itself by default.

        Returns:
            ``[blocks, out, in]``, a view if possible. A convolution gives ``[groups, out / groups, in / groups *
            prod(k)]``, its map of one patch of the input; a transposed one the same, with the kernel not flipped. An
            embedding gives ``[1, d, tokens]``, whose columns are the tokens.

        Raises:
            ValueError: If the layer is a vector.
        """
        weight = self.parameter if tensor is None else tensor
        if self.role == "vector" or weight.ndim < 2:
            raise ValueError(f"{self.name} is a vector and has no matrices.")
        if self.conv is not None:
            grouped = weight.unflatten(0, (self.conv.groups, -1))
            return (grouped.transpose(1, 2) if self.conv.transposed else grouped).flatten(2)
        if self.role == "conv":
            return weight.flatten(1).unflatten(0, (self.blocks, -1))
        if weight.ndim > 2:
            stacked = weight.flatten(0, -3)
            return stacked.mT if self._is_transposed else stacked
        return (weight.mT if self._is_transposed else weight).unflatten(0, (self.blocks, -1))

    @property
    def size(self) -> int:
        """Number of real numbers in the weight; a complex entry holds two."""
        return real_numel(self.parameter)

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """``(blocks, out, in)`` of :meth:`matrices`, without access to the weight, which may be sharded."""
        blocks, outputs, inputs = self.matrices(torch.empty(self.parameter.shape, device="meta")).shape
        return blocks, outputs, inputs

    def from_matrices(self, matrices: Tensor) -> Tensor:
        """Convert ``[blocks, out, in]`` to the stored shape; the inverse of :meth:`matrices`."""
        shape = self.parameter.shape
        if self.conv is not None and self.conv.transposed:
            groups, outputs = matrices.shape[:2]
            return matrices.reshape(groups, outputs, -1, *shape[2:]).transpose(1, 2).reshape(shape)
        if self.role == "conv":
            return matrices.reshape(shape)
        if len(shape) > 2:
            return (matrices.mT if self._is_transposed else matrices).reshape(shape)
        joined = matrices.flatten(0, 1)
        return joined.mT if self._is_transposed else joined

    @property
    def _is_transposed(self) -> bool:
        return self.rows_are_tokens or self.inputs_first


def layer_table(layers: Iterable[Layer]) -> str:
    """Format layers as a table.

    Args:
        layers: The layers, one line each.

    Returns:
        Aligned columns: name, role, shape, blocks if there are several, aliases.

    Example:
        >>> import torch
        >>> from dynamon.layers import describe_layers, layer_table
        >>> print(layer_table(describe_layers(torch.nn.Linear(4, 2))))
        name    role    shape  blocks  aliases
        weight  head    2 x 4
        bias    vector  2
    """
    rows = [("name", "role", "shape", "blocks", "aliases")]
    for layer in layers:
        shape = " x ".join(map(str, layer.parameter.shape)) or "scalar"
        blocks = str(layer.blocks) if layer.blocks > 1 else ""
        rows.append((layer.name, layer.role, shape, blocks, ", ".join(layer.aliases)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def is_measurable(layer: Layer) -> bool:
    """Return whether a layer holds real or complex numbers; integers and eight-bit floats are not measured."""
    weight = layer.parameter
    if weight.is_complex():
        return weight.dtype in COMPLEX and not is_sharded(weight)
    return weight.is_floating_point() and weight.element_size() > 1


def is_steerable(layer: Layer) -> bool:
    """Return whether rules for learning rates can handle a layer; they cannot if it is complex."""
    return is_measurable(layer) and not layer.parameter.is_complex()


def select(layers: Iterable[Layer], patterns: Sequence[str] | None) -> list[Layer]:
    """Keep the layers that match globs.

    Args:
        layers: What to choose from.
        patterns: Globs on names and aliases (``"blocks.*.attn.*"``); one that begins with ``!`` excludes. If all
            exclude, everything else is kept. None keeps all.

    Returns:
        The chosen layers in their order.

    Example:
        >>> import torch
        >>> from dynamon.layers import describe_layers, select
        >>> select(describe_layers(torch.nn.Linear(4, 2)), ["!*bias"])
        [Layer('weight', head, 2 x 4)]
    """
    layers = list(layers)
    if patterns is None:
        return layers
    return [layer for layer in layers if is_chosen((layer.name, *layer.aliases), patterns)]
