"""How many calls to a device curvature takes on GPT-2 124M's tensors: each costs a GPU's host some microseconds."""

import pytest
import torch
from torch.nn import functional as F

from dynamon.curvature import HessianOperator, critical_sharpness, directional_sharpness, top_eigenvalues
from dynamon.curvature.operators import parameters as curvature_parameters
from dynamon.curvature.solvers import lanczos
from dynamon.isolation import equality
from dynamon.isolation.preserve import preserve_state
from dynamon.kernels import lengths
from tests.launches import Launches, gpt2

GRAPH, PRODUCT, BESIDE, PUTTING_BACK = 800, 1960, 40, 30  # BESIDE: of a solver, and whether weights have changed


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """What is asked of a CPU only is not asked."""
    for module in (equality, curvature_parameters, lengths, lanczos):
        monkeypatch.setattr(module, "reads_are_free", lambda _: False)


def test_of_a_reading():
    torch.manual_seed(0)
    model = gpt2("cpu", scale=48)
    tokens = torch.randint(1000, (2, 13))

    def loss():
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    with Launches() as launches:
        with preserve_state(model, seed=1):
            before = launches.total
            operator = HessianOperator(loss, dict(model.named_parameters()))
            assert launches.total - before <= GRAPH and launches.waits == 0, launches
            launches.reset()
            directional_sharpness(operator, operator.gradient)
            assert launches.total <= PRODUCT + BESIDE and launches.waits <= 3, launches
            launches.reset()
            found = top_eigenvalues(operator, max_matvecs=8)
            assert launches.total <= found.matvecs * (PRODUCT + BESIDE), launches
            assert launches.waits <= 3, launches
            launches.reset()
        assert before + launches.total <= PUTTING_BACK, launches


def test_of_a_line_search():
    """Beside the forward passes: weights that are moved together."""
    torch.manual_seed(0)
    model = gpt2("cpu", scale=48)
    params = dict(model.named_parameters())
    update = torch.full((sum(p.numel() for p in params.values()),), -1e-4)
    with Launches() as launches:
        critical_sharpness(lambda: params["norm.weight"].square().sum(), params, update)
    assert launches.calls["add.Tensor"] <= 5 and launches.total <= 200, launches
