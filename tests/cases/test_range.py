"""Numbers at the ends of the range: norms whose squares overflow or vanish, zero matrices, absent gradients."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dynamon import describe_layers, measure
from dynamon.callbacks import GradientMonitor, SharpnessMonitor, WeightMonitor
from dynamon.curvature import HessianOperator, batch_sharpness, top_eigenvalues
from dynamon.kernels import gradient_stats, l2_along, l2_norms
from dynamon.layers import Layer
from dynamon.norms import NORMS, get_norm
from dynamon.quantities.gradient_reader import GradientReader
from dynamon.quantities.weights import weight_readings
from dynamon.spectra import batched_by_shape, reduce_blocks, spectral_extremes, weight_spectrum
from tests.helpers import Classifier, batches, fit, mlp

SCALES = [1e37, 1e22, 1e20, 3e-22, 1e-22, 1e-30, 1e-37]


class Scaled(Classifier):
    """A loss times a number, with a rate that makes up for it; keeps its gradients in float64."""

    def __init__(self, scale):
        super().__init__(mlp(), lambda p: torch.optim.SGD(p, lr=1e-2 / scale))
        self.scale, self.seen = scale, []

    def training_step(self, batch, batch_idx):
        return self.scale * cross_entropy(self.network(batch[0]), batch[1])

    def on_before_optimizer_step(self, optimizer):
        self.seen.append([p.grad.double() for p in self.parameters()])


@pytest.mark.parametrize("scale", SCALES)
def test_gradients_and_their_changes(scale):
    monitor = GradientMonitor(every_n_steps=1, strict=True)
    module = Scaled(scale)
    fit(module, [monitor], steps=4)
    before, now = module.seen[-2:]
    flat, flat_before = (torch.cat([g.flatten() for g in step]) for step in (now, before))
    h = monitor.history
    assert h["gradient/norm"].values[-1] == pytest.approx(flat.norm().item(), rel=1e-5, abs=0)
    assert h["gradient/norm_clipped"].values[-1] == pytest.approx(flat.norm().item(), rel=1e-5, abs=0)
    assert h["gradient/norm_l1"].values[-1] == pytest.approx(flat.abs().sum().item(), rel=1e-5, abs=0)
    assert h["gradient/l2"].values[-1].tolist() == [pytest.approx(g.norm().item(), rel=1e-5, abs=0) for g in now]
    cosine = (flat @ flat_before / flat.norm() / flat_before.norm()).item()
    assert h["gradient/cosine"].values[-1] == pytest.approx(cosine, abs=1e-3)
    assert not h["gradient/nonfinite"].values.any() and monitor.findings == [] and monitor.failures == 0
    changes = [[(a - b).norm().item() for a, b in zip(one, other, strict=True)]
               for one, other in zip(module.seen[1:], module.seen, strict=False)]  # fmt: skip
    weights = [0.98 ** (2 - i) for i in range(3)]
    noise = np.sqrt(np.average(np.square(np.array(changes) / scale), axis=0, weights=weights)) * scale
    assert h["noise/dual"].values[-1] == pytest.approx(noise, rel=1e-3, abs=0)


@pytest.mark.parametrize("exponent", [73, 110, -73, -100])
def test_a_loss_times_a_power_of_two_reads_the_same_times_it(exponent):
    """The rate makes up for the factor, so that steps and everything without a unit are the same."""
    scale, histories = 2.0**exponent, []
    for factor in (1.0, scale):
        monitor = GradientMonitor(every_n_steps=1, strict=True)
        fit(Scaled(factor), [monitor], steps=5)
        histories.append({tag: monitor.history[tag] for tag in monitor.history if not tag.startswith("dynamon")})
    plain, scaled = histories
    assert plain.keys() == scaled.keys()
    without_unit = ("gradient/cosine", "gradient/clip", "gradient/nonfinite", "noise/scale", "noise/snr")
    for tag in plain:
        expected = plain[tag].values * (1.0 if tag.startswith(without_unit) else scale)
        np.testing.assert_allclose(scaled[tag].values, expected, rtol=1e-3, err_msg=tag)


@pytest.mark.filterwarnings("ignore:.*Clipping left nothing of the gradient")
def test_a_clipping_that_leaves_nothing_is_a_finding():
    found = {}
    for scale in (1.0, 1e22):
        monitor = GradientMonitor(every_n_steps=1)
        module = Scaled(scale)
        fit(module, [monitor], steps=6, gradient_clip_val=1e-3)
        found[scale] = [finding for finding in monitor.findings if finding.rule == "gradient/vanished"]
    assert found[1.0] == []
    (finding,) = found[1e22]
    first = torch.cat([g.flatten() for g in module.seen[0]]).norm().item()
    assert finding.severity == "fault" and finding.step == 0 and "left nothing" in finding.message
    assert finding.numbers == {"norm": pytest.approx(first, rel=1e-5, abs=0), "readings": 6.0}


def extremes(dtype, sizes=((40, 30), (7,), (), (3, 4, 5))):
    """Tensors from the lower to the upper end of a dtype's range, subnormals included, and zeros."""
    info, generator = torch.finfo(dtype), torch.Generator().manual_seed(0)
    levels = [info.tiny / 8, info.tiny, info.tiny**0.5, 1.0, info.max**0.5, info.max / 256]
    draws = [torch.randn(size, generator=generator, dtype=torch.float64).clamp(-4, 4) for size in sizes]
    return [(draw * level).to(dtype) for draw in draws for level in levels] + [torch.zeros(5, dtype=dtype)]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_statistics_of_every_dtype_to_the_ends_of_its_range(dtype, stored):
    gradients = extremes(dtype)
    previous = [torch.flip(g.flatten(), [0]).view_as(g).to(stored) for g in gradients]
    known = [i for i, p in enumerate(previous) if p.isfinite().all()]
    gradients, previous = [gradients[i] for i in known], [previous[i] for i in known]
    wide = [(g.double(), p.double()) for g, p in zip(gradients, previous, strict=True)]
    found = gradient_stats(gradients, previous, dtype=torch.float64)
    for i, (g, p) in enumerate(wide):
        d = g - p
        for value, exact in [
            (found.l1, g.abs().sum()), (found.sum_squares, g.square().sum()),
            (found.difference_l1, d.abs().sum()), (found.difference_sum_squares, d.square().sum()),
        ]:  # fmt: skip
            assert value.dtype == torch.float64
            assert value[i].item() == pytest.approx(exact.item(), rel=1e-5, abs=0), (dtype, g.shape)
        assert abs(found.inner[i] - (g * p).sum()) <= 1e-5 * g.norm() * p.norm()
    assert not found.nonfinite.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lengths_to_the_ends_of_the_range(dtype):
    tensors = [*extremes(dtype), torch.zeros(0, dtype=dtype)]
    exact = [math.hypot(*t.double().flatten().tolist()) for t in tensors]
    if dtype == torch.float64:  # its own squares leave its range
        tensors, exact = zip(*[(t, e) for t, e in zip(tensors, exact, strict=True) if 1e-150 < e < 1e150], strict=True)
    assert l2_norms(tensors).tolist() == [pytest.approx(e, rel=1e-5, abs=0) for e in exact]
    for tensor, length in zip(tensors, exact, strict=True):
        assert l2_along(tensor, None).item() == pytest.approx(length, rel=1e-5, abs=2e-45)


