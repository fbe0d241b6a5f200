"""Evaluations of the probe are functions of the weights: state, casts, scales and compiled graphs do not move them."""

import copy
import math
import random
from argparse import Namespace
from collections import Counter, OrderedDict, UserDict, UserList, defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as hooked_spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from dynamon import measure
from dynamon.callbacks import DynamicsMonitor, SharpnessMonitor, WeightMonitor
from dynamon.curvature import (
    EigenTracker,
    GGNOperator,
    HessianOperator,
    NoSecondDerivativeError,
    critical_sharpness,
    spectral_density,
    top_eigenvalues,
)
from dynamon.curvature.operators.preconditioner import preconditioner
from dynamon.isolation.preserve import preserve_state
from dynamon.optim import Lanton
from dynamon.spectra.power_law import power_law
from dynamon.stability import stability_ratio
from tests.helpers import Classifier, batches, fit, mlp, same_weights

# ---- state that moves with every evaluation ----------------------------------------------------------------

GENERATOR = torch.Generator().manual_seed(5)
X, Y = torch.randn(16, 8, generator=GENERATOR), torch.randint(3, (16,), generator=GENERATOR)


class RunningScale(nn.Module):
    """Divides by a running average that each pass moves before it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        self.scale.mul_(0.7).add_(0.3 * x.detach().abs().mean())
        return x / self.scale


class Queue(nn.Module):
    """Adds the mean of the last activations, kept in a buffer with a pointer and rebound each time."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("held", torch.zeros(4, 8))
        self.place = 0

    def forward(self, x):
        held = self.held.clone()
        held[self.place % 4] = x.detach().mean(0)
        self.place += 1
        self.held = held
        return x + held.mean(0)


class Codebook(nn.Module):
    """Vector quantisation, straight through, with a codebook that follows by moving averages."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(6, 8, generator=torch.Generator().manual_seed(1)))

    def forward(self, x):
        nearest = torch.cdist(x.detach(), self.codes).argmin(1)
        for i in nearest.unique().tolist():
            self.codes[i] = 0.8 * self.codes[i] + 0.2 * x.detach()[nearest == i].mean(0)
        return x + (self.codes[nearest] - x).square().mean() * x


class Warmup(nn.Module):
    """A strength that grows with a counter of passes, and a list of what was seen."""

    def __init__(self) -> None:
        super().__init__()
        self.passes, self.seen = 0, []

    def forward(self, x):
        self.passes += 1
        self.seen.append(float(x.detach().mean()))
        return x * (1 + 0.1 * self.passes + 0.01 * len(self.seen))


class Teacher(nn.Module):
    """An averaged copy of a layer, without gradients, that each pass moves."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(8, 8), nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            self.teacher.weight.lerp_(self.student.weight, 0.3)
        return self.student(x) * self.teacher(x)


class Recurrent(nn.Module):
    """A hidden state that goes on from batch to batch, in a tuple and written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.state = nn.GRUCell(8, 8), (torch.zeros(16, 8, dtype=torch.float64),)

    def forward(self, x):
        hidden = self.cell(x, self.state[0].to(x).clone())
        self.state[0].copy_(hidden.detach())
        return hidden


class Mixed(nn.Module):
    """Numbers of numpy and python: a mix of samples, and a layer that is skipped now and then."""

    def forward(self, x):
        x = np.random.beta(2, 2) * x + (1 - np.random.beta(2, 2)) * x.flip(0)
        return x * 2 if random.random() < 0.5 else x.tanh()


MOVING = {
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(8, 8)),
    "spectral norm, by hook": lambda: hooked_spectral_norm(nn.Linear(8, 8)),
    "running scale": RunningScale,
    "queue": Queue,
    "codebook": Codebook,
    "warmup": Warmup,
    "teacher": Teacher,
    "recurrent": Recurrent,
    "numpy and python": Mixed,
    "batch norm": lambda: nn.BatchNorm1d(8, momentum=None),
    "dropout": lambda: nn.Dropout(0.4),
}


def moving(kind, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), MOVING[kind](), nn.Linear(8, 3)).to(dtype).train()


def held(module):
    """Parameters that are trained, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def loss_of(module, dtype=torch.float64):
    return F.cross_entropy(module(X.to(dtype)), Y)


def seeded(seed=3):
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def gradient_from_the_start(module, step):
    """By hand: a deep copy, the weights moved, the seeds set, one gradient."""
    module = copy.deepcopy(module)
    weights = list(held(module).values())
    with torch.no_grad():
        for p, piece in zip(weights, step.split([p.numel() for p in weights]), strict=True):
            p.add_(piece.view_as(p))
    seeded()
    loss = loss_of(module)
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    pieces = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, weights, strict=True)]
    return float(loss.detach()), torch.cat([g.flatten() for g in pieces])


@pytest.mark.parametrize("kind", MOVING)
def test_differences_begin_each_evaluation_from_the_same_state(kind):
    module = moving(kind)
    before = copy.deepcopy(module.state_dict())
    v = torch.randn(sum(p.numel() for p in held(module).values()), generator=GENERATOR, dtype=torch.float64)
    step = 1e-6 * v / v.norm()
    expected = (gradient_from_the_start(module, step)[1] - gradient_from_the_start(module, -step)[1]) / 2e-6 * v.norm()
    value, gradient = gradient_from_the_start(module, 0 * v)
    seeded(9)
    torch_state, others = torch.get_rng_state(), (np.random.get_state()[1].tolist(), random.getstate())
    with preserve_state(module, seed=3):
        operator = HessianOperator(lambda: loss_of(module), held(module), backend="finite_difference")
        assert float(operator.loss) == value
        torch.testing.assert_close(operator.gradient, gradient)
        for _ in range(2):  # the second one begins where the first began
            torch.testing.assert_close(operator @ v, expected, rtol=1e-4, atol=1e-6)
        assert operator.product_error(v) < 1e-3
        assert float(HessianOperator(lambda: loss_of(module), held(module)).loss) == value
    assert all(torch.equal(a, b) for a, b in zip(before.values(), module.state_dict().values(), strict=True))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1].tolist(), random.getstate()) == others


@pytest.mark.parametrize("kind", MOVING)
def test_a_line_search_sees_one_function(kind):
    """Every evaluation's loss is that of a copy moved by hand."""
    module = moving(kind)
    _, gradient = gradient_from_the_start(module, torch.zeros(sum(p.numel() for p in held(module).values())).double())
    update, seen = -0.1 * gradient, []
    with preserve_state(module, seed=3):

        def loss():
            flat = torch.cat([p.detach().flatten() for p in held(module).values()])
            seen.append((flat, float(loss_of(module).detach())))
            return torch.tensor(seen[-1][1], dtype=torch.float64)

        critical_sharpness(loss, held(module), update)
    start = torch.cat([p.detach().flatten() for p in held(module).values()])
    assert len(seen) > 2
    for flat, value in seen:
        assert value == pytest.approx(gradient_from_the_start(module, flat - start)[0], rel=1e-12)


