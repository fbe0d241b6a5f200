"""Readings of a step against closed forms and dense Hessians, in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dynamon.curvature.along.progress import LastStep
from dynamon.curvature.operators import parameters
from dynamon.isolation import equality
from tests.launches import Launches

SIZES = {"a": 3, "b": 4, "c": 1}


class Quadratic:
    """The loss w.A.w / 2 - v.w of three tensors, and a step of all of them."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        n = sum(SIZES.values())
        draw = torch.randn(n, n, dtype=torch.float64, generator=generator)
        self.matrix = draw @ draw.T / n
        self.vector = torch.randn(n, dtype=torch.float64, generator=generator)
        self.old = torch.randn(n, dtype=torch.float64, generator=generator)
        self.step = 0.3 * torch.randn(n, dtype=torch.float64, generator=generator)
        self.params = {
            name: piece.clone().requires_grad_()
            for name, piece in zip(SIZES, (self.old + self.step).split(list(SIZES.values())), strict=True)
        }

    def loss(self) -> Tensor:
        w = torch.cat(list(self.params.values()))
        return w @ self.matrix @ w / 2 - self.vector @ w

    def pieces(self, flat: Tensor) -> list[Tensor]:
        return list(flat.split(list(SIZES.values())))

    def last(self, left: list[float] | None = None) -> LastStep:
        return LastStep(self.loss, self.params, self.pieces(self.old), left)

    def slope(self, at: Tensor, along: Tensor) -> np.ndarray:
        gradient = self.matrix @ at - self.vector
        return np.array([float(g @ u) for g, u in zip(self.pieces(gradient), self.pieces(along), strict=True)])

    def value(self, w: Tensor) -> float:
        return float(w @ self.matrix @ w / 2 - self.vector @ w)


def test_on_a_quadratic_everything_is_exact() -> None:
    task = Quadratic()
    reading = task.last().read(samples=7.0)
    bent = np.array(
        [float(h @ u) for h, u in zip(task.pieces(task.matrix @ task.step), task.pieces(task.step), strict=True)]
    )
    first = -task.slope(task.old, task.step)
    np.testing.assert_allclose(reading.first_order, first, atol=1e-12)
    np.testing.assert_allclose(reading.curvature_cost, bent, atol=1e-12)
    np.testing.assert_allclose(reading.decrease, first - bent / 2, atol=1e-12)
    known = first > 0
    np.testing.assert_allclose(reading.overshoot[known], (bent / first)[known], rtol=1e-10)
    assert reading.loss_before == pytest.approx(task.value(task.old), abs=1e-12)
    assert reading.total_decrease == pytest.approx(task.value(task.old) - task.value(task.old + task.step), abs=1e-10)
    assert abs(reading.discrepancy) < 1e-10
    assert reading.samples == 7.0


def test_decay_has_a_part_of_its_own() -> None:
    task, left = Quadratic(1), [0.9, 1.0, 0.7]
    scale = torch.cat([torch.full((n,), f, dtype=torch.float64) for n, f in zip(SIZES.values(), left, strict=True)])
    decay = (scale - 1) * task.old
    reading = task.last(left).read()
    new = task.old + task.step
    np.testing.assert_allclose(reading.before, task.slope(task.old, task.step - decay), atol=1e-12)
    np.testing.assert_allclose(reading.after, task.slope(new, task.step - decay), atol=1e-12)
    np.testing.assert_allclose(reading.decay_before, task.slope(task.old, decay), atol=1e-12)
    np.testing.assert_allclose(reading.decay_after, task.slope(new, decay), atol=1e-12)
    assert reading.decay_decrease[1] == 0
    assert abs(reading.discrepancy) < 1e-10


def test_couplings_are_products_with_the_dense_hessian() -> None:
    task, left = Quadratic(2), [1.0, 0.8, 1.0]
    moved = torch.cat(
        [u - (f - 1) * w for u, w, f in zip(task.pieces(task.step), task.pieces(task.old), left, strict=True)]
    )
    found = task.last(left).couplings({"first": ["a", "c"], "second": ["b"]})
    parts = torch.zeros(2, len(moved), dtype=torch.float64)
    parts[0, :3], parts[0, 7:], parts[1, 3:7] = moved[:3], moved[7:], moved[3:7]
    np.testing.assert_allclose(found.matrix, (parts @ task.matrix @ parts.T).numpy(), atol=1e-12)
    np.testing.assert_allclose(found.slopes, (parts @ (task.matrix @ task.old - task.vector)).numpy(), atol=1e-12)
    assert found.asymmetry < 1e-10
    assert found.loss == pytest.approx(task.value(task.old), abs=1e-12)


def test_columns_of_couplings_add_up_to_the_costs() -> None:
    task = Quadratic(3)
    found = task.last().couplings({name: [name] for name in SIZES})
    np.testing.assert_allclose(found.matrix.sum(0), Quadratic(3).last().read().curvature_cost, atol=1e-12)


def test_groups_may_leave_layers_out() -> None:
    task = Quadratic(4)
    every = task.last().couplings({name: [name] for name in SIZES})
    some = task.last().couplings({"b": ["b"]})
    np.testing.assert_allclose(some.matrix, every.matrix[1:2, 1:2], atol=1e-12)