def test_lengths_in_the_normal_range_are_those_of_float32_to_the_bit_and_nan_is_nan():
    tensors = [torch.randn(50, 3) * scale for scale in (1e-10, 1.0, 1e10)]
    assert l2_norms(tensors).tolist() == [torch.linalg.vector_norm(t).item() for t in tensors]
    assert l2_norms([torch.tensor([1.0, math.nan]), torch.tensor([math.inf])]).isnan().tolist() == [True, False]
    assert l2_norms([]).shape == (0,)


@pytest.mark.parametrize("scale", [2.0**-110, 2.0**-75, 2.0**75, 2.0**110])
@pytest.mark.parametrize("name", NORMS)
def test_norms_scale_with_their_argument(name, scale):
    tensor, norm = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), get_norm(name)
    assert norm.primal(tensor * scale).item() == pytest.approx(norm.primal(tensor).item() * scale, rel=1e-4, abs=0)
    assert norm.dual(tensor * scale).item() == pytest.approx(norm.dual(tensor).item() * scale, rel=1e-4, abs=0)
    torch.testing.assert_close(norm.lmo(tensor * scale), norm.lmo(tensor), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", [2.0**-110, 2.0**-75, 2.0**75, 2.0**110])
def test_weights_updates_and_spectra_scale_too(scale):
    roles = [("hidden", (6, 4)), ("embedding", (9, 5)), ("head", (3, 5)), ("vector", (7,))]
    generator, found = torch.Generator().manual_seed(0), {}
    draws = [[torch.randn(shape, generator=generator) for _, shape in roles] for _ in range(3)]
    for factor in (1.0, scale):
        now, before, earlier = ([t * factor for t in tensors] for tensors in draws)
        layers = [Layer(f"{i}", role, now[i], rows_are_tokens=role == "embedding") for i, (role, _) in enumerate(roles)]
        copies = [{f"{i}": t for i, t in enumerate(tensors)} for tensors in (before, earlier)]
        readings = weight_readings(layers, *copies)
        found[factor] = readings, weight_spectrum(now[0])
    (plain, spectrum), (scaled, scaled_spectrum) = found[1.0], found[scale]
    sized = ("operator", "frobenius", "rms", "update", "last", "previous", "sigma_max", "sigma_lower", "sigma_upper")
    for field in sized:
        torch.testing.assert_close(
            getattr(scaled, field), getattr(plain, field) * scale, rtol=1e-4, atol=0, equal_nan=True
        )
    for field in ("ratio", "rotation", "cosine", "stable_rank"):
        torch.testing.assert_close(getattr(scaled, field), getattr(plain, field), rtol=1e-4, atol=1e-6, equal_nan=True)
    for field in ("stable_rank", "effective_rank", "participation_ratio"):
        torch.testing.assert_close(getattr(scaled_spectrum, field), getattr(spectrum, field), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        scaled.log2_spectral_condition[:3] - math.log2(scale), plain.log2_spectral_condition[:3], rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("scale", [1e22, 1e-22, 1e-30])
def test_sharpness_of_a_scaled_loss(scale):
    quantities = ["stability_ratio", "hessian", "directional", "batch"]
    monitors = [SharpnessMonitor(every_n_steps=1, quantities=quantities, strict=True) for _ in range(2)]
    for factor, monitor in zip((1.0, scale), monitors, strict=True):
        fit(Scaled(factor), [monitor], steps=2)
    plain, scaled = (monitor.history for monitor in monitors)
    for tag, power in {
        "sharpness/stability_ratio": 0, "sharpness/best_multiple": 0, "sharpness/hessian_max": 1,
        "sharpness/directional": 1, "sharpness/batch": 1,
    }.items():  # fmt: skip
        assert scaled[tag].values == pytest.approx(plain[tag].values * scale**power, rel=1e-3, abs=0), tag


@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_batch_sharpness_against_a_dense_hessian(scale):
    torch.manual_seed(0)
    weight, target = torch.randn(6, requires_grad=True), torch.randn(6)
    curvature = torch.diag(torch.arange(1.0, 7.0))
    loss = lambda w: scale * ((w - target) @ curvature @ (w - target)) / 2  # noqa: E731
    gradient = curvature.double() @ (weight - target).double()
    exact = (gradient @ curvature.double() @ gradient / (gradient @ gradient)).item() * scale
    assert batch_sharpness([HessianOperator(lambda: loss(weight), [weight])]) == pytest.approx(exact, rel=1e-4, abs=0)


def test_steps_of_weights_in_half_precision_are_not_rounded_once_more():
    before = torch.full((4, 4), 1.0, dtype=torch.bfloat16)
    now = torch.full((4, 4), -0.01, dtype=torch.bfloat16)  # 1.01 away, which bfloat16 holds as 1.0078
    found = weight_readings([Layer("w", "vector", now)], {"w": before})
    exact = (now.double() - before.double()).abs().mean().item()
    assert found.update[0].item() == pytest.approx(exact, rel=1e-6, abs=0)
    assert found.ratio[0].item() == pytest.approx(exact / now.double().abs().mean().item(), rel=1e-6, abs=0)


def test_a_zero_matrix_has_no_rank_and_no_deviation():
    layers = describe_layers(nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 5, bias=False)))
    nn.init.zeros_(layers[0].parameter)
    found = weight_readings(layers, {"0.weight": torch.zeros(3, 4)})
    assert found.sigma_max[0] == found.operator[0] == found.update[0] == 0
    assert all(
        getattr(found, field)[0].isnan() for field in ("ratio", "rotation", "stable_rank", "log2_spectral_condition")
    )
    assert found.log2_spectral_condition[1].isfinite() and found.stable_rank[1].isfinite()
    for measure_one in (spectral_extremes, weight_spectrum):
        stack = torch.stack([torch.zeros(3, 4), torch.eye(3, 4), torch.eye(3, 4) * 2])
        alone = measure_one(stack)
        assert alone.stable_rank[0].isnan() and alone.sigma_max[0] == 0
        assert measure_one is spectral_extremes or alone.participation_ratio[0].isnan()
        together = reduce_blocks(batched_by_shape([stack, stack[1:]], measure_one), [3, 2])
        assert together.stable_rank.tolist() == pytest.approx([3.0, 3.0], rel=1e-2, abs=0)  # of those that have one