class Counts(dict):
    """A dictionary whose ``update`` adds, as ``Counter`` does."""

    def update(self, others):
        for key, value in others.items():
            self[key] = self.get(key, 0) + value


@pytest.mark.parametrize(
    "kind",
    [Counter, Counts, OrderedDict, lambda of: defaultdict(int, of)],
    ids=["Counter", "Counts", "OrderedDict", "defaultdict"],
)
def test_dictionaries_of_every_class_are_put_back(kind):
    """Each evaluation of the loss counts once, and weighs by the counts."""
    module = nn.Linear(8, 3).double()
    module.seen = kind({"calls": 1, "samples": 16})

    def loss():
        module.seen["calls"] += 1
        return module.seen["calls"] * F.cross_entropy(module(X.double()), Y)

    weights = list(module.parameters())
    hessian = dense_hessian_of(2 * F.cross_entropy(module(X.double()), Y), weights)
    true = float(torch.linalg.eigvalsh(hessian)[-1])
    with preserve_state(module):
        for backend in ("double_backward", "finite_difference", "double_backward"):
            found = top_eigenvalues(HessianOperator(loss, weights, backend=backend), tol=1e-4)
            assert float(found.values[0]) == pytest.approx(true, rel=1e-3)
    assert list(module.seen.items()) == [("calls", 1), ("samples", 16)]


HOLDERS = {
    UserDict: lambda held: held["calls"],
    UserList: lambda held: held[0],
    Namespace: lambda held: held.calls,
    SimpleNamespace: lambda held: held.calls,
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_what_holders_of_the_standard_library_count_is_counted_in_training_only(kind):
    """What they hold weighs the loss, so that weights would tell."""

    class Holding(Classifier):
        def training_step(self, batch, batch_idx):
            if kind in (UserDict, UserList):
                self.held["calls" if kind is UserDict else 0] += 1
            else:
                self.held.calls += 1
            return HOLDERS[kind](self.held) * super().training_step(batch, batch_idx)

    def run(monitors):
        module = Holding(mlp())
        module.held = kind([0]) if kind is UserList else kind(calls=0)
        fit(module, monitors, steps=4)
        return module

    monitor = SharpnessMonitor(every_n_steps=1, strict=True)
    plain, watched = run([]), run([monitor])
    assert HOLDERS[kind](watched.held) == HOLDERS[kind](plain.held) == 4 and same_weights(plain, watched)
    assert len(monitor.history["sharpness/probe_loss"]) == 4


def test_alone_a_loss_with_a_state_of_its_own_does_not_converge():
    """Without ``preserve_state`` nobody can put buffers back: the eigenvalue is marked."""
    module = moving("running scale", torch.float32)
    operator = HessianOperator(lambda: loss_of(module, torch.float32), held(module), backend="finite_difference")
    found = top_eigenvalues(operator)
    assert not found.converged and found.lower == -torch.inf


@pytest.mark.parametrize("kind", ["spectral norm", "batch norm", "dropout"])
def test_products_begin_alike_where_a_checkpoint_computes_again(kind):
    """Each product computes the checkpointed part once more, which moves its buffers."""
    module = moving(kind)

    def loss():
        hidden = module[1](module[0](X.double()))
        return F.cross_entropy(module[3](checkpoint(module[2], hidden, use_reentrant=False)), Y)

    with preserve_state(module, seed=3):
        operator = HessianOperator(loss, held(module))
        v = torch.randn(operator.shape[0], generator=GENERATOR, dtype=torch.float64)
        products = [operator @ v for _ in range(3)]
    assert torch.equal(products[0], products[1]) and torch.equal(products[0], products[2])


class Critic(Classifier):
    """Spectral normalisation everywhere; ``reentrant`` leaves differences of gradients only."""

    def __init__(self, reentrant, norm=parametrizations.spectral_norm):
        torch.manual_seed(0)
        layers = [norm(nn.Linear(a, b)) for a, b in ((8, 12), (12, 12), (12, 1))]
        super().__init__(
            nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2]), lambda p: torch.optim.SGD(p, lr=0.1)
        )
        self.reentrant, self.norm, self.states = reentrant, norm, []

    def again(self, state):
        """The same in float64, from a state."""
        other = Critic(self.reentrant, self.norm)
        other.network.load_state_dict(state)
        return other.double()

    def loss(self, batch):
        x = batch[0].clone().requires_grad_()
        z = checkpoint(self.network, x, use_reentrant=True) if self.reentrant else self.network(x)
        return torch.relu(1 - (batch[1].to(z.dtype) - 1) * z[:, 0]).mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def optimizer_step(self, *args, **kwargs):
        before = torch.cat([p.detach().flatten() for p in self.network.parameters()])
        super().optimizer_step(*args, **kwargs)
        after = torch.cat([p.detach().flatten() for p in self.network.parameters()])
        self.states.append((copy.deepcopy(self.network.state_dict()), after - before))


def dense_jacobian(critic, state, batch):
    """Of the gradient in float64: columns are central differences from copies that all begin alike."""
    sizes, other = [p.numel() for p in critic.network.parameters()], critic.again(state)

    def gradient(step):
        other.network.load_state_dict(state)
        other.zero_grad()
        with torch.no_grad():
            for p, piece in zip(other.network.parameters(), step.split(sizes), strict=True):
                p.add_(piece.view_as(p))
        other.loss((batch[0].double(), batch[1])).backward()
        return torch.cat([p.grad.flatten() for p in other.network.parameters()])

    units = 1e-6 * torch.eye(sum(sizes), dtype=torch.float64)
    return torch.stack([(gradient(e) - gradient(-e)) / 2e-6 for e in units], dim=1)


def dense_with_constants(critic, state, batch):
    """The Hessian in float64 with the vectors of the power iteration as constants, as autograd has them."""
    other = critic.again(state)
    return dense_hessian_of(other.loss((batch[0].double(), batch[1])), list(other.network.parameters()))


def dense_hessian_of(loss, weights):
    """Row by row, by autograd."""
    gradients = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
    entries = torch.cat([g.flatten() for g in gradients])
    rows = [torch.autograd.grad(e, weights, retain_graph=True, materialize_grads=True) for e in entries]
    return torch.stack([torch.cat([r.flatten() for r in row]) for row in rows])


