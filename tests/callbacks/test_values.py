"""The numbers on the panels are those of an independent calculation on the same run."""

import math

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.nn.functional import cross_entropy

import dynamon
from dynamon.callbacks import DynamicsMonitor, GradientMonitor, LayerwiseLR, SharpnessMonitor, WeightMonitor
from dynamon.layers import describe_layers
from dynamon.rates import FixedRates
from tests.helpers import Classifier, batches, cnn, fit, mlp


class Witness(Callback):
    """Keeps gradients before and after clipping and weights before and after each step, in float64."""

    def __init__(self) -> None:
        self.unclipped: list[dict] = []
        self.clipped: list[dict] = []
        self.before: list[dict] = []
        self.after: list[dict] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.unclipped.append({n: p.grad.double().clone() for n, p in pl_module.named_parameters()})
        self.before.append({n: p.detach().double().clone() for n, p in pl_module.named_parameters()})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.clipped.append({n: p.grad.double().clone() for n, p in pl_module.named_parameters()})
        self.after.append({n: p.detach().double().clone() for n, p in pl_module.named_parameters()})


def norm(tensors) -> float:
    return sum(float(t.square().sum()) for t in tensors) ** 0.5


def test_gradient_readings() -> None:
    monitor, witness = GradientMonitor(every_n_steps=1, strict=True), Witness()
    fit(Classifier(mlp()), [monitor, witness], gradient_clip_val=0.3)
    history, names = monitor.history, list(witness.unclipped[0])
    assert history["gradient/dual"].layers == tuple(names)
    for t, (g, c) in enumerate(zip(witness.unclipped, witness.clipped, strict=True)):
        assert history["gradient/norm"].values[t] == pytest.approx(norm(g.values()), rel=1e-5)
        assert history["gradient/norm_clipped"].values[t] == pytest.approx(norm(c.values()), rel=1e-5)
        duals = [float(g[n].abs().sum()) for n in names]
        np.testing.assert_allclose(history["gradient/dual"].values[t], duals, rtol=1e-5)
        assert history["gradient/norm_dual"].values[t] == pytest.approx(sum(duals), rel=1e-5)
    assert history["gradient/clip_coefficient"].values.min() < 0.9
    first, second = witness.unclipped[3:5]
    cosine = sum(float((first[n] * second[n]).sum()) for n in names) / norm(first.values()) / norm(second.values())
    assert history["gradient/cosine"].values[list(history["gradient/cosine"].steps).index(4)] == pytest.approx(
        cosine, abs=1e-5
    )
    average = weight = 0.0
    for before, now in zip(witness.unclipped[:-1], witness.unclipped[1:], strict=True):
        noise = np.array([float((now[n] - before[n]).abs().sum()) ** 2 for n in names])
        average, weight = 0.98 * average + 0.02 * noise, 0.98 * weight + 0.02
    np.testing.assert_allclose(history["noise/dual"].values[-1], np.sqrt(average / weight), rtol=1e-5)


def test_gradients_kept_at_one_step_are_read_at_the_next() -> None:
    """With gaps between readings the change is still that of two successive steps."""
    monitor, witness = GradientMonitor(every_n_steps=5, strict=True), Witness()
    fit(Classifier(mlp(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1)), [monitor, witness], steps=6)
    change = [float((witness.unclipped[5][n] - witness.unclipped[4][n]).norm()) for n in witness.unclipped[0]]
    np.testing.assert_allclose(monitor.history["noise/dual"].values[-1], change, rtol=1e-5)


def test_weight_readings() -> None:
    monitor, witness = WeightMonitor(every_n_steps=4, strict=True), Witness()
    module = Classifier(cnn())
    fit(module, [monitor, witness], batches(count=128, features=(2, 8, 8)), steps=13)
    roles = {layer.name: layer.role for layer in describe_layers(module)}

    def operator(name: str, w: torch.Tensor) -> float:
        sigma = float(torch.linalg.svdvals(w.flatten(1))[0]) if w.ndim > 1 else 0.0
        match roles[name]:
            case "conv":
                return w.shape[2] * w.shape[3] * (w.shape[1] / w.shape[0]) ** 0.5 * sigma
            case "head":
                return float(w.norm(dim=1).max()) * w.shape[1] ** 0.5
            case "vector":
                return float(w.norm()) / w.numel() ** 0.5
        raise AssertionError(roles[name])

    history = monitor.history
    names = history["weight/operator"].layers
    for row, step in enumerate(history["weight/operator"].steps):
        before, after = witness.before[step], witness.after[step]
        sizes = np.array([operator(n, after[n]) for n in names])
        moves = np.array([operator(n, after[n] - before[n]) for n in names])
        np.testing.assert_allclose(history["weight/operator"].values[row], sizes, rtol=1e-3)
        np.testing.assert_allclose(history["update/operator"].values[row], moves, rtol=1e-2)
        np.testing.assert_allclose(
            history["weight/rms"].values[row], [norm([after[n]]) / after[n].numel() ** 0.5 for n in names], rtol=1e-5
        )
        for column, n in enumerate(names):
            if after[n].ndim > 1:
                values = torch.linalg.svdvals(after[n].flatten(1))
                low, high, rank = (
                    history[f"spectrum/{k}"].values[row, column] for k in ("sigma_lower", "sigma_upper", "stable_rank")
                )
                assert low <= float(values[0]) <= high
                assert rank == pytest.approx(float(values.square().sum() / values[0] ** 2), rel=1e-3)


