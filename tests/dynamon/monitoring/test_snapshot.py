"""Every quantity once, against dense float64 computations, without a trace on the module."""

import math
import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dynamon import describe_layers, measure
from tests.models import cnn, dense_hessian, gpt, mlp, samples

X, Y = samples(12, 4, dtype=torch.float64)
LOSS = lambda module, batch: cross_entropy(module(batch[0]), batch[1])  # noqa: E731


def of_batch(batch):
    return lambda model: cross_entropy(model(batch[0]), batch[1])


def by_layer(model, function):
    return {name: pytest.approx(function(p.detach()), rel=1e-6) for name, p in model.named_parameters()}


@pytest.mark.parametrize("certify", [False, True])
def test_values_against_dense_computations(certify):
    model = mlp(4, 6, 3).double()
    found = measure(model, [X, Y], loss_fn=LOSS, certify=certify, tol=1e-4)
    eigenvalues = torch.linalg.eigvalsh(dense_hessian(model, of_batch([X, Y])))
    top = float(eigenvalues[-1])
    assert found["sharpness/hessian_max"] == pytest.approx(top, rel=1e-4)
    assert "sharpness/hessian_max_unconverged" not in found and found["sharpness/matvecs"] <= 40
    assert found["sharpness/hessian_min"] >= float(eigenvalues[0]) * (1 + 1e-9)
    spread = 1 - float(eigenvalues[0]) / top  # residual^2 / gap <= tol, all of them relative to the value
    assert found["sharpness/hessian_max_residual"] <= (1e-4 * spread) ** 0.5
    if certify:
        assert top * (1 - 1e-12) <= found["sharpness/hessian_max_upper"] <= 1.15 * top
        assert found["sharpness/matvecs"] >= 20
    else:
        assert "sharpness/hessian_max_upper" not in found

    loss = LOSS(model, [X, Y])
    names = [name for name, _ in model.named_parameters()]
    gradients = dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))
    assert found["sharpness/probe_loss"] == pytest.approx(loss.item())
    assert found["gradient/norm"] == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in gradients.values())))
    assert found["gradient/l2"] == {n: pytest.approx(float(g.norm())) for n, g in gradients.items()}
    assert found["gradient/dual"] == {n: pytest.approx(float(g.abs().sum())) for n, g in gradients.items()}
    assert found["gradient/norm_dual"] == pytest.approx(sum(float(g.abs().sum()) for g in gradients.values()))
    assert found["gradient/nonfinite"] == 0

    assert found["weight/frobenius"] == by_layer(model, lambda p: float(p.norm()))
    assert found["weight/rms"] == by_layer(model, lambda p: float(p.square().mean().sqrt()))
    assert set(found["spectrum/sigma_max"]) == {"0.weight", "2.weight"}
    for name in ("0.weight", "2.weight"):
        sigma = torch.linalg.svdvals(dict(model.named_parameters())[name].detach())
        assert found["spectrum/sigma_lower"][name] <= float(sigma[0]) <= found["spectrum/sigma_upper"][name]
        assert found["spectrum/sigma_max"][name] == pytest.approx(float(sigma[0]), rel=0.005)
        rank = float(sigma.square().sum() / sigma[0] ** 2)
        assert found["spectrum/stable_rank"][name] == pytest.approx(rank, rel=0.012)
    first = found["weight/operator"]["0.weight"]
    assert first == pytest.approx(math.sqrt(4 / 6) * found["spectrum/sigma_max"]["0.weight"], rel=1e-5)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_the_stability_ratio(kind):
    model = mlp(4, 6, 3).double()
    optimizer = kind(model.parameters(), lr=0.05)
    for step in range(3):
        optimizer.zero_grad()
        LOSS(model, samples(12, 4, dtype=torch.float64, seed=step)).backward()
        optimizer.step()
    found = measure(model, [X, Y], loss_fn=LOSS, optimizer=optimizer, tol=1e-5)
    dense = dense_hessian(model, of_batch([X, Y]))
    if kind is torch.optim.SGD:
        scale = torch.full((len(dense),), math.sqrt(0.05 / 2), dtype=torch.float64)
    else:
        v = torch.cat([optimizer.state[p]["exp_avg_sq"].flatten() for p in model.parameters()]) / (1 - 0.999**3)
        damping = 0.05 * 0.1 / ((2 - 0.05 * 0.01) * 1.9)
        scale = (damping / ((v.sqrt() + 1e-8) * (1 - 0.9**3))).sqrt()
    expected = float(torch.linalg.eigvalsh(scale[:, None] * dense * scale)[-1])
    assert found["sharpness/stability_ratio"] == pytest.approx(expected, rel=1e-5)
    assert found["sharpness/stability_ratio_upper"] >= expected * (1 - 1e-12)
    sharpness = measure(model, [X, Y], loss_fn=LOSS)["sharpness/hessian_max"]
    assert found["sharpness/hessian_max"] == pytest.approx(sharpness, rel=1e-2)