def test_rates_over_zero_weights_and_steps_are_not_infinite():
    class Adapter(nn.Module):
        """A LoRA pair, whose second factor begins at zero, so that the first does not move."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.zeros(3, 2))

        def forward(self, x):
            return x @ self.lora_A.T @ self.lora_B.T

    monitor = WeightMonitor(every_n_steps=1, strict=True)
    fit(Classifier(Adapter(), lambda p: torch.optim.SGD(p, lr=0.0)), [monitor], steps=3)
    for tag in monitor.history:
        assert not np.isinf(monitor.history[tag].values).any(), tag
    assert np.isnan(monitor.history["spectrum/log2_spectral_condition"].values[:, 1]).all()


class Partly(nn.Module):
    """A layer that takes no part in the loss beside two that do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.idle = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3)), nn.Linear(5, 2)

    def forward(self, x):
        return self.net(x)


def test_an_absent_gradient_is_not_a_zero_gradient():
    model = Partly()
    nn.init.zeros_(model.net[2].weight)  # its input layer has a gradient, and it is zero
    batch = next(iter(batches()))
    loss_fn = lambda m, b: cross_entropy(m(b[0]), b[1])  # noqa: E731
    for backward in (False, True):
        if backward:
            loss_fn(model, batch).backward()
        found = measure(model, batch, loss_fn=loss_fn, certify=False)
        assert math.isnan(found["gradient/l2"]["idle.weight"]) and math.isnan(found["gradient/dual"]["idle.bias"])
        assert found["gradient/l2"]["net.0.weight"] == 0 and found["gradient/norm"] > 0
    reader = GradientReader(describe_layers(model), "sign")
    reader.begin(1)
    readings = reader.read().wait()
    absent = ~readings.present
    assert absent.tolist() == [False] * 4 + [True] * 2 and readings.finite and not readings.nonfinite.any()
    for row in (readings.l1, readings.l2, readings.dual, readings.difference_l2, readings.inner):
        assert np.isnan(row[absent]).all()
    assert np.isfinite(readings.l2[~absent]).all()
    monitor = GradientMonitor(every_n_steps=1, strict=True)
    fit(Classifier(model), [monitor], steps=2)
    table = monitor.history["gradient/l2"]
    assert np.isnan(table.values[:, 4:]).all() and np.isfinite(table.values[:, :4]).all()
    assert np.isfinite(monitor.history["gradient/norm"].values).all()