@pytest.mark.parametrize(
    ("reentrant", "norm"),
    [
        (False, parametrizations.spectral_norm),
        (True, parametrizations.spectral_norm),
        (False, hooked_spectral_norm),
    ],
    ids=["new", "new, reentrant", "hook"],
)
def test_spectral_normalisation_under_the_monitor(reentrant, norm):
    module = Critic(reentrant, norm)
    monitor = SharpnessMonitor(every_n_steps=1, quantities=("hessian", "directional"), probe_fraction=1.0, tol=1e-3)
    fit(module, [monitor], steps=2)
    batch, history = next(iter(batches())), monitor.history
    shown = {tag: dict(zip(history[tag].steps.tolist(), history[tag].values.tolist(), strict=True)) for tag in history}
    tops = shown.get("sharpness/hessian_max", {}) | shown.get("sharpness/hessian_max_unconverged", {})
    for step, (state, update) in list(enumerate(module.states))[1:]:
        matrix, d = (dense_jacobian if reentrant else dense_with_constants)(module, state, batch), update.double()
        assert tops[step] == pytest.approx(float(torch.linalg.eigvalsh((matrix + matrix.mT) / 2)[-1]), rel=0.01)
        along = float(d @ matrix @ d / (d @ d))
        assert shown["sharpness/directional"][step] == pytest.approx(along, rel=0.02, abs=2e-3)


# ---- compiled code ----------------------------------------------------------------


class Counting:
    """A compile backend that notes which of its graphs runs."""

    def __init__(self):
        self.graphs, self.runs = 0, []

    def __call__(self, graph, inputs):
        self.graphs += 1
        number = self.graphs

        def run(*args):
            self.runs.append((number, torch.is_grad_enabled()))
            return graph(*args)

        return run


class Plain(Classifier):
    """Nothing but a loss, so that its training step can be compiled."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.network(batch[0]), batch[1])


class Wrapped(nn.Module):
    """A module of the user's own around a network."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)


def compiled_in_place(module, backend):
    module.network = Wrapped(module.network)
    module.network.compile(backend=backend)


def compiled_step(module, backend):
    module.training_step = torch.compile(module.training_step, backend=backend)


def compiled_part(module, backend):
    module.network[0] = torch.compile(module.network[0], backend=backend)


COMPILED = {
    "submodule": compiled_part,
    "in place": compiled_in_place,
    "training step": compiled_step,
}
EVERY_QUANTITY = (
    "stability_ratio", "hessian", "preconditioned", "directional", "critical", "batch", "bracket", "subspace", "trace",
)  # fmt: skip
MONITORS = {
    "economy": lambda: DynamicsMonitor("economy", every_n_steps=2),
    "standard": lambda: DynamicsMonitor("standard", every_n_steps=2),
    "full": lambda: DynamicsMonitor("full", every_n_steps=2),
    "everything": lambda: SharpnessMonitor(every_n_steps=2, quantities=EVERY_QUANTITY),
}


@pytest.mark.parametrize(
    ("how", "monitor"),
    [*((how, "everything") for how in COMPILED), *(("in place", preset) for preset in ("economy", "standard", "full"))],
)
def test_training_runs_the_same_compiled_graphs(how, monitor):
    """At every step, and nothing more is compiled."""
    seen, modules = [], []
    for callbacks in ([], [MONITORS[monitor]()]):
        torch._dynamo.reset()
        backend, module = Counting(), Plain(mlp())
        COMPILED[how](module, backend)
        fit(module, callbacks, steps=6)
        seen.append((backend.graphs, backend.runs))
        modules.append(module)
        assert not callbacks or callbacks[0].failures == 0
    assert seen[0] == seen[1] and len(seen[0][1]) >= 6
    assert same_weights(*modules)
    torch._dynamo.reset()


def test_functions_used_alone_leave_compiled_graphs_alone():
    torch._dynamo.reset()
    backend, module = Counting(), Plain(mlp())
    compiled_in_place(module, backend)
    batch = next(iter(batches()))
    loss = lambda size=8: F.cross_entropy(module.network(batch[0][:size]), batch[1][:size])  # noqa: E731
    loss().backward()
    before = backend.graphs, len(backend.runs)
    update = -0.1 * torch.cat([p.grad.flatten() for p in module.parameters()])
    critical_sharpness(lambda: loss(4), list(module.parameters()), update)
    for kind in ("finite_difference", "double_backward"):
        top_eigenvalues(HessianOperator(lambda: loss(4), list(module.parameters()), backend=kind))
    measure(module, (batch[0][:4], batch[1][:4]))
    assert (backend.graphs, len(backend.runs)) == before
    loss().backward()
    assert backend.graphs == before[0] and backend.runs[-1][0] == backend.runs[0][0]
    torch._dynamo.reset()


# ---- custom autograd functions ----------------------------------------------------------------


class FusedLoss(torch.autograd.Function):
    """Linear layer and cross-entropy in one, with gradients that the forward pass computes, as fused kernels do."""

    only_half = False

    @classmethod
    def forward(cls, ctx, h, w, y):
        if cls.only_half and h.dtype == torch.float32:
            raise RuntimeError("this kernel knows half precision only")
        with torch.enable_grad():
            hidden, weight = h.detach().requires_grad_(), w.detach().requires_grad_()
            loss = F.cross_entropy((hidden @ weight.t()).float(), y)
            slopes = torch.autograd.grad(loss, (hidden, weight))
        ctx.save_for_backward(*slopes)
        return loss.detach()

    @staticmethod
    def backward(ctx, d):
        one, other = ctx.saved_tensors
        return one * d, other * d, None


class HalfOnly(FusedLoss):
    only_half = True


class HiddenTanh(torch.autograd.Function):
    """A backward pass with the derivative that the forward pass kept beside the saved tensors."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.slope = 1 - y * y
        return y

    @staticmethod
    def backward(ctx, d):
        return d * ctx.slope


class HonestTanh(torch.autograd.Function):
    """The same with a backward pass that autograd can follow."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, d):
        (y,) = ctx.saved_tensors
        return d * (1 - y * y)


class FusedDouble(torch.autograd.Function):
    """Cross-entropy whose gradient the forward pass computes."""

    @staticmethod
    def forward(ctx, z, y):
        ctx.save_for_backward((z.softmax(1) - F.one_hot(y, z.shape[1])) / len(z))
        return F.cross_entropy(z, y)

    @staticmethod
    def backward(ctx, d):
        (slope,) = ctx.saved_tensors
        return d * slope, None