def dense(module: Classifier, batch: list, scale: dict[str, torch.Tensor]) -> np.ndarray:
    """Eigenvalues of S H S in float64, by differentiating twice entry by entry."""
    double = Classifier(mlp()).double()
    double.load_state_dict(module.state_dict())
    params = list(double.parameters())
    loss = cross_entropy(double.network(batch[0].double()), batch[1])
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, params, create_graph=True)])
    rows = [
        torch.cat([r.flatten() for r in torch.autograd.grad(g, params, retain_graph=True, materialize_grads=True)])
        for g in gradient
    ]
    s = torch.cat([scale[n].double().flatten() for n, _ in double.named_parameters()])
    return np.linalg.eigvalsh((s[:, None] * torch.stack(rows) * s[None, :]).detach().numpy())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sharpness_of_an_sgd_run(momentum: float) -> None:
    data = batches(count=32, size=32)
    module = Classifier(mlp(), optimizer=lambda p: torch.optim.SGD(p, lr=0.2, momentum=momentum))
    monitor = SharpnessMonitor(every_n_steps=1, probe_fraction=1.0, tol=1e-3, strict=True)
    fit(module, [monitor], data, steps=30, max_epochs=-1)
    (batch,) = list(data)
    values = dense(module, batch, {n: torch.ones_like(p) for n, p in module.named_parameters()})
    history = monitor.history
    assert history["sharpness/hessian_max"].values[-1] == pytest.approx(values[-1], rel=1e-3)
    assert history["sharpness/hessian_min"].values[-1] >= values[0] - 1e-4
    ratio = values[-1] * 0.2 / (2 * (1 + momentum))
    assert history["sharpness/stability_ratio"].values[-1] == pytest.approx(ratio, rel=1e-3)


def test_stability_ratio_of_a_steered_adamw_run() -> None:
    """Effective rates, bias correction and decoupled decay are all in it."""
    data = batches(count=32, size=32)
    module = Classifier(mlp(), optimizer=lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.5))
    monitor = DynamicsMonitor("full", every_n_steps=1, strict=True)
    steering = LayerwiseLR(FixedRates({"*.0.weight": 0.5, "*.3.bias": 0.3}))
    fit(module, [monitor, steering], data, steps=12, max_epochs=-1)
    (batch,) = list(data)
    (optimizer,) = [module.trainer.optimizers[0]]
    at = monitor.history["sharpness/stability_ratio"].steps[-1]
    rates = steering.history["lr/ratio"]
    ratios = dict(zip(rates.layers, rates.values[list(rates.steps).index(at)], strict=True))
    assert min(ratios.values()) < 0.8
    scale = {}
    for name, p in module.named_parameters():
        state, lr = optimizer.state[p], 0.02 * ratios[name]
        t = float(state["step"])
        preconditioner = ((state["exp_avg_sq"].double() / (1 - 0.999**t)).sqrt() + 1e-8) * (1 - 0.9**t)
        scale[name] = (lr * 0.1 / ((2 - lr * 0.5) * 1.9) / preconditioner).sqrt()
    expected = dense(module, batch, scale)[-1]
    assert at == 11
    assert monitor.history["sharpness/stability_ratio"].values[-1] == pytest.approx(expected, rel=1e-3)


def test_bounds_enclose_the_ratio() -> None:
    monitor = SharpnessMonitor(every_n_steps=1, probe_fraction=1.0, strict=True)
    fit(Classifier(mlp()), [monitor], batches(count=32, size=32), steps=40, max_epochs=-1)
    upper, ratio = monitor.history["sharpness/stability_ratio_upper"], monitor.history["sharpness/stability_ratio"]
    by_step = dict(zip(ratio.steps.tolist(), ratio.values, strict=True))
    assert len(upper) == 4
    for step, bound in zip(upper.steps.tolist(), upper.values, strict=True):
        assert by_step[step] <= bound <= 1.5 * by_step[step]