@pytest.mark.parametrize("method", ["lanczos", "power"])
@pytest.mark.parametrize("scale", [1e-36, 1e-39, 1e-40, 1e-42])
def test_eigenvalues_below_the_smallest_normal_number(scale, method):
    """Where digits are left the value is right, where none are it has not converged; bounds hold all along."""
    net, (x, y) = mlp(), next(iter(batches()))
    names, params = zip(*net.named_parameters(), strict=True)

    def loss(flat):
        pieces = flat.split([p.numel() for p in params])
        weights = {name: piece.view_as(p) for name, piece, p in zip(names, pieces, params, strict=True)}
        return cross_entropy(torch.func.functional_call(net, weights, (x.double(),)), y)

    hessian = torch.autograd.functional.hessian(loss, torch.cat([p.detach().double().flatten() for p in params]))
    true = float(torch.linalg.eigvalsh(hessian)[-1])
    operator = HessianOperator(lambda: scale * cross_entropy(net(x), y), net)
    found = top_eigenvalues(operator, method=method, max_matvecs=200)
    assert found.converged == (scale >= 1e-40)
    if found.converged:
        assert float(found.values[0]) / scale == pytest.approx(true, rel=0.02)
    bounds = top_eigenvalues(operator, certify=True)
    assert bounds.converged == (scale >= 1e-40) and bounds.lower / scale <= true
    assert bounds.upper is None or true <= bounds.upper / scale