class Reversed(torch.autograd.Function):
    """Nothing kept: above suspicion."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, d):
        return -d


def small():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
    head = nn.Parameter(0.2 * torch.randn(10, 32))
    return net, head, torch.randn(256, 8), torch.randint(10, (256,))


NET, HEAD, INPUTS, LABELS = small()
WEIGHTS = {**dict(NET.named_parameters()), "head": HEAD}


def top(loss, dtype=torch.bfloat16, enabled=True, **arguments):
    with torch.autocast("cpu", dtype, enabled=enabled):
        operator = HessianOperator(loss, WEIGHTS, **arguments)
        return operator, top_eigenvalues(operator)


def plain_loss():
    return F.cross_entropy((NET(INPUTS) @ HEAD.t()).float(), LABELS)


TRUE_TOP = top_eigenvalues(HessianOperator(plain_loss, WEIGHTS), tol=1e-4)


def with_tanh(function):
    return lambda: F.cross_entropy((function.apply(NET[2](function.apply(NET[0](INPUTS)))) @ HEAD.t()).float(), LABELS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None], ids=str)
@pytest.mark.parametrize("loss", [lambda: FusedLoss.apply(NET(INPUTS), HEAD, LABELS), with_tanh(HiddenTanh)])
def test_a_custom_function_that_drops_out_is_seen_in_half_precision_too(dtype, loss):
    operator, found = top(loss, dtype or torch.bfloat16, dtype is not None)
    assert operator.backend == "finite_difference" and "drops out of the second derivative" in operator.reason
    assert found.converged and float(found.values[0]) == pytest.approx(float(TRUE_TOP.values[0]), rel=0.02)
    assert TRUE_TOP.converged


@pytest.mark.parametrize("function", [HonestTanh])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None], ids=str)
def test_a_custom_function_that_does_not_is_believed(dtype, function):
    operator, found = top(with_tanh(function), dtype or torch.bfloat16, dtype is not None)
    assert operator.backend == "double_backward" and operator.doubt is None
    assert float(found.values[0]) == pytest.approx(float(TRUE_TOP.values[0]), rel=0.03)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-14, 1e14, 1e22, 1e30])
@pytest.mark.parametrize("function", [HiddenTanh, HonestTanh])
def test_the_units_of_the_loss_do_not_decide_whether_a_custom_function_is_believed(scale, function):
    """Products with the gradient itself go with the square of the loss's scale, and leave float32."""
    operator, found = top(lambda: scale * with_tanh(function)(), enabled=False)
    assert operator.backend == ("finite_difference" if function is HiddenTanh else "double_backward")
    assert operator.doubt is None and found.converged
    assert float(found.values[0]) / scale == pytest.approx(float(TRUE_TOP.values[0]), rel=0.01)


def test_a_custom_function_is_compared_where_the_gradient_is_zero_too():
    """All weights zero, and as many of each class: the Hessian in the bias is diag(p) - p p^T, the gradient zero."""
    head = nn.Linear(8, 2).double()
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    labels = torch.arange(16) % 2
    inputs = torch.zeros(16, 8, dtype=torch.float64)
    operator = HessianOperator(lambda: FusedDouble.apply(head(inputs), labels), head)
    assert not operator.gradient.any() and operator.backend == "finite_difference"
    assert float(top_eigenvalues(operator).values[0]) == pytest.approx(0.5, rel=1e-3)  # of ((1, -1), (-1, 1)) / 4


def test_a_function_that_keeps_nothing_is_not_even_tried():
    calls = []

    def loss():
        calls.append(1)
        return F.cross_entropy(Reversed.apply(NET(INPUTS)) @ HEAD.t(), LABELS)

    assert HessianOperator(loss, WEIGHTS).doubt is None and len(calls) == 1


def test_hooks_on_modules_are_no_custom_functions_of_the_users():
    """``register_full_backward_hook`` puts a function of torch's own into the graph."""
    net, head, inputs, labels = small()
    inputs.requires_grad_()
    handle = net.register_full_backward_hook(lambda *_: None)
    with torch.autocast("cpu", torch.bfloat16):
        operator = HessianOperator(lambda: F.cross_entropy(net(inputs) @ head.t(), labels), [*net.parameters(), head])
        hooked = operator @ torch.ones(operator.shape[0])
        handle.remove()
        plain = HessianOperator(lambda: F.cross_entropy(net(inputs) @ head.t(), labels), [*net.parameters(), head])
        torch.testing.assert_close(hooked, plain @ torch.ones(operator.shape[0]), rtol=1e-2, atol=1e-3)
    assert operator.backend == "double_backward" and operator.doubt is None


def test_what_cannot_be_told_is_not_shown_as_converged():
    operator, found = top(lambda: HalfOnly.apply(NET(INPUTS), HEAD, LABELS))
    assert "HalfOnly" in operator.doubt and not found.converged
    assert found.lower == -torch.inf and found.upper is None


def test_parameters_in_half_precision_cannot_be_told_either():
    net, head, inputs, labels = small()
    net, head = net.bfloat16(), nn.Parameter(head.detach().bfloat16())
    loss = lambda: FusedLoss.apply(net(inputs.bfloat16()), head, labels)  # noqa: E731
    operator = HessianOperator(loss, [*net.parameters(), head])
    assert operator.doubt is not None and not top_eigenvalues(operator).converged


class FusedModule(Classifier):
    """The fused loss in training."""

    def __init__(self, function):
        super().__init__(mlp(), lambda p: torch.optim.SGD(p, lr=0.1))
        self.function = function

    def training_step(self, batch, batch_idx):
        return self.function.apply(self.network[:3](batch[0]), self.network[3].weight, batch[1])


@pytest.mark.parametrize("function", [FusedLoss, HalfOnly])
@pytest.mark.filterwarnings("ignore:.*may drop out of the second derivative")
def test_the_monitor_shows_the_right_eigenvalue_or_none(function):
    module = FusedModule(function)
    quantities = ("hessian", "directional", "batch", "trace")
    monitor = SharpnessMonitor(every_n_steps=1, quantities=quantities, probe_fraction=1.0)
    states = []
    module.on_train_batch_end = lambda *_: states.append(copy.deepcopy(module.network.state_dict()))
    fit(module, [monitor], steps=4, precision="bf16-mixed")
    shown = set(monitor.history)
    if function is HalfOnly:
        assert shown >= {"sharpness/critical_multiple"}
        assert not shown & {f"sharpness/{q}" for q in ("hessian_max", "directional", "batch", "trace", "hessian_min")}
        return
    network = mlp().double()
    network.load_state_dict(states[0])
    x, y = next(iter(batches()))
    weights = [*network[:3].parameters(), network[3].weight]
    loss = F.cross_entropy(network[:3](x.double()) @ network[3].weight.t(), y)
    true = float(torch.linalg.eigvalsh(dense_hessian_of(loss, weights))[-1])
    assert monitor.history["sharpness/hessian_max"].values[0] == pytest.approx(true, rel=0.03)


