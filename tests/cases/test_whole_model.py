"""Part of a model passing for the whole: complex, integer, frozen weights, roles, and optimizers that hold a part."""

import io
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dynamon import describe_layers, measure
from dynamon.callbacks import (
    DynamicsMonitor,
    GradientMonitor,
    LayerwiseLR,
    NoiseAdaptiveLR,
    SharpnessMonitor,
    WeightMonitor,
)
from dynamon.curvature import HessianOperator, critical_sharpness, top_eigenvalues, trace
from dynamon.curvature.operators.preconditioner import preconditioner
from dynamon.optim import LayerwiseRates
from dynamon.rates import FixedRates, NoiseAdaptiveRates
from dynamon.stability import stability_ratio
from tests.helpers import Classifier, batches, fit, mlp, same_weights

X = torch.randn(16, 12, generator=torch.Generator().manual_seed(0))
Y = X.roll(3, 1) + 0.1


class Filter(nn.Module):
    """``irfft(rfft(x) w)``: complex weights, and maybe a real gain after them; 12 numbers in, 12 out."""

    def __init__(self, gain=True, dtype=torch.complex64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w = nn.Parameter((0.3 * torch.randn(7, generator=generator, dtype=torch.complex128)).to(dtype))
        self.gain = nn.Parameter(torch.ones(1, dtype=dtype.to_real())) if gain else None

    def forward(self, x):
        out = torch.fft.irfft(torch.fft.rfft(x) * self.w, n=12)
        return out if self.gain is None else out * self.gain


class Regression(Classifier):
    def training_step(self, batch, batch_idx):
        return (self.network(batch[0]) - batch[1]).square().sum(-1).mean()


def data(dtype=torch.float32):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X.to(dtype), Y.to(dtype)), batch_size=16)


def flat(parameters):
    return torch.cat([torch.view_as_real(p.detach()).flatten() if p.is_complex() else p.detach().flatten()
                      for p in parameters])  # fmt: skip


def output_of(numbers, gain=True):
    """What :class:`Filter` makes of the inputs as a function of its real numbers, in float64."""
    w = torch.view_as_complex(numbers[:14].view(7, 2))
    return torch.fft.irfft(torch.fft.rfft(X.double()) * w, n=12) * (numbers[14] if gain else 1.0)


def loss_of(numbers, gain=True):
    return (output_of(numbers, gain) - Y.double()).square().sum(-1).mean()


def dense(module, gain=True):
    numbers = flat(module.parameters()).double()
    return torch.autograd.functional.hessian(lambda v: loss_of(v, gain), numbers), numbers


def loss_fn(module, batch):
    return (module(batch[0]) - batch[1]).square().sum(-1).mean()


@pytest.mark.parametrize("backend", ["double_backward", "finite_difference"])
def test_hessian_products_are_those_of_the_real_numbers(backend):
    model = Filter(dtype=torch.complex128)
    exact, numbers = dense(model)
    operator = HessianOperator(lambda: loss_fn(model, (X.double(), Y.double())), model, backend=backend)
    assert operator.shape == (15, 15) and operator.dtype == torch.float64
    torch.testing.assert_close(operator @ torch.eye(15, dtype=torch.float64), exact, rtol=1e-5, atol=1e-7)
    gradient = torch.autograd.functional.jacobian(loss_of, numbers)
    torch.testing.assert_close(operator.gradient, gradient)
    top = torch.linalg.eigvalsh(exact)[-1].item()
    assert float(top_eigenvalues(operator, tol=1e-6).values[0]) == pytest.approx(top, rel=1e-5)
    assert trace(operator, num_vectors=400).value == pytest.approx(exact.trace().item(), rel=0.1)
    block = operator.block("w")
    torch.testing.assert_close(block @ torch.eye(14, dtype=torch.float64), exact[:14, :14], rtol=1e-5, atol=1e-7)
    before = flat(model.parameters())
    step = -0.02 * operator.gradient
    critical = critical_sharpness(lambda: loss_fn(model, (X.double(), Y.double())), model, step, tol=1e-3).multiple
    along = torch.stack([loss_of(numbers + c * step) for c in (0.999 * critical, 1.001 * critical)])
    assert along[0] < loss_of(numbers) < along[1] and torch.equal(flat(model.parameters()), before)


