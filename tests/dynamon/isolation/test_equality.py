"""Comparing many tensors at one wait."""

import math

import pytest
import torch
from torch import nn

from dynamon.isolation import equality
from dynamon.isolation.equality import clone_tensors, find_changed
from dynamon.isolation.preserve import preserve_state
from tests.launches import Launches
from tests.models import cnn

TENSORS = {
    "float32": torch.randn(3, 4),
    "float64": torch.randn(5).double(),
    "bfloat16": torch.randn(2, 3).bfloat16(),
    "float16": torch.randn(2, 3).half(),
    "tiny": torch.full((3,), 1e-45),
    "integers": torch.arange(6),
    "bool": torch.tensor([True, False]),
    "complex": torch.randn(3, dtype=torch.complex64),
    "scalar": torch.tensor(2.0),
    "empty": torch.empty(0, 3),
    "strided": torch.randn(4, 6)[:, ::2],
    "sparse": torch.eye(3).to_sparse(),
    "parameter": nn.Parameter(torch.randn(4)),
}


@pytest.fixture(params=[False, True], ids=["host", "device"])
def anywhere(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(equality, "reads_are_free", lambda device: False)
        monkeypatch.setattr(equality, "_AT_ONCE", 20)


def changed(tensor):
    other = tensor.detach().clone()
    if tensor.dtype is torch.bool:
        return ~other
    if tensor.layout is torch.sparse_coo:
        return 2 * other
    other.view(-1)[-1] = 0 if tensor.numel() else math.nan
    return other


@pytest.mark.usefixtures("anywhere")
@torch.no_grad()
def test_each_is_compared_in_its_own_way():
    assert not any(find_changed([(t, t.clone()) for name, t in TENSORS.items() if name != "sparse"]))
    found = dict(
        zip(TENSORS, find_changed([(t, changed(t) if t.numel() else t) for t in TENSORS.values()]), strict=True)
    )
    assert found == {name: tensor.numel() > 0 for name, tensor in TENSORS.items()}


@pytest.mark.usefixtures("anywhere")
def test_shapes_dtypes_and_nan():
    ones, nan = torch.ones(3), torch.tensor([1.0, math.nan])
    pairs = [(ones, torch.ones(4)), (ones, ones.double()), (nan, nan.clone()), (ones, ones.clone())]
    assert find_changed(pairs) == [True, True, True, False] and find_changed([]) == []


@pytest.mark.usefixtures("anywhere")
def test_views_of_one_memory_are_put_back_together():
    """A buffer and a view of it that another module holds: what is rewound comes back in both."""
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    memory = torch.zeros(4)
    module[0].register_buffer("one", memory)
    module[1].register_buffer("other", memory[:2])
    with preserve_state(module):
        memory += 1
    assert not memory.any()


def test_putting_a_network_back_waits_once(monkeypatch):
    monkeypatch.setattr(equality, "reads_are_free", lambda device: False)
    network, x = cnn(), torch.randn(4, 2, 6, 6)
    with Launches() as launches:
        with preserve_state(network, seed=1):
            assert launches.calls["clone.default"] == 0 and launches.calls["_foreach_copy_.default"] == 2  # by dtype
            network(x)
            launches.reset()
        assert launches.waits == 0 and launches.calls["_foreach_norm.Scalar"] == 1
        assert launches.total < 30, launches


def test_a_sparse_buffer_is_put_back():
    module = nn.Linear(2, 2)
    module.register_buffer("graph", torch.eye(3).to_sparse())
    with preserve_state(module):
        module.graph.mul_(2)
    assert torch.equal(module.graph.to_dense(), torch.eye(3))


@pytest.mark.usefixtures("anywhere")
def test_copies_share_nothing_and_have_no_graph():
    found = dict(zip(TENSORS, clone_tensors(list(TENSORS.values())), strict=True))
    for name, tensor in TENSORS.items():
        other = found[name]
        assert other.dtype is tensor.dtype and not other.requires_grad and type(other) is torch.Tensor
        if tensor.layout is torch.strided:
            assert torch.equal(other, tensor) and (not tensor.numel() or other.data_ptr() != tensor.data_ptr())
    assert clone_tensors([]) == []