class CastInside(Classifier):
    """Autocast that ``training_step`` opens itself, around what has no second derivative."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        with torch.autocast("cpu", torch.bfloat16):
            h = checkpoint(self.network[:3], x.requires_grad_(), use_reentrant=True)
            return F.cross_entropy(self.network[3](h), y)


def test_nothing_is_shown_of_differences_that_are_lost_in_rounding():
    """Trace, density and blocks have no check of their own: without one they were noise, as if nothing were wrong."""
    quantities = ("hessian", "trace", "density", "blocks", "directional", "batch", "critical")
    monitor = SharpnessMonitor(every_n_steps=1, quantities=quantities, probe_fraction=1.0)
    with pytest.warns(UserWarning, match="finite differences at two step sizes differ by"):
        fit(CastInside(mlp()), [monitor], steps=3)
    shown = {tag for tag in monitor.history if tag.startswith("sharpness/")}
    assert shown <= {"sharpness/critical_multiple", "sharpness/critical", "sharpness/probe_loss",
                     "sharpness/probe_samples", "sharpness/matvecs"}  # fmt: skip
    assert "sharpness/critical_multiple" in shown


def test_a_fused_loss_of_the_outputs_is_not_taken_for_a_linear_one():
    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z, y):
            with torch.enable_grad():
                given = z.detach().requires_grad_()
                loss = F.cross_entropy(given, y)
                (slope,) = torch.autograd.grad(loss, given)
            ctx.save_for_backward(slope)
            return loss.detach()

        @staticmethod
        def backward(ctx, d):
            return ctx.saved_tensors[0] * d, None

    with pytest.raises(NoSecondDerivativeError, match="Fused"):
        GGNOperator(lambda: NET(INPUTS) @ HEAD.t(), lambda z: Fused.apply(z, LABELS), WEIGHTS)


@pytest.mark.parametrize("other", [lambda z: 1e-2 * torch.logsumexp(z, 1).square().mean(), lambda z: z.square().sum()])
def test_a_fused_loss_beside_another_term_is_not_taken_for_a_linear_one(other):
    """The curvature of the other term alone would pass for the whole."""
    inputs, labels = X.double(), Y
    layer = nn.Linear(8, 3).double()
    with pytest.raises(NoSecondDerivativeError, match="FusedDouble"):
        GGNOperator(lambda: layer(inputs), lambda z: FusedDouble.apply(z, labels) + other(z), layer)
    tanh = HonestTanh.apply
    honest = GGNOperator(lambda: layer(inputs), lambda z: F.cross_entropy(tanh(z), labels) + other(z), layer)
    loss = F.cross_entropy(layer(inputs).tanh(), labels) + other(layer(inputs))
    hessian = dense_hessian_of(loss, list(layer.parameters()))
    true = float(torch.linalg.eigvalsh(hessian)[-1])  # the outputs are linear in the weights: the two are the same
    assert float(top_eigenvalues(honest, tol=1e-4).values[0]) == pytest.approx(true, rel=1e-3)


# ---- determinism ----------------------------------------------------------------

NOT_DETERMINISTIC = (
    "cumsum", "histc", "kthvalue", "put_", "median.dim", "nanmedian.dim", "grid_sampler", "scatter_reduce.two",
    "max_unpool", "replication_pad", "upsample_bilinear2d_backward", "adaptive_avg_pool2d_backward", "_ctc_loss",
)  # fmt: skip


class Deterministic(TorchDispatchMode):
    """Raises where torch on a GPU does under ``use_deterministic_algorithms(True)``."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        floats = any(isinstance(a, torch.Tensor) and a.is_floating_point() for a in args)
        weighted = name.startswith("bincount") and len(args) > 1 and args[1] is not None
        allowed = (
            name.startswith("scatter_reduce") and {"sum", "amax", "amin", "mean"} & {*args, *(kwargs or {}).values()}
            if name.startswith("scatter_reduce")
            else False
        )
        if weighted or floats and not allowed and name.startswith(NOT_DETERMINISTIC):
            raise RuntimeError(f"{name} does not have a deterministic implementation")
        return func(*args, **(kwargs or {}))


def test_power_laws_are_fitted_without_cumulative_sums_on_the_device():
    values = torch.rand(2, 300, generator=GENERATOR, dtype=torch.float64) ** -2
    with Deterministic():
        found = power_law(values)
    assert (found.exponent - 1.5).abs().max() < 0.2


@pytest.mark.parametrize("preset", ["economy", "standard", "full"])
def test_every_reading_has_a_deterministic_implementation(preset):
    monitor = DynamicsMonitor(preset, every_n_steps=1, strict=True)
    with Deterministic():
        fit(
            Classifier(nn.Sequential(nn.Linear(8, 24), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3))),
            [monitor],
            steps=2,
        )
    assert monitor.failures == 0 and np.isfinite(monitor.history["spectrum/nuclear"].values).any()


@pytest.mark.parametrize("at", [1, 2, 10**9])
def test_a_full_spectrum_that_fails_leaves_the_plain_reading_alone(monkeypatch, at):
    """It fails ``at`` times: counted by itself, paused by itself after three in a row."""
    from dynamon.monitoring import weight_meter as weights

    calls, real = [], weights.layer_spectra

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) <= at:
            raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")
        return real(*args, **kwargs)

    monkeypatch.setattr(weights, "layer_spectra", failing)
    monkeypatch.setattr(weights, "FULL_EVERY", 2)
    monitor = WeightMonitor(every_n_steps=1)
    with pytest.warns(UserWarning, match="full spectra could not be measured: cumsum_cuda_kernel"):
        fit(Classifier(mlp()), [monitor], steps=10)
    assert len(monitor.history["weight/operator"].steps) == 10
    assert len(calls) == (3 if at > 10 else 5) and monitor.failures == min(at, 3)
    assert ("spectrum/nuclear" in monitor.history) == (at < 10)


# ---- half precision ----------------------------------------------------------------