@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam", "amsgrad", "rmsprop"])
def test_the_stability_ratio_counts_both_parts(kind, gain):
    make = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
        "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        "adam": lambda p: torch.optim.AdamW(p, lr=0.05),
        "amsgrad": lambda p: torch.optim.Adam(p, lr=0.05, amsgrad=True),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.05),
    }[kind]
    monitor = SharpnessMonitor(every_n_steps=1, probe_fraction=1.0, tol=1e-4, strict=True)
    module = Regression(Filter(gain), make)
    run = fit(module, [monitor], data=data(), steps=3)
    exact, _ = dense(module.network, gain)
    optimizer, states = run.optimizers[0], [run.optimizers[0].state[p] for p in module.parameters()]
    moments = {"adam": "exp_avg_sq", "amsgrad": "max_exp_avg_sq", "rmsprop": "square_avg"}
    if kind in moments:
        v = flat([state[moments[kind]] for state in states]).double()
    size = len(exact)
    scale = {
        "sgd": lambda: torch.full((size,), 0.05 / 2, dtype=torch.float64),
        "momentum": lambda: torch.full((size,), 0.05 / 2 / 1.9, dtype=torch.float64),
        "adam": lambda: 0.05 * 0.1 / ((2 - 5e-4) * 1.9) / (((v / (1 - 0.999**3)).sqrt() + 1e-8) * (1 - 0.9**3)),
        "amsgrad": lambda: 0.05 * 0.1 / (2 * 1.9) / (((v / (1 - 0.999**3)).sqrt() + 1e-8) * (1 - 0.9**3)),
        "rmsprop": lambda: 0.05 / 2 / (v.sqrt() + 1e-8),
    }[kind]().sqrt()
    scaled = scale[:, None] * exact * scale
    # The imaginary parts of the first and the last frequency do not move: no second moment, no row.
    keep = torch.isfinite(scale)
    expected = torch.linalg.eigvalsh(scaled[keep][:, keep])[-1].item()
    with torch.enable_grad():
        loss = lambda: loss_fn(module.network, (X, Y))  # noqa: E731
        found = stability_ratio(loss, list(module.parameters()), optimizer, tol=1e-5)
    assert float(found.values[0]) == pytest.approx(expected, rel=1e-3)
    assert monitor.history["sharpness/stability_ratio"].values[-1] == pytest.approx(expected, rel=1e-3)
    if kind == "adam":
        assert preconditioner(optimizer, list(module.parameters())).shape == (size,)


