"""``torch.set_default_device``: numbers of the host stay there, and nothing lands on another device by itself.

Played with ``meta``, whose tensors hold nothing: whoever computes with one fails.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dynamon.curvature import (
    EigenTracker,
    GGNOperator,
    HessianOperator,
    batch_sharpness,
    blockwise_sharpness,
    critical_sharpness,
    directional_sharpness,
    eigenspace_share,
    norm_sharpness,
    spectral_density,
    top_eigenvalues,
    trace,
)
from dynamon.curvature.operators.preconditioner import preconditioned, preconditioner
from dynamon.distributed.ranks import Ranks
from dynamon.isolation.batches import batch_weight, clone
from dynamon.isolation.preserve import preserve_state
from dynamon.isolation.samples import take_samples
from dynamon.isolation.saved_batches import pack_batch, unpack_batch
from dynamon.isolation.side_effects import external_state
from dynamon.stability import stability_ratio
from tests.helpers import batches, mlp

HOST = torch.device("cpu")


class Subject:
    """A network, a batch and an optimizer that has taken a step."""

    def __init__(self, kind: str = "adam") -> None:
        self.network = mlp(dropout=0.2)
        self.x, self.y = next(iter(batches()))
        self.params = dict(self.network.named_parameters())
        kinds: dict[str, Any] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
        self.optimizer = kinds[kind](self.network.parameters(), lr=1e-2)
        self.loss().backward()
        self.optimizer.step()
        self.step = -1e-2 * torch.cat([p.grad.flatten() for p in self.network.parameters()])

    def loss(self) -> Tensor:
        return cross_entropy(self.network(self.x), self.y)

    def hessian(self, backend: str = "auto") -> HessianOperator:
        return HessianOperator(self.loss, self.params, backend=backend)

    def ggn(self) -> GGNOperator:
        return GGNOperator(lambda: self.network(self.x), lambda z: cross_entropy(z, self.y), self.params)

    def solve(self, **arguments: Any) -> Tensor:
        found = top_eigenvalues(self.hessian(), **arguments)
        assert found.residuals.device == HOST
        return found.values

    def tracked(self) -> Tensor:
        tracker = EigenTracker(k=2)
        tracker.update(self.hessian())
        return tracker.update(self.hessian()).values

    def preconditioned(self) -> Tensor:
        diagonal = preconditioner(self.optimizer, self.params)
        return top_eigenvalues(preconditioned(self.hessian(), diagonal)).values

    def in_norms(self) -> float:
        product = directional_sharpness(self.hessian(), self.step).product
        pieces = [piece.flatten() for piece in self.step.split([p.numel() for p in self.params.values()])]
        return norm_sharpness(product, pieces, {name: lambda d: d.abs().max() for name in self.params}).sharpness

    def in_scipy(self) -> Any:
        return self.hessian().to_scipy() @ np.ones(self.hessian().shape[0])

    def put_back(self) -> float:
        with preserve_state(self.network, seed=3):
            external_state(self.network)
            return float(self.loss().detach())


SUBJECTS: dict[str, Callable[[Subject], Any]] = {
    "lanczos": lambda s: s.solve(k=2, tol=1e-3),
    "certified": lambda s: s.solve(certify=True),
    "power": lambda s: s.solve(method="power"),
    "gram": lambda s: top_eigenvalues(s.ggn(), method="gram").values,
    "tracked": lambda s: s.tracked(),
    "differences": lambda s: s.hessian("finite_difference").product_error(s.step),
    "blocks": lambda s: blockwise_sharpness(s.hessian(), {"all": "*"})["all"].values,
    "density": lambda s: spectral_density(s.hessian(), steps=5, num_vectors=2).mean,
    "trace": lambda s: trace(s.hessian(), num_vectors=3).value,
    "directional": lambda s: directional_sharpness(s.hessian(), s.step).sharpness,
    "own norms": lambda s: s.in_norms(),
    "batch": lambda s: batch_sharpness([s.hessian()]),
    "critical": lambda s: critical_sharpness(s.loss, s.params, s.step, rate=1e-2).multiple,
    "share": lambda s: eigenspace_share(top_eigenvalues(s.hessian()).vectors, s.step),
    "preconditioned": lambda s: s.preconditioned(),
    "ratio of Adam": lambda s: stability_ratio(s.loss, s.params, s.optimizer).values,
    "scipy": lambda s: s.in_scipy(),
    "put back": lambda s: s.put_back(),
    "ranks": lambda s: Ranks(HOST, alone=True).sum_or_nan(lambda: s.step[:2], 2),
}


@pytest.mark.parametrize("name", SUBJECTS)
def test_curvature_under_another_default_device(name: str) -> None:
    torch.manual_seed(0)
    subject = Subject()
    torch.manual_seed(1)
    wanted = SUBJECTS[name](subject)
    torch.manual_seed(1)
    with torch.device("meta"):
        found = SUBJECTS[name](subject)
    if isinstance(found, Tensor):
        assert found.device == HOST
    np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=1e-4)


def test_the_stability_ratio_of_plain_descent() -> None:
    subject = Subject("sgd")
    with torch.device("meta"):
        assert stability_ratio(subject.loss, subject.params, subject.optimizer).values.device == HOST


BATCHES: dict[str, Callable[[], Any]] = {
    "tensors": lambda: {"x": torch.ones(8, 3), "y": torch.arange(8)},
    "sparse": lambda: [torch.eye(8).to_sparse(), torch.ones(8)],
    "nested": lambda: [torch.nested.nested_tensor([torch.ones(i + 1) for i in range(8)]), torch.ones(8)],
    "arrays": lambda: [torch.ones(8, 2), np.ones(8)],
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", BATCHES)
def test_batches_stay_where_they_are(name: str) -> None:
    batch = BATCHES[name]()
    with torch.device("meta"):
        part = take_samples(batch, 0.5, sizes=(8,))
        state = pack_batch(part.batch)
        assert part.samples == 4 and state is not None and state["structure"].device == HOST
        again = unpack_batch(state, HOST, batch)
        copied = clone(again)
    parts = copied.values() if isinstance(copied, dict) else copied
    assert all(t.device == HOST for t in parts if isinstance(t, Tensor))


@pytest.mark.parametrize("mask", [torch.ones(4), [1.0, 3.0], np.ones(4), 4])
def test_weights_of_batches(mask: Any) -> None:
    with torch.device("meta"):
        assert batch_weight({"mask": mask}, "mask") == 4


def test_a_model_on_the_host_stays_there() -> None:
    with torch.device("meta"):
        module = nn.Linear(2, 2, device="cpu")
        with preserve_state(module, seed=1):
            module(torch.ones(1, 2, device="cpu"))
    assert module.weight.device == HOST