def vocabulary():
    """A mean over many tokens and classes, whose slopes begin below the smallest number of float16."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4000, bias=False))
    nn.init.normal_(net[3].weight, std=0.02)
    return net, torch.randint(64, (256,)), torch.randint(4000, (256,))


def test_slopes_do_not_vanish_in_float16():
    net, x, y = vocabulary()
    params = dict(net.named_parameters())
    loss = lambda: F.cross_entropy(net(x).float(), y)  # noqa: E731
    v = torch.randn(sum(p.numel() for p in params.values()), generator=GENERATOR)
    truth = HessianOperator(loss, params)
    expected, gradient = float(v @ (truth @ v)), truth.gradient
    ggn = lambda: GGNOperator(lambda: net(x), lambda z: F.cross_entropy(z.float(), y), params)  # noqa: E731
    expected_ggn = float(v @ (ggn() @ v))
    with torch.autocast("cpu", torch.float16):
        operator, gauss_newton = HessianOperator(loss, params), ggn()
    assert float(v @ (operator @ v)) == pytest.approx(expected, rel=0.03)
    assert float(v @ (gauss_newton @ v)) == pytest.approx(expected_ggn, rel=0.03)
    assert float((operator.gradient - gradient).norm() / gradient.norm()) < 0.02
    length = 1e-6 * v  # the size of a vector does not matter either
    assert float(v @ (operator @ length)) == pytest.approx(1e-6 * expected, rel=0.03)


@pytest.mark.parametrize("size", [1e-18, 1e-12, 1e-9, 1e-3, 1.0, 100.0])
def test_a_scale_fits_the_size_of_the_loss(size):
    """Large losses and products: what does not fit is scaled less; slopes of a small loss are scaled more."""
    net, head, inputs, labels = small()
    params = [*net.parameters(), head]
    loss = lambda: size * F.cross_entropy((net(inputs) @ head.t()).float(), labels)  # noqa: E731
    expected = top_eigenvalues(HessianOperator(loss, params)).values[0]
    logits = lambda z: size * F.cross_entropy(z.float(), labels)  # noqa: E731
    expected_ggn = top_eigenvalues(GGNOperator(lambda: net(inputs) @ head.t(), logits, params)).values[0]
    with torch.autocast("cpu", torch.float16):
        operator = HessianOperator(loss, params)
        found = top_eigenvalues(operator)
        found_ggn = top_eigenvalues(GGNOperator(lambda: net(inputs) @ head.t(), logits, params))
    assert float(found.values[0]) == pytest.approx(float(expected), rel=0.03, abs=0)
    assert float(found_ggn.values[0]) == pytest.approx(float(expected_ggn), rel=0.03, abs=0)
    assert operator.gradient.isfinite().all()


def test_what_does_not_fit_at_any_scale_is_computed_in_full_precision():
    """The third power of what batch normalisation divides by, where a channel hardly varies."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    with torch.no_grad():
        net[0].weight.mul_(0.02)
    params = list(net.parameters())
    loss = lambda: F.cross_entropy(net(X).float(), Y)  # noqa: E731
    truth = top_eigenvalues(HessianOperator(loss, params), tol=1e-3)
    with torch.autocast("cpu", torch.float16):
        operator = HessianOperator(loss, params)
        found = top_eigenvalues(operator, tol=1e-3)
    assert "overflows in float16" in operator.reason
    assert float(found.values[0]) == pytest.approx(float(truth.values[0]), rel=0.01)


class Vocabulary(Classifier):
    def __init__(self):
        net, self.x, self.y = vocabulary()
        super().__init__(net, lambda p: torch.optim.SGD(p, lr=0.0))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.network(batch[0]).float(), batch[1])


