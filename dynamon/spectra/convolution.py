"""Bounds on the spectral norm of convolutions as linear maps of whole inputs."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dynamon.distributed.dtensor import holders_section, to_local
from dynamon.distributed.ranks import Ranks
from dynamon.distributed.work_sharing import share_work
from dynamon.kernels import conv_gram_iteration
from dynamon.layers import ConvGeometry, Layer


def convolution_bounds(layer: Layer, input_size: int | tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    r"""Bound the spectral norm of a convolution layer, :math:`\max_x \|k * x\| / \|x\|`.

    It differs from the largest singular value ``sigma`` of the flattened kernel, which acts on one patch of the input:
    for zero padding it lies between ``sigma`` and ``sqrt(prod(k)) sigma``. A transposed convolution has the norm of the
    convolution whose adjoint it is; their flattenings differ.

    Args:
        layer: A layer with a :class:`dynamon.layers.ConvGeometry`: stride, dilation, groups and padding count.
        input_size: Spatial size of the input (of the output for a transposed convolution). None gives the
            supremum over all sizes, for which zero padding does not matter.

    Returns:
        ``(lower, upper)``, 0-d, in float32 (float64 for float64); NaN where the kernel contains NaN or infinity. The
        upper one can serve as a regulariser.

    Raises:
        ValueError: If the layer is not a convolution, pads by reflection or replication, or pads one side of a given
            size more than the other (``padding="same"`` with an even kernel).

    Cost: that of :func:`dynamon.kernels.conv_gram_iteration`: six Gram steps at each of some hundred frequencies.
    References: Delattre et al., arXiv 2305.16173 and 2402.00240.
    """
    geometry = layer.conv
    if geometry is None:
        raise ValueError(f"{layer.name} is not the weight of a convolution, so it has no norm as one.")
    if not has_bounds(layer):
        raise ValueError(
            f"{layer.name} pads by {geometry.padding_mode!r}; bounds are known for 'zeros' and 'circular'."
        )
    weight, zeros = layer.parameter, geometry.padding_mode == "zeros"
    return conv_gram_iteration(
        weight,
        input_size,
        padding=0 if zeros and input_size is None else _padding(layer, geometry),
        padding_mode=geometry.padding_mode,
        stride=geometry.stride,
        dilation=geometry.dilation,
        groups=geometry.groups,
    )


def layer_convolution_bounds(layers: Sequence[Layer], ranks: Ranks | None = None) -> tuple[list[str], Tensor]:
    """Return names and bounds ``[2, N]`` of the norms of the N convolutions among some layers, for inputs of any size.

    Args:
        layers: The layers, on one device; those that are no convolutions, or pad by reflection, are passed over.
        ranks: As for :func:`dynamon.quantities.weights.layer_spectra`.

    Cost: that of :func:`convolution_bounds` for each: a second and more for a few hundred channels on a CPU.
    """
    chosen = [layer for layer in layers if has_bounds(layer)]
    if not chosen:
        return [], torch.empty(2, 0)
    likes = [layer.parameter for layer in chosen]

    def measure(own: list[int], wholes: list[Sequence[Tensor]]) -> Tensor:
        convolutions = [replace(chosen[i], parameter=tensors[0]) for i, tensors in zip(own, wholes, strict=True)]
        return torch.stack([torch.stack(convolution_bounds(layer)).float() for layer in convolutions], 1)

    shards, costs = [[to_local(like)] for like in likes], [float(like.numel()) for like in likes]
    with torch.no_grad(), holders_section(likes, ranks) as holding:
        group = ranks or holding
        table = group.sum(share_work(measure, shards, likes, costs, 2, group))
    return [layer.name for layer in chosen], table.float()


def has_bounds(layer: Layer) -> bool:
    """Return whether :func:`convolution_bounds` knows this kind of layer."""
    return layer.conv is not None and layer.conv.padding_mode in ("zeros", "circular")


def _padding(layer: Layer, geometry: ConvGeometry) -> tuple[int, ...]:
    if not isinstance(geometry.padding, str):
        return geometry.padding
    spans = [d * (k - 1) for d, k in zip(geometry.dilation, layer.parameter.shape[2:], strict=True)]
    if geometry.padding == "valid":
        return (0,) * len(spans)
    if any(span % 2 for span in spans):
        raise ValueError(
            f"{layer.name} pads one side more than the other; leave input_size out for a bound of any size."
        )
    return tuple(span // 2 for span in spans)