def test_the_optimizer_chooses_the_dual_norms():
    model = mlp(4, 6, 3)
    batch = samples(12, 4)
    euclidean = measure(model, batch, loss_fn=LOSS, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert euclidean["gradient/dual"] == {n: pytest.approx(v) for n, v in euclidean["gradient/l2"].items()}
    muon = torch.optim.Muon([model[0].weight], lr=0.1)
    assert "sharpness/stability_ratio" not in measure(model, batch, loss_fn=LOSS, optimizer=muon)


class Module(nn.Module):
    """Looks like a LightningModule: it has a training_step, dropout, BatchNorm and a counter."""

    def __init__(self):
        super().__init__()
        self.net, self.dropout, self.calls = cnn(), nn.Dropout(0.3), []

    def training_step(self, batch, batch_idx):
        self.calls.append(batch_idx)
        return {"loss": cross_entropy(self.dropout(self.net(batch[0])), batch[1])}


@pytest.mark.parametrize("training", [True, False])
def test_the_module_and_the_random_streams_are_left_as_they_were(training):
    module = Module().train(training)
    batch = samples(6, 2, 6, 6)
    grads = {}
    for i, p in enumerate(module.parameters()):
        p.grad = torch.full_like(p, float(i)) if i % 2 else None
        grads[p] = None if p.grad is None else (p.grad, p.grad.clone())
    state = {k: v.clone() for k, v in module.state_dict().items()}
    versions = {name: p._version for name, p in module.named_parameters()}
    inputs = [t.clone() for t in batch]
    streams = torch.get_rng_state(), pickle.dumps(np.random.get_state()), random.getstate()
    first = measure(module, batch, certify=False)
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items()) and not module.calls
    assert {name: p._version for name, p in module.named_parameters()} == versions
    for p, kept in grads.items():
        assert p.grad is None if kept is None else p.grad is kept[0] and torch.equal(*kept)
        assert p.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(batch, inputs, strict=True))
    assert torch.equal(torch.get_rng_state(), streams[0]) and random.getstate() == streams[2]
    assert pickle.dumps(np.random.get_state()) == streams[1]
    assert all(m.training == training for m in module.modules())
    assert measure(module, batch, certify=False) == first  # the same masks, the same start


def test_it_works_where_gradients_are_off():
    model = mlp(4, 6, 3)
    batch = samples(12, 4)
    plain = measure(model, batch, loss_fn=LOSS, certify=False)
    with torch.no_grad():
        assert measure(model, batch, loss_fn=LOSS, certify=False) == plain


def test_tied_frozen_and_unused_parameters():
    model = gpt(tied=True)
    model.blocks[0].qkv.weight.requires_grad_(False)
    model.idle = nn.Parameter(torch.ones(3, 3))
    tokens = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(0))
    found = measure(model, tokens, loss_fn=lambda m, t: cross_entropy(m(t).flatten(0, 1), t.flatten()), certify=False)
    names = {layer.name for layer in describe_layers(model)} - {"blocks.0.qkv.weight"}
    assert set(found["gradient/l2"]) == set(found["weight/rms"]) == names
    assert math.isnan(found["gradient/l2"]["idle"]) and "lm_head.weight" not in names
    assert found["sharpness/hessian_max"] > 0


def test_bad_input():
    with pytest.raises(ValueError, match="ReLU has no trainable parameter, so there is nothing to measure"):
        measure(nn.ReLU(), None)
    with pytest.raises(ValueError, match="has no training_step; pass loss_fn="):
        measure(mlp(4, 3), X.float())
    with pytest.raises(ValueError, match="loss_fn must return a scalar loss"):
        measure(mlp(4, 3), X.float(), loss_fn=lambda m, batch: m(batch))


def test_convolutions_have_bounds_as_maps():
    model, batch = cnn(), samples(4, 2, 6, 6)
    found = measure(model, batch, loss_fn=LOSS, certify=False)
    names = {layer.name for layer in describe_layers(model) if layer.role == "conv"}
    assert names and set(found["spectrum/convolution_lower"]) == set(found["spectrum/convolution_upper"]) == names
    for name, stride in (("0.weight", 1), ("3.weight", 2)):
        transfer = torch.fft.fft2(model.get_parameter(name).detach().double(), s=(64, 64)).permute(2, 3, 0, 1)
        # A stride adds up the frequencies that it cannot tell apart.
        shifts = [(i * 64 // stride, j * 64 // stride) for i in range(stride) for j in range(stride)]
        aliases = torch.cat([transfer.roll(shift, (0, 1)) for shift in shifts], dim=-1) / stride
        exact = float(torch.linalg.matrix_norm(aliases, ord=2).max())
        lower, upper = found["spectrum/convolution_lower"][name], found["spectrum/convolution_upper"][name]
        assert lower <= exact * (1 + 1e-3) and exact <= upper <= 1.1 * lower