def test_16_mixed_sharpness_is_that_of_float32():
    seen = []
    for plugin in ([], [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]):
        module = Vocabulary()
        monitor = SharpnessMonitor(every_n_steps=1, quantities=("hessian", "ggn", "batch", "trace"), probe_fraction=1.0)
        data = DataLoader(TensorDataset(module.x, module.y), 256)
        fit(module, [monitor], data, steps=1, plugins=plugin)
        history = monitor.history
        seen.append([float(history[f"sharpness/{t}"].values[0]) for t in ("hessian_max", "ggn_max", "batch", "trace")])
    assert seen[1] == pytest.approx(seen[0], rel=0.05)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_nothing_of_it_is_seen_by_training_in_16_mixed(checkpointed):
    """Weights, buffers, the gradient scaler: spectral normalisation, hooks that count and dropout included."""

    class Counted(Plain):
        def __init__(self):
            norm = parametrizations.spectral_norm(nn.Linear(16, 16))
            super().__init__(
                nn.Sequential(nn.Linear(8, 16), norm, nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 3))
            )
            self.passes, self.seen = 0, []
            self.network.register_forward_hook(lambda *_: setattr(self, "passes", self.passes + 1))
            self.network[4].register_full_backward_hook(
                lambda m, gi, go: self.seen.append(float(go[0].detach().norm()))
            )

        def training_step(self, batch, batch_idx):
            hidden = self.network[0](batch[0])
            if checkpointed:
                hidden = checkpoint(self.network[1:4], hidden, use_reentrant=False)
                return F.cross_entropy(self.network[4](hidden).float(), batch[1])
            return F.cross_entropy(self.network(batch[0]).float(), batch[1])

    seen = []
    for callbacks in ([], [SharpnessMonitor(every_n_steps=1, quantities=EVERY_QUANTITY)]):
        torch.manual_seed(0)
        module, scaler = Counted(), torch.amp.GradScaler("cpu", init_scale=2.0**12)
        fit(module, callbacks, steps=5, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        seen.append((module, scaler.state_dict(), module.passes, module.seen, torch.get_rng_state()))
        assert not callbacks or callbacks[0].failures == 0
    assert same_weights(seen[0][0], seen[1][0])
    assert seen[0][1:4] == seen[1][1:4] and torch.equal(seen[0][4], seen[1][4])


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_weights_in_half_precision_are_right_or_marked(precision):
    module = Plain(mlp(), lambda p: torch.optim.SGD(p, lr=0.0))
    monitor = SharpnessMonitor(every_n_steps=1, quantities=("hessian", "stability_ratio"), probe_fraction=1.0)
    fit(module, [monitor], steps=1, precision=precision)
    network = mlp().double()
    network.load_state_dict(module.network.state_dict())
    x, y = next(iter(batches()))
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float16
    loss = F.cross_entropy(network(x.to(dtype).double()), y)
    true = float(torch.linalg.eigvalsh(dense_hessian_of(loss, list(network.parameters())))[-1])
    assert monitor.history["sharpness/hessian_max"].values[0] == pytest.approx(true, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["mixed", "true"])
def test_bounds_allow_for_the_rounding_of_half_precision(dtype, how):
    net, head, inputs, labels = small()
    exact = [p.detach().double().requires_grad_() for p in (*net.parameters(), head)]

    def true_loss():
        h = torch.tanh(torch.tanh(inputs.double() @ exact[0].t() + exact[1]) @ exact[2].t() + exact[3])
        return F.cross_entropy(h @ exact[4].t(), labels)

    truth = float(top_eigenvalues(HessianOperator(true_loss, exact), tol=1e-6, max_matvecs=200).values[0])
    if how == "true":
        net, head, inputs = net.to(dtype), nn.Parameter(head.detach().to(dtype)), inputs.to(dtype)
    with torch.autocast("cpu", dtype, enabled=how == "mixed"):
        operator = HessianOperator(lambda: F.cross_entropy(net(inputs) @ head.t(), labels), [*net.parameters(), head])
        found = top_eigenvalues(operator, certify=True, tol=1e-3)
    assert operator.rounding == torch.finfo(dtype).eps
    assert found.lower < truth < found.upper
    assert found.upper - found.lower > torch.finfo(dtype).eps * truth
    assert (2 * operator).scaled(torch.ones(operator.shape[0])).rounding == operator.rounding


# ---- autocast's cache ----------------------------------------------------------------


@pytest.mark.parametrize("where", ["around everything", "around the loss"])
def test_differences_see_through_the_cache_of_autocast(where):
    net, head, inputs, labels = small()
    params = [*net.parameters(), head]
    autocast = lambda on: torch.autocast("cpu", torch.bfloat16, enabled=on, cache_enabled=True)  # noqa: E731

    def loss():
        with autocast(True):
            return F.cross_entropy((net(inputs) @ head.t()).float(), labels)

    update = -0.5 * HessianOperator(loss, params).gradient
    expected = critical_sharpness(lambda: F.cross_entropy(net(inputs) @ head.t(), labels), params, update).multiple
    with autocast(where == "around everything"):
        loss()  # fills the cache
        found = critical_sharpness(loss, params, update)
        operator = HessianOperator(loss, params, backend="finite_difference")
        product = operator @ operator.gradient
        graph = HessianOperator(loss, params)
    assert found.multiple == pytest.approx(expected, rel=0.2)
    assert float(product.norm()) > 0.1 * float((graph @ operator.gradient).norm()) > 0
    assert float((graph.gradient - operator.gradient).norm()) < 0.05 * float(graph.gradient.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_solvers_keep_their_own_precision_inside_of_autocast(dtype):
    """A matrix whose products are exact: what is made of them must not be rounded."""
    torch.manual_seed(0)
    matrix = torch.randn(60, 60, dtype=torch.float64)
    matrix = 1e5 * (matrix @ matrix.T).float()
    truth = torch.linalg.eigvalsh(matrix.double())
    w = torch.zeros(60, requires_grad=True)
    loss = lambda: (w * (matrix * w).sum(1)).sum() / 2  # noqa: E731
    with torch.autocast("cpu", dtype):
        found = top_eigenvalues(HessianOperator(loss, [w]), certify=True, tol=1e-5, max_matvecs=60)
        readings = measure(nn.Linear(60, 1), X, loss_fn=lambda m, _: m.weight.square().sum())
    assert float(found.values[0]) == pytest.approx(float(truth[-1]), rel=1e-5) and found.converged
    assert readings["sharpness/hessian_max"] == pytest.approx(2.0, rel=1e-5)


def test_an_operator_keeps_the_autocast_that_it_was_made_in():
    seen = []

    def loss():
        seen.append(torch.is_autocast_enabled("cpu"))
        return F.cross_entropy((NET(INPUTS) @ HEAD.t()).float(), LABELS)

    with torch.autocast("cpu", torch.bfloat16):
        inside = HessianOperator(loss, WEIGHTS, backend="finite_difference")
    outside = HessianOperator(loss, WEIGHTS, backend="finite_difference")
    seen.clear()
    inside @ inside.gradient
    with torch.autocast("cpu", torch.bfloat16):
        outside @ outside.gradient
    assert seen == [True, True, False, False]


def test_backward_passes_take_place_outside_of_autocast():
    """What a user keeps in float32 is differentiated in float32."""
    seen = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, d):
            seen.append(torch.is_autocast_enabled("cpu"))
            return d

    w = torch.ones(4, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        for backend in ("double_backward", "finite_difference"):
            HessianOperator(lambda: Watched.apply(w).pow(3).sum(), [w], backend=backend) @ torch.ones(16)
    assert seen and not any(seen)


# ---- noise of the loss ----------------------------------------------------------------


@pytest.mark.parametrize("rate", [10.0**-k for k in range(0, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None], ids=str)
def test_a_critical_multiple_is_right_or_not_known(rate, dtype):
    """The loss is float32, its logits are not: what is lost in their rounding is not a multiple of 0."""
    net, head, inputs, labels = small()
    params = [*net.parameters(), head]
    loss = lambda: F.cross_entropy((net(inputs) @ head.t()).float(), labels)  # noqa: E731
    exact = [p.detach().double() for p in params]

    def loss64(multiple):
        w = [
            p + multiple * u.view_as(p)
            for p, u in zip(exact, update.double().split([p.numel() for p in exact]), strict=True)
        ]
        h = torch.tanh(torch.tanh(inputs.double() @ w[0].t() + w[1]) @ w[2].t() + w[3])
        return float(F.cross_entropy(h @ w[4].t(), labels))

    update = -rate * HessianOperator(loss, params).gradient
    start, low, high = loss64(0), 0.1 / rate, 1000 / rate
    while high / low > 1.001:  # by bisection
        middle = (low * high) ** 0.5
        low, high = (middle, high) if loss64(middle) < start else (low, middle)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False):
        found = critical_sharpness(loss, params, update, rate=rate)
    assert np.isnan(found.multiple) or found.multiple == pytest.approx(low, rel=0.25)
    assert np.isnan(found.multiple) or rate < 1e-6 or found.lower <= found.multiple <= found.upper
    assert not np.isnan(found.multiple) or dtype is not None


def test_differences_that_are_lost_are_left_out_of_the_readings():
    """Late in training nothing but rounding is left of a step's effect."""
    monitor = SharpnessMonitor(every_n_steps=1, quantities=("critical",), probe_fraction=1.0)
    fit(Classifier(mlp(), lambda p: torch.optim.SGD(p, lr=1e-12)), [monitor], steps=3, precision="bf16-mixed")
    values = (
        monitor.history["sharpness/critical_multiple"].values
        if "sharpness/critical_multiple" in monitor.history
        else []
    )
    assert not any(value == 0 for value in values)


# ---- parameters, as people have them ----------------------------------------------------------------


def test_parameters_are_taken_as_a_sequence_or_a_mapping_everywhere():
    module = mlp()
    named, listed = dict(module.named_parameters()), list(module.parameters())
    optimizer = torch.optim.Adam(listed, lr=1e-2)
    loss = lambda: F.cross_entropy(module(X), Y)  # noqa: E731
    loss().backward()
    optimizer.step()
    ratios = {name: 0.5 for name in named if name.startswith("0.")}
    in_order = [ratios.get(name, 1.0) for name in named]
    found = [
        float(stability_ratio(loss, params, optimizer, ratios=r, tol=1e-4).values[0])
        for params, r in ((listed, in_order), (named, in_order), (named, ratios), (module, ratios))
    ]
    assert found == pytest.approx([found[0]] * 4)
    assert torch.equal(preconditioner(optimizer, named), preconditioner(optimizer, listed))
    with pytest.raises(ValueError, match="ratios by name need params as a mapping"):
        stability_ratio(loss, listed, optimizer, ratios=ratios)
    with pytest.raises(ValueError, match="'typo'"):
        stability_ratio(loss, named, optimizer, ratios={"typo": 1.0})
    with pytest.raises(ValueError, match="one number for each of the 4 parameters, got 1"):
        stability_ratio(loss, named, optimizer, ratios=[0.5])
    with pytest.raises(TypeError, match="params must be tensors, a mapping .* not None"):
        HessianOperator(loss, None)
    step = torch.ones(sum(p.numel() for p in listed))
    with pytest.raises(ValueError, match="NaN or infinity"):  # not 0, which would say that it leads uphill
        critical_sharpness(loss, named, math.nan * step)
    with pytest.raises(TypeError, match="update must be a tensor .*, got list"):
        critical_sharpness(loss, named, listed)
    for params in (named, listed, module):
        assert HessianOperator(loss, params).shape == (len(step), len(step))
        assert critical_sharpness(loss, params, -1e-2 * step).evaluations
    assert [len(g["params"]) for g in Lanton(named, lr=0.1).param_groups] == [4]


# ---- what a training step does to its own structure, optimizers and schedulers ------------------------------


class Grown(Classifier):
    """A layer joins in the middle of the run, each time that step comes."""

    def training_step(self, batch, batch_idx):
        if self.global_step == 7 and len(self.network) < 8:
            layer = nn.Linear(3, 3)
            self.network.append(layer)
            self.optimizers().add_param_group({"params": list(layer.parameters())})
        return super().training_step(batch, batch_idx)


class Renamed(Classifier):
    """A layer goes and comes back under another name."""

    def training_step(self, batch, batch_idx):
        if self.global_step == 7:
            self.other = self.network
            del self.network
        network = self.other if hasattr(self, "other") else self.network
        return F.cross_entropy(network(batch[0]), batch[1])


class Replaced(Classifier):
    """Parts are exchanged: an activation, and a parameter by a new one."""

    def training_step(self, batch, batch_idx):
        if self.global_step == 7:
            self.network[1] = nn.Sequential(self.network[1], nn.Tanh())
            self.network[3].bias = nn.Parameter(torch.ones(3))
        return super().training_step(batch, batch_idx)


class Decayed(Classifier):
    """The rate is multiplied by hand at every step."""

    def on_train_batch_start(self, batch, batch_idx):
        pass

    def training_step(self, batch, batch_idx):
        for group in self.optimizers().param_groups:
            group["lr"] *= 0.9
        return super().training_step(batch, batch_idx)


class Stepped(Classifier):
    """A scheduler is stepped by hand."""

    def training_step(self, batch, batch_idx):
        self.lr_schedulers().step()
        return super().training_step(batch, batch_idx)


def _stepped() -> Classifier:
    return Stepped(mlp(), scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 5, 0.5))


def _decayed_tensor() -> Classifier:
    return Decayed(mlp(), lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2)))


