"""Quantities that follow from sums over entries: whole, in pieces, complex, empty, and in shards."""

import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from dynamon.distributed.ranks import Ranks
from dynamon.layers import describe_layers
from dynamon.quantities import Quantity, Scope
from dynamon.quantities.entrywise import _PIECE, entrywise_readings
from dynamon.quantities.registry import Entrywise
from tests.processes import in_processes

pytestmark = [pytest.mark.timeout(60)]


def quantity(name: str, *arguments) -> Quantity:
    return Quantity(f"mine/{name}", name, "none", scope=Scope.PER_LAYER, words=name, entrywise=Entrywise(*arguments))


def added(tensors) -> torch.Tensor:
    return torch.stack([tensor.sum() for tensor in tensors])


MEAN = quantity("mean", 1, lambda tensors: (added(tensors),), lambda sizes, total: total / sizes)
SPREAD = quantity(
    "variance",
    2,
    lambda tensors: (added(tensors), added([tensor.square() for tensor in tensors])),
    lambda sizes, total, squares: squares / sizes - (total / sizes).square(),
)


class Weights(nn.Module):
    def __init__(self, *tensors: torch.Tensor) -> None:
        super().__init__()
        self.own = nn.ParameterList(nn.Parameter(tensor) for tensor in tensors)


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=dtype)


def truth(tensors: list[torch.Tensor]) -> torch.Tensor:
    wide = [(torch.view_as_real(t) if t.is_complex() else t).double() for t in tensors]
    return torch.stack([torch.stack([w.mean() for w in wide]), torch.stack([w.var(correction=0) for w in wide])])


def test_whole_weights_of_several_dtypes_and_pieces() -> None:
    large = drawn(3, _PIECE // 2 + 5)
    tensors = [large, drawn(4).half() * 100, drawn(5, 2, dtype=torch.complex64), 1e25 * drawn(7, 3), torch.zeros(2)]
    found = entrywise_readings(describe_layers(Weights(*tensors)), [MEAN, SPREAD])
    assert found.dtype == torch.float32 and found.shape == (2, 5)
    expected = truth(tensors)
    torch.testing.assert_close(found[0], expected[0].float(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found[1, [0, 1, 2, 4]], expected[1, [0, 1, 2, 4]].float(), rtol=1e-5, atol=0)
    assert math.isinf(found[1, 3])  # beyond float32
    assert entrywise_readings(describe_layers(Weights(*tensors)), []).shape == (0, 5)


def test_weights_are_left_as_they_are() -> None:
    layers = describe_layers(Weights(drawn(3, 2)))
    before = layers[0].parameter.detach().clone()
    assert not entrywise_readings(layers, [MEAN]).requires_grad
    assert torch.equal(layers[0].parameter, before) and layers[0].parameter.grad is None


def check_shards(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    tensors = [drawn(5, 3), drawn(1), drawn(4, 2, dtype=torch.float64)]
    places = [(Shard(0),), (Shard(0),), (Replicate(),)]
    cut = [distribute_tensor(t.clone(), mesh, place) for t, place in zip(tensors, places, strict=True)]
    ranks = Ranks(torch.device("cpu"))
    with ranks.collective_section():
        found = entrywise_readings(describe_layers(Weights(*cut)), [MEAN, SPREAD], ranks)
    torch.testing.assert_close(found, truth(tensors).float(), rtol=1e-6, atol=1e-7)


def test_shards_of_different_sizes_and_copies() -> None:
    in_processes(check_shards, 2, group=True)