def test_rotation_effective_rate_and_constraint_usage() -> None:
    """Against a few lines on the weights before and after the last step."""
    rate, decay = 0.02, 0.5
    module = Classifier(mlp(), optimizer=lambda p: torch.optim.AdamW(p, lr=rate, weight_decay=decay))
    monitor = WeightMonitor(every_n_steps=1, strict=True)
    seen = []

    class Look(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            seen.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})

    fit(module, [monitor, Look()], steps=5)
    for name, after in module.named_parameters():
        before = seen[-1][name].flatten().double()
        new = after.detach().flatten().double()
        cosine = torch.dot(before, new) / (before.norm() * new.norm())
        value = lambda tag: monitor.history[tag].values[-1][monitor.history[tag].layers.index(name)]  # noqa: B023, E731
        assert value("update/rotation") == pytest.approx(float(torch.arccos(cosine)), rel=1e-3)
        assert value("weight/effective_rate") == pytest.approx(rate / float(new.norm()) ** 2, rel=1e-4)
        usage = rate * decay * value("weight/operator") / value("update/operator")
        assert value("weight/constraint_usage") == pytest.approx(usage, rel=1e-4)
    sigma = torch.linalg.svdvals(seen[1]["network.3.weight"].double())
    series = monitor.history["spectrum/nuclear"]
    assert len(series) == 1 and len(monitor.history["spectrum/sigma_max"]) == 5  # the first of ten readings
    assert series.values[0][series.layers.index("network.3.weight")] == pytest.approx(float(sigma.sum()), rel=1e-3)


def test_the_spectral_condition_and_convolutions() -> None:
    monitor = WeightMonitor(every_n_steps=1, strict=True, convolutions=True)
    module = Classifier(cnn())
    fit(module, [monitor], batches(features=(2, 8, 8)), steps=11)
    value = lambda tag, name: monitor.history[tag].values[-1][monitor.history[tag].layers.index(name)]  # noqa: E731
    for name, p in module.named_parameters():
        if p.ndim > 1:
            sigma = float(torch.linalg.svdvals(p.detach().double().flatten(1))[0])
            expected = math.prod(p.shape[2:]) * math.sqrt(p.shape[1] / p.shape[0]) * sigma
            assert value("spectrum/log2_spectral_condition", name) == pytest.approx(math.log2(expected), abs=0.01)
    transfer = torch.fft.fft2(module.network[0].weight.detach().double(), s=(64, 64)).permute(2, 3, 0, 1)
    exact = float(torch.linalg.matrix_norm(transfer, ord=2).max())
    lower, upper = (value(f"spectrum/convolution_{side}", "network.0.weight") for side in ("lower", "upper"))
    assert lower <= exact * 1.001 and exact <= upper <= 1.1 * lower
    assert monitor.history["spectrum/convolution_upper"].layers == ("network.0.weight", "network.4.weight")


def test_signal_to_noise_of_an_accumulated_run() -> None:
    """From every batch's gradient in ten lines: variance by the halves of each window, both averaged over readings."""
    monitor, seen = GradientMonitor(every_n_steps=1, strict=True), []

    class PerBatch(Callback):
        def on_after_backward(self, trainer, pl_module) -> None:
            seen.append({n: p.grad.double().clone() for n, p in pl_module.named_parameters()})

    fit(Classifier(mlp()), [monitor, PerBatch()], steps=20, max_epochs=-1, accumulate_grad_batches=2)
    names = list(seen[0])
    variance, square, h = np.zeros(len(names)), np.zeros(len(names)), np.zeros(len(names))
    for half, whole in zip(seen[::2], seen[1::2], strict=True):
        apart = [2**0.5 * (2 * half[n] - whole[n]) for n in names]
        variance = 0.98 * variance + 0.01 * np.array([float(d.square().sum()) for d in apart])
        square = 0.98 * square + 0.02 * np.array([float(whole[n].square().sum()) for n in names])
        h = 0.98 * h + 0.02 * np.array([float(d.abs().sum()) ** 2 for d in apart])
    independent, snr = monitor.history["noise/independent"], monitor.history["noise/snr"]
    assert list(independent.layers) == names and len(independent) == 20
    np.testing.assert_allclose(independent.values[-1], np.sqrt(h / (1 - 0.98**20)), rtol=1e-4)
    np.testing.assert_allclose(snr.values[-1], np.maximum(square / variance - 1, 0), rtol=1e-3, atol=1e-3)
    if square.sum() > variance.sum():
        expected = variance.sum() / (square.sum() - variance.sum())
        assert monitor.history["noise/scale"].values[-1] == pytest.approx(expected, rel=1e-3)


def test_kurtosis_of_a_run_and_of_measure() -> None:
    module, monitor = Classifier(mlp()), WeightMonitor(every_n_steps=1, strict=True)
    fit(module, [monitor], steps=3)
    series = monitor.history["weight/kurtosis"]
    weights = {name: p.detach().double() / p.detach().abs().max() for name, p in module.named_parameters()}
    expected = {name: float(w.pow(4).mean() / w.square().mean() ** 2) for name, w in weights.items()}
    np.testing.assert_allclose(series.values[-1], [expected[name] for name in series.layers], rtol=1e-6)
    found = dynamon.measure(module, next(iter(batches())), loss_fn=lambda m, b: cross_entropy(m.network(b[0]), b[1]))
    assert found["weight/kurtosis"] == pytest.approx(expected, rel=1e-6)
    assert "kurtosis of the weights across layers" in monitor.panels["4 Weights"]
