"""The counter of device calls itself."""

import torch

from dynamon.layers import measurable_layers
from tests.launches import Launches, fill_gradients, gpt2


def test_views_metadata_and_allocations_are_free():
    x = torch.randn(4, 6)
    with Launches() as launches:
        torch.empty_like(x.mT[1:].reshape(5, 4)[None].expand(2, 5, 4).detach())
        x.split(2), x.unbind(), x.view(-1)[3:], x.flatten(), x.to(torch.float32), x.unsqueeze(0).squeeze(0)
    assert launches.total <= 1, launches  # the reshape of a transposed tensor copies it
    with Launches() as launches:
        x.add_(1).mul(2).sum()
        x.to(torch.float64), x.clone(), x.zero_()
    assert launches.total == 6, launches


def test_a_foreach_call_is_one_and_another_device_s_are_left_out():
    many, there = [torch.ones(3) for _ in range(20)], [torch.ones(3, device="meta") for _ in range(20)]
    with Launches(device="meta") as launches:
        torch._foreach_mul_(many, 2.0)
        torch._foreach_mul_(there, 2.0)
    assert launches.calls == {"_foreach_mul_.Scalar": 1}


def test_waits_are_counted():
    x = torch.ones(3)
    with Launches() as launches:
        x.sum().item()
        bool((x > 0).all())
        x.nonzero()
    assert launches.waits == 3, launches
    launches.reset()
    assert launches.total == launches.waits == 0


def test_gpt2_has_148_tensors_and_124_million_entries():
    model = gpt2("meta")
    fill_gradients(model)
    layers = measurable_layers(model)
    assert len(layers) == 148 and sum(la.size for la in layers) == 124_439_808
    small = gpt2("cpu", scale=48)
    fill_gradients(small)
    assert small(torch.zeros(2, 5, dtype=torch.int64)).shape == (2, 5, 1047)