def test_every_headline_counts_complex_weights():
    """Against pairs of real numbers put together by hand, at every step."""
    seen = {"gradients": [], "weights": []}

    class Watched(Regression):
        def on_before_optimizer_step(self, optimizer):
            seen["gradients"].append(flat([p.grad for p in self.parameters()]).double())
            seen["weights"].append(flat(self.parameters()).double())

    monitor = DynamicsMonitor(every_n_steps=1, budget=None, strict=True)
    module = Watched(Filter(), lambda p: torch.optim.Adam(p, lr=0.05))
    fit(module, [monitor], data=data(), steps=5)
    assert monitor.failures == 0
    h, (before, now) = monitor.history, seen["gradients"][-2:]
    weights = [*seen["weights"], flat(module.parameters()).double()]
    last, previous = weights[-1] - weights[-2], weights[-2] - weights[-3]
    assert h["gradient/norm"].values[-1] == pytest.approx(now.norm().item(), rel=1e-5)
    assert h["gradient/norm_clipped"].values[-1] == pytest.approx(now.norm().item(), rel=1e-5)
    assert h["gradient/norm_l1"].values[-1] == pytest.approx(now.abs().sum().item(), rel=1e-5)
    assert h["gradient/cosine"].values[-1] == pytest.approx(
        (now @ before / now.norm() / before.norm()).item(), abs=1e-4
    )
    cosine = last @ previous / last.norm() / previous.norm()
    assert h["update/cosine"].values[-1] == pytest.approx(cosine.item(), abs=1e-4)
    rows = {name: i for i, name in enumerate(h["gradient/l2"].layers)}
    w = slice(0, 14)
    assert h["gradient/l2"].values[-1, rows["network.w"]] == pytest.approx(now[w].norm().item(), rel=1e-5)
    assert h["gradient/dual"].values[-1, rows["network.w"]] == pytest.approx(now[w].abs().sum().item(), rel=1e-5)
    rms = lambda t: t.square().mean().sqrt().item()  # noqa: E731
    table = {tag: h[tag].values[-1, rows["network.w"]] for tag in h if h[tag].layers}
    assert table["weight/frobenius"] == pytest.approx(weights[-1][w].norm().item(), rel=1e-5)
    assert table["weight/rms"] == table["weight/operator"] == pytest.approx(rms(weights[-1][w]), rel=1e-5)
    assert table["update/operator"] == pytest.approx(rms(last[w]), rel=1e-4)
    assert table["update/ratio"] == pytest.approx(rms(last[w]) / rms(weights[-1][w]), rel=1e-4)
    assert math.isnan(table["spectrum/sigma_max"])


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_every_sharpness_counts_complex_weights(kind):
    quantities = ["hessian", "trace", "directional", "critical", "blocks", "ggn", "preconditioned", "subspace"]

    def outputs(module, batch):
        found = module.network(batch[0])
        return found, (found - batch[1]).square().sum(-1).mean()

    monitor = SharpnessMonitor(1, quantities=quantities, probe_fraction=1.0, tol=1e-4, strict=True, outputs=outputs)
    steps = []

    class Watched(Regression):
        def on_train_batch_start(self, batch, batch_idx):
            steps.append(flat(self.parameters()).double())

    module = Watched(Filter(), lambda p: kind(p, lr=0.02))
    fit(module, [monitor], data=data(), steps=3)
    exact, numbers = dense(module.network)
    step, last = numbers - steps[-1], {tag: monitor.history[tag].values[-1] for tag in monitor.history}
    top = torch.linalg.eigvalsh(exact)
    assert last["sharpness/hessian_max"] == pytest.approx(top[-1].item(), rel=1e-3)
    along = (step @ exact @ step / (step @ step)).item()
    assert last["sharpness/directional"] == pytest.approx(along, rel=1e-3)
    largest = step.abs().max() if kind is torch.optim.Adam else step.norm()
    assert last["sharpness/directional_norm"] == pytest.approx((step @ exact @ step / largest**2).item(), rel=1e-3)
    blocks = {"network.w": exact[:14, :14], "network.gain": exact[14:, 14:]}
    expected = [torch.linalg.eigvalsh(blocks[name])[-1].item() for name in monitor.history["sharpness/block"].layers]
    assert last["sharpness/block"].tolist() == pytest.approx(expected, rel=2e-2)
    start = steps[-1].requires_grad_()
    multiple = critical_sharpness(lambda: loss_of(start), [start], step).multiple
    assert last["sharpness/critical_multiple"] == pytest.approx(multiple, rel=1e-2)
    assert abs(last["sharpness/trace"] - exact.trace().item()) <= 5 * last["sharpness/trace_error"] + 1e-3
    jacobian = torch.autograd.functional.jacobian(output_of, numbers).flatten(0, -2)
    ggn = torch.linalg.eigvalsh(jacobian.T @ jacobian * 2 / len(X))[-1].item()
    assert last["sharpness/ggn_max"] == pytest.approx(ggn, rel=1e-3) and monitor.failures == 0


def test_measure_counts_complex_weights():
    model = Filter(dtype=torch.complex128)
    found = measure(model, (X.double(), Y.double()), loss_fn=loss_fn, tol=1e-5)
    exact, numbers = dense(model)
    gradient = torch.autograd.functional.jacobian(loss_of, numbers)
    assert found["sharpness/hessian_max"] == pytest.approx(torch.linalg.eigvalsh(exact)[-1].item(), rel=1e-4)
    assert found["gradient/norm"] == pytest.approx(gradient.norm().item())
    assert found["gradient/dual"] == {
        "w": pytest.approx(gradient[:14].abs().sum().item()),
        "gain": pytest.approx(gradient[14].abs().item()),
    }
    assert found["weight/frobenius"]["w"] == pytest.approx(numbers[:14].norm().item(), rel=1e-6)


