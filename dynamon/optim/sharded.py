"""Tensors that several processes hold in parts (DTensor), seen as the part here and as the whole."""

from typing import Any

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; told without importing them, which takes half a second and not every build can."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """The part that this process holds, sharing its memory; a plain tensor is its own part."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local_as(tensor: Tensor, like: Tensor) -> Tensor:
    """The part of ``tensor`` that belongs to this process where it is laid out as ``like``.

    Args:
        tensor: A gradient, or another tensor of the shape of ``like``, laid out in any way.
        like: A parameter.

    Cost: none where the layouts agree, as they do under FSDP2.
    """
    if not is_sharded(like):
        return tensor
    placements: Any = like.placements  # type: ignore[attr-defined]
    if getattr(tensor, "placements", None) != placements:
        tensor = tensor.redistribute(placements=placements)  # type: ignore[attr-defined]
    return local(tensor)


def whole(part: Tensor, like: Tensor) -> Tensor:
    """The whole tensor, on every process, from the parts that each holds of it.

    Args:
        part: What this process holds, as :func:`local` gives it.
        like: The tensor that it is laid out as; for a plain tensor the part is the whole.

    Cost: one all-gather; every process must call it.
    """
    return _layout(part, like, like.placements).full_tensor() if is_sharded(like) else part  # type: ignore[attr-defined]


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """What belongs to this process of a tensor that every process has as a whole; the inverse of :func:`whole`.

    Args:
        tensor: The whole tensor, the same on every process.
        like: The tensor whose layout counts.

    Cost: no communication.
    """
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import Replicate

    everywhere = [Replicate()] * like.device_mesh.ndim  # type: ignore[attr-defined]
    placements = like.placements  # type: ignore[attr-defined]
    return local(_layout(tensor, like, everywhere).redistribute(placements=placements))


def _layout(part: Tensor, like: Any, placements: Any) -> Any:
    return type(like).from_local(
        part, like.device_mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
    )