MOVED = {
    "a layer joins": lambda: Grown(mlp()),
    "a layer is renamed": lambda: Renamed(mlp()),
    "parts are replaced": lambda: Replaced(mlp()),
    "a rate": lambda: Decayed(mlp()),
    "a rate that is a tensor": _decayed_tensor,
    "a scheduler": _stepped,
}


@pytest.mark.parametrize("name", MOVED)
def test_a_step_that_changes_layers_or_rates_does_so_for_its_own_batches_only(name):
    """Modules, parameter groups, rates and schedulers are put back after an evaluation of the probe."""
    runs = []
    for callbacks in ([], [DynamicsMonitor(every_n_steps=2)]):
        torch.manual_seed(0)
        module = MOVED[name]()
        done = fit(module, callbacks, steps=12)
        groups = [(len(group["params"]), float(group["lr"])) for group in done.optimizers[0].param_groups]
        runs.append((module, groups))
    assert same_weights(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    assert len(callbacks[0].history["sharpness/stability_ratio"].steps) == 6
    assert callbacks[0].failures == 0


def test_a_weight_that_is_normalised_inside_is_plain_afterwards():
    network = mlp()
    before, inputs = copy.deepcopy(network), torch.ones(2, 8)
    with preserve_state(network):
        parametrizations.weight_norm(network[3])
        network[0] = nn.Linear(8, 16)
    assert type(network[3]) is nn.Linear
    assert same_weights(network, before)
    assert torch.equal(network(inputs), before(inputs))


def test_what_measures_tells_what_it_has_found():
    module = mlp()
    hessian = HessianOperator(lambda: F.cross_entropy(module(X), Y), module)
    tracker = EigenTracker()
    assert repr(tracker) == "EigenTracker(k=1, 0 measurements, the next one cold)"
    tracker.update(hessian)
    assert repr(tracker) == "EigenTracker(k=1, 1 measurement, the next one warm)"
    found = spectral_density(hessian, steps=20, num_vectors=1)
    assert repr(found).startswith(f"SpectralDensity({hessian.shape[0]} eigenvalues from {found.nodes.min():.6g} to")
    assert len(repr(found)) < 200


class FlexAttentionAutogradOp(torch.autograd.Function):
    """Named like what ``flex_attention`` puts into the graph: a backward pass without a derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, grad):
        with torch.no_grad():
            return grad * (1 - ctx.saved_tensors[0].tanh() ** 2)


class HalfFlexAttention(FlexAttentionAutogradOp):
    """The same in half precision only, as fused kernels are."""

    @staticmethod
    def forward(ctx, x):
        assert x.dtype is torch.bfloat16
        return FlexAttentionAutogradOp.forward(ctx, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None], ids=str)
def test_differences_of_what_has_no_second_derivative_are_taken_in_full_precision(dtype):
    operator, found = top(with_tanh(FlexAttentionAutogradOp), dtype or torch.bfloat16, dtype is not None)
    assert operator.backend == "finite_difference" and "flex_attention" in operator.reason and not operator.is_coarse
    assert found.converged and float(found.values[0]) == pytest.approx(float(TRUE_TOP.values[0]), rel=0.02)


class Flexible(Classifier):
    """Attention of that kind between two layers."""

    def __init__(self, function):
        super().__init__(mlp(), lambda p: torch.optim.SGD(p, lr=0.1))
        self.function = function

    def training_step(self, batch, batch_idx):
        hidden = self.function.apply(self.network[0](batch[0]))
        return F.cross_entropy(self.network[3](hidden), batch[1])


def test_a_model_with_flex_attention_has_its_eigenvalue_in_bf16_mixed(caplog):
    monitor = SharpnessMonitor(every_n_steps=1, quantities=["hessian", "directional"], probe_fraction=1.0)
    fit(Flexible(FlexAttentionAutogradOp), [monitor], steps=4, precision="bf16-mixed")
    assert monitor.failures == 0 and len(monitor.history["sharpness/hessian_max"].values) == 4
    assert "flex_attention, which has no second derivative" in caplog.text


def test_what_exists_in_half_precision_only_is_left_out_by_one_sentence():
    class FlexAttentionAutogradOp(HalfFlexAttention):
        pass

    quantities = ["hessian", "trace", "directional", "batch", "stability_ratio"]
    monitor = SharpnessMonitor(every_n_steps=1, quantities=quantities, probe_fraction=1.0)
    with pytest.warns(UserWarning, match="left out") as caught:
        fit(Flexible(FlexAttentionAutogradOp), [monitor], steps=6, precision="bf16-mixed")
    said = [str(one.message) for one in caught if "sharpness" in str(one.message)]
    assert len(said) == 3 and all("flex_attention, which has no second derivative" in one for one in said)
    assert sum(one.startswith("sharpness is left out") for one in said) == 1 and monitor.failures == 0
    assert len(monitor.history["sharpness/critical_multiple"].values) >= 3
    assert "sharpness/hessian_max" not in monitor.history