def test_monitors_leave_complex_training_as_it_is_and_resume_it(tmp_path):
    make = lambda p: torch.optim.Adam(p, lr=0.05)  # noqa: E731
    plain, watched = Regression(Filter(), make), Regression(Filter(), make)
    fit(plain, [], data=data(), steps=6)
    fit(watched, [DynamicsMonitor(every_n_steps=1, strict=True)], data=data(), steps=6)
    assert same_weights(plain, watched)
    first, whole = (DynamicsMonitor(every_n_steps=2, budget=None, strict=True) for _ in range(2))
    run = fit(Regression(Filter(), make), [first], data=data(), steps=3, root=tmp_path, max_epochs=-1)
    run.save_checkpoint(tmp_path / "half.ckpt")
    fit(Regression(Filter(), make), [whole], data=data(), steps=6, max_epochs=-1)
    second = DynamicsMonitor(every_n_steps=2, budget=None, strict=True)
    resumed = Regression(Filter(), make)
    fit(resumed, [second], data=data(), steps=6, max_epochs=-1, ckpt_path=tmp_path / "half.ckpt")
    assert same_weights(resumed, plain) and "network.w" in whole.history["noise/dual"].layers
    for tag in ("gradient/l2", "noise/dual", "update/ratio", "gradient/cosine"):
        np.testing.assert_allclose(second.history[tag].values[-1], whole.history[tag].values[-1], rtol=1e-6)


def test_steering_leaves_complex_weights_at_ratio_one_and_headlines_count_them(caplog):
    steered, monitor = LayerwiseLR(FixedRates({"*": 0.5})), GradientMonitor(every_n_steps=1, strict=True)
    noisy = NoiseAdaptiveLR(warmup=0)
    norms = []

    class Watched(Regression):
        def on_before_optimizer_step(self, optimizer):
            norms.append(flat([p.grad for p in self.parameters()]).norm().item())

    sgd = lambda p: torch.optim.SGD(p, lr=0.01)  # noqa: E731
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        one = Watched(Filter(), sgd)
        start = flat([one.network.w]), flat([one.network.gain])
        fit(one, [steered], data=data(), steps=1)
    free = Regression(Filter(), sgd)
    fit(free, [], data=data(), steps=1)
    assert torch.equal(one.network.w, free.network.w) and set(steered.ratios) == {"network.gain"}
    full = (flat([free.network.gain]) - start[1]).item()
    assert (flat([one.network.gain]) - start[1]).item() == pytest.approx(full / 2, rel=1e-4)
    assert caplog.text.count("1 complex weights keep ratio 1, first network.w") == 1
    norms.clear()
    fit(Watched(Filter(), sgd), [noisy, monitor], data=data(), steps=4)
    assert monitor.history["gradient/norm"].values.tolist() == [pytest.approx(n, rel=1e-5) for n in norms]


def test_steering_a_model_of_complex_weights_alone_costs_a_sentence():
    module = Regression(Filter(gain=False), lambda p: torch.optim.SGD(p, lr=0.01))
    with pytest.warns(UserWarning, match="does not steer 1 of the optimizers: they hold no real floating point"):
        fit(module, [NoiseAdaptiveLR()], data=data(), steps=3)
    free = Regression(Filter(gain=False), lambda p: torch.optim.SGD(p, lr=0.01))
    fit(free, [], data=data(), steps=3)
    assert same_weights(module, free)
    with pytest.raises(ValueError, match="nothing to steer"):
        LayerwiseRates(torch.optim.SGD(module.parameters(), lr=0.1), NoiseAdaptiveRates(), module)