@pytest.mark.parametrize(
    ("groups", "message"), [({"x": ["a", "nowhere"]}, "nowhere"), ({"x": ["a"], "y": ["a"]}, "in two groups")]
)
def test_bad_groups_are_named(groups: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quadratic().last().couplings(groups)


def test_weights_come_back_bit_for_bit() -> None:
    task = Quadratic()
    before = {name: p.detach().clone() for name, p in task.params.items()}
    storage = {name: p.data_ptr() for name, p in task.params.items()}
    task.last().read()
    task.last().couplings({"x": ["a"]})
    for name, p in task.params.items():
        assert torch.equal(p, before[name]) and p.data_ptr() == storage[name] and p.grad is None


def _net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def test_halving_the_step_divides_the_discrepancy_by_eight() -> None:
    net = _net()
    params = dict(net.named_parameters())
    x, y = torch.randn(32, 6, dtype=torch.float64), torch.randint(3, (32,))
    old = [p.detach().clone() for p in params.values()]
    direction = [torch.randn_like(p) for p in old]
    found = []
    for length in (0.02, 0.01, 0.005):
        with torch.no_grad():
            for p, w, d in zip(params.values(), old, direction, strict=True):
                p.copy_(w + length * d)
        found.append(LastStep(lambda: nn.functional.cross_entropy(net(x), y), params, old).read().discrepancy)
    assert abs(found[0]) > 1e-8  # far above the rounding of float64
    assert found[0] / found[1] == pytest.approx(8, rel=0.1)
    assert found[1] / found[2] == pytest.approx(8, rel=0.05)


def test_complex_weights_count_as_pairs_of_real_ones() -> None:
    old = torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128)
    w = (old + torch.tensor([0.5 - 1j, -1 + 0.25j], dtype=torch.complex128)).requires_grad_()
    reading = LastStep(lambda: torch.view_as_real(w * w.conj()).square().sum(), {"w": w}, [old], [0.9]).read()
    pair = [old.clone(), w.detach()]
    gradients = [torch.view_as_real(4 * v.abs().square() * v) for v in pair]
    decay = torch.view_as_real(-0.1 * old)
    step = torch.view_as_real(w.detach() - old) - decay
    np.testing.assert_allclose(reading.before, [float((gradients[0] * step).sum())], rtol=1e-12)
    np.testing.assert_allclose(reading.after, [float((gradients[1] * step).sum())], rtol=1e-12)
    np.testing.assert_allclose(reading.decay_after, [float((gradients[1] * decay).sum())], rtol=1e-12)


def test_half_precision_weights() -> None:
    """The gradients of the same bfloat16 weights in float32 are the oracle: only activations are rounded more."""
    net = _net(torch.bfloat16)
    params = dict(net.named_parameters())
    x, y = torch.randn(64, 6), torch.randint(3, (64,))
    old = [p.detach().clone() for p in params.values()]
    with torch.no_grad():
        for p in params.values():
            p.add_(torch.randn_like(p), alpha=0.05)
    reading = LastStep(lambda: nn.functional.cross_entropy(net(x.bfloat16()).float(), y), params, old).read()
    wide = _net()
    wide.load_state_dict({name: p.double() for name, p in params.items()})
    own = dict(wide.named_parameters())
    exact = LastStep(lambda: nn.functional.cross_entropy(wide(x.double()), y), own, [w.double() for w in old]).read()
    size = np.abs(exact.before).max()
    np.testing.assert_allclose(reading.before, exact.before, atol=0.02 * size)
    np.testing.assert_allclose(reading.after, exact.after, atol=0.02 * size)


def test_an_unused_layer_does_nothing() -> None:
    task = Quadratic()
    params = {**task.params, "idle": torch.ones(2, dtype=torch.float64, requires_grad=True)}
    before = [*task.pieces(task.old), torch.zeros(2, dtype=torch.float64)]
    reading = LastStep(task.loss, params, before).read()
    assert reading.before[-1] == reading.after[-1] == 0
    np.testing.assert_array_equal(reading.before[:-1], task.last().read().before)


def test_device_calls_do_not_grow_with_the_layers(monkeypatch) -> None:
    """Beside the two gradients and what isolates them: counted as the difference to two plain gradients."""
    found = []
    for depth in (4, 40):
        torch.manual_seed(0)
        net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(depth)])
        params, x = dict(net.named_parameters()), torch.randn(2, 4)
        old = [p.detach().clone() for p in params.values()]
        loss = lambda net=net, x=x: net(x).square().mean()  # noqa: E731
        with Launches() as plain:
            for _ in range(2):
                torch.autograd.grad(loss(), list(params.values()))
        with monkeypatch.context() as patch, Launches() as read:
            for module in (equality, parameters):  # as on a device whose calls cost the host time
                patch.setattr(module, "reads_are_free", lambda device: False)
            LastStep(loss, params, old, [0.9] * len(old)).read()
        found.append(read.total - plain.total)
    assert found[1] <= 75 and found[1] - found[0] <= 10, found