@pytest.mark.parametrize("monitor", [GradientMonitor, WeightMonitor, SharpnessMonitor, DynamicsMonitor])
def test_a_model_without_anything_measurable_trains_and_says_so(monitor):
    class Eight(nn.Module):
        """All that is trained is in eight bits, and moved by hand."""

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3, 8).to(torch.float8_e4m3fn))

        def forward(self, x):
            return (x @ self.w.detach().float().T).requires_grad_()

    module = Classifier(Eight(), lambda p: torch.optim.SGD(p, lr=0.1))
    callback = monitor(every_n_steps=1, strict=True)
    with pytest.warns(UserWarning, match=f"{monitor.__name__} is off: float8_e4m3fn cannot be measured"):
        run = fit(module, [callback], steps=3)
    assert run.global_step == 3 and len(list(callback.history)) == 0


def test_what_cannot_be_measured_is_said_with_the_share_that_is(caplog):
    class Mixed(nn.Module):
        """24 of 51 trained numbers are in eight bits."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(8, 3)
            self.small = nn.Parameter(torch.ones(3, 8).to(torch.float8_e4m3fn))
            self.table = nn.Parameter(torch.ones(9, dtype=torch.int8), requires_grad=False)

        def forward(self, x):
            return self.linear(x)

    monitor = GradientMonitor(every_n_steps=1, strict=True)
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fit(Classifier(Mixed(), lambda p: torch.optim.SGD(p, lr=0.1)), [monitor], steps=2)
    assert "leaves out 2 layers in float8_e4m3fn, int8, first network.small" in caplog.text
    assert "Whole-model readings are of 52.9% of the trained parameters." in caplog.text
    assert len(monitor.history["gradient/norm"]) == 2


def frozen(network):
    """The first layer has no gradient."""
    network[0].requires_grad_(False)


def left_to_no_optimizer(network):
    """The first layer is trained by nobody, and has gradients all the same."""


@pytest.mark.parametrize("prepare", [frozen, left_to_no_optimizer])
def test_headlines_are_of_what_is_trained(prepare):
    network = mlp()
    prepare(network)
    norms = []

    class Partly(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.network[3].parameters(), lr=0.05)

        def on_before_optimizer_step(self, optimizer):
            norms.append(flat([p.grad for p in self.network[3].parameters()]).norm().item())

    module = Partly(network)
    monitor = DynamicsMonitor(every_n_steps=1, budget=None, strict=True)
    run = fit(module, [monitor], steps=3, data=batches(64, 64))
    assert monitor.history["gradient/norm"].values.tolist() == [pytest.approx(n, rel=1e-5) for n in norms]
    head, batch = network[3], next(iter(batches(64, 64)))
    inputs = torch.tanh(network[0](batch[0])).detach().double()

    def loss(numbers):
        return cross_entropy(inputs @ numbers[:48].view(3, 16).T + numbers[48:], batch[1])

    exact = torch.autograd.functional.hessian(loss, flat(head.parameters()).double())
    top = torch.linalg.eigvalsh(exact)[-1].item()
    found = measure(module, batch, optimizer=run.optimizers[0], tol=1e-4)
    assert found["sharpness/hessian_max"] == pytest.approx(top, rel=1e-3)
    assert found["sharpness/stability_ratio"] == pytest.approx(top * 0.05 / 2, rel=1e-3)
    gradient = torch.autograd.functional.jacobian(loss, flat(head.parameters()).double())
    assert found["gradient/norm"] == pytest.approx(gradient.norm().item(), rel=1e-4)
    with pytest.raises(ValueError, match="the optimizer holds no trainable parameter of"):
        measure(module, batch, optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))


def test_measure_marks_what_did_not_converge_and_writes_tags_that_monitors_write():
    model, batch = mlp(), next(iter(batches(64, 64)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=0.1)  # two solves
    classify = lambda m, b: cross_entropy(m(b[0]), b[1])  # noqa: E731
    found = measure(model, batch, loss_fn=classify, optimizer=optimizer, tol=1e-12, certify=False)
    for tag in ("sharpness/hessian_max", "sharpness/stability_ratio"):
        assert tag not in found and found[f"{tag}_unconverged"] > 0
    monitor = DynamicsMonitor(preset="full", every_n_steps=1)
    known = {tag for meter in monitor._meters for tag in (*meter.tags, *meter.quantities)}
    conditional = {"spectrum/convolution_lower", "spectrum/convolution_upper"}
    assert set(found) <= known | conditional
    converged = measure(model, batch, loss_fn=classify, optimizer=optimizer)
    assert set(converged) <= known | conditional and converged["sharpness/hessian_max"] > 0


class LlamaRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 6))


class Extras(nn.Module):
    """Parameters that modules of vision and language models hold by themselves."""

    def __init__(self):
        super().__init__()
        shapes = {
            "gamma": (4, 1, 1), "layer_scale_1": (2, 4), "scale_shift_table": (6, 8), "expert_bias": (4, 8),
            "A_log": (8, 4), "cls_token": (1, 1, 8), "register_tokens": (1, 4, 8), "mixing": (3, 4),
            "prompt_proj": (3, 4), "relative_position_bias_table": (25, 4), "experts": (4, 8, 8),
            "pos_embed": (1, 9, 8),
        }  # fmt: skip
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.ones(shape)))


def test_elementwise_gains_are_vectors_whatever_their_shape():
    model = nn.ModuleDict(
        {
            "layer_norm": nn.LayerNorm([2, 5]),
            "rms_norm": nn.RMSNorm([3, 4]),
            "group_norm": nn.GroupNorm(2, 4),
            "instance_norm": nn.InstanceNorm2d(4, affine=True),
            "batch_norm": nn.BatchNorm2d(4),
            "llama": LlamaRMSNorm(),
            "prelu": nn.PReLU(4),
            "attention": nn.MultiheadAttention(8, 2, add_bias_kv=True),
            "bilinear": nn.Bilinear(3, 4, 5),
            "depthwise": nn.Conv2d(4, 4, 1, groups=4),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
            "extras": Extras(),
            "head": nn.Linear(4, 6),
        }
    )
    roles = {layer.name: layer.role for layer in describe_layers(model)}
    tables = {"pos_embed", "register_tokens", "relative_position_bias_table"}
    matrices = {"experts", "mixing", "prompt_proj"}
    expected = {
        **{f"extras.{n}": "vector" for n, _ in model["extras"].named_parameters()},
        **{f"extras.{n}": "embedding" for n in tables},
        **{f"extras.{n}": "hidden" for n in matrices},
        **{n: "vector" for n in roles if "norm" in n.split(".")[0] and "original1" not in n},
        "llama.weight": "vector",
        "prelu.weight": "vector",
        "attention.in_proj_weight": "hidden",
        "attention.bias_k": "vector",
        "attention.bias_v": "vector",
        "attention.out_proj.weight": "hidden",
        "bilinear.weight": "hidden",
        "depthwise.weight": "conv",
        "normed.parametrizations.weight.original1": "hidden",
        "head.weight": "head",
    }
    assert {name: roles[name] for name in expected} == expected
    assert all(role == "vector" for name, role in roles.items() if name.endswith("bias"))


def test_gains_of_two_dimensions_have_no_spectrum():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.out = nn.LayerNorm([2, 4]), nn.Linear(8, 3)

        def forward(self, x):
            return self.out(self.norm(x.view(-1, 2, 4)).flatten(1))

    monitor = WeightMonitor(every_n_steps=1, strict=True)
    fit(Classifier(Normed()), [monitor], steps=2)
    table = monitor.history["spectrum/sigma_max"]
    known = dict(zip(table.layers, np.isfinite(table.values[-1]), strict=True))
    assert known == {"network.norm.weight": False, "network.norm.bias": False, "network.out.weight": True,
                     "network.out.bias": False}  # fmt: skip


def test_a_complex_model_saves_states_that_load_safely():
    monitor = DynamicsMonitor(every_n_steps=2, budget=None, strict=True)
    fit(Regression(Filter(), lambda p: torch.optim.Adam(p, lr=0.05)), [monitor], data=data(), steps=4, max_epochs=-1)
    kept = monitor.state_dict()["gradient"]
    assert kept["gradients"]["previous"]["network.w"].shape == (7, 2) and kept["weights"]["network.w"].is_complex()
    buffer = io.BytesIO()
    torch.save(monitor.state_dict(), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True).keys() == monitor.state_dict().keys()
