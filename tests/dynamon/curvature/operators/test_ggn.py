"""Gauss-Newton products against ``J^T H_L J`` in float64, the Gram method's bounds, and outputs found in a loss."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from dynamon.curvature import GGNOperator, HessianOperator, OutputsOfLoss, top_eigenvalues
from tests.models import cnn, dense_hessian, gpt, mlp, samples

PROPERTY = settings(deadline=None, max_examples=30, derandomize=True)
X, Y = samples(7, 4, dtype=torch.float64)
IMAGES, LABELS = samples(5, 2, 6, 6, dtype=torch.float64)
TOKENS = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(0))


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TARGETS = gaussian(7, 3, seed=5)


class Two(nn.Module):
    """Two heads of different shapes on one body, and a parameter that only one of them sees."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.labels, self.values = mlp(4, 5, 5), nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x):
        hidden = self.body(x).tanh()
        return self.labels(hidden), self.values(hidden)


def flat_cross_entropy(z):
    return F.cross_entropy(z.flatten(0, -2), TOKENS.flatten())


def both(z):
    return F.cross_entropy(z[0], Y) + 0.3 * F.mse_loss(z[1], TARGETS[:, :2])


CASES = {
    "cross-entropy": (lambda: mlp(4, 5, 3), X, lambda z: F.cross_entropy(z, Y)),
    "squared error": (lambda: mlp(4, 5, 3), X, lambda z: F.mse_loss(z, TARGETS)),
    "logits": (lambda: mlp(4, 5, 3), X, lambda z: F.binary_cross_entropy_with_logits(z, (TARGETS > 0).double())),
    "not convex": (lambda: mlp(4, 5, 3), X, lambda z: z.sin().mul(TARGETS).sum()),
    "coupled samples": (lambda: mlp(4, 5, 3), X, lambda z: torch.logsumexp(z.flatten(), 0)),
    "batchnorm": (cnn, IMAGES, lambda z: F.cross_entropy(z, LABELS)),
    "attention": (lambda: gpt(depth=1, width=4), TOKENS, flat_cross_entropy),
    "tied": (lambda: gpt(depth=1, width=4, tied=True), TOKENS, flat_cross_entropy),
    "two heads": (Two, X, both),
}


def parameters(model):
    return list(model.parameters())


def dense_parts(model, inputs, loss):
    """``J`` and ``H_L`` by autograd's own functional calls, all outputs flattened one after the other."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    sizes, shapes = [p.numel() for p in params.values()], []

    def outputs(flat):
        pieces = zip(params.items(), flat.split(sizes), strict=True)
        given = {name: piece.view_as(p) for (name, p), piece in pieces}
        found = torch.func.functional_call(model, given, (inputs,))
        found = found if isinstance(found, tuple) else (found,)
        shapes[:] = [z.shape for z in found]
        return torch.cat([z.flatten() for z in found])

    def loss_of(flat):
        pieces = [z.view(shape) for z, shape in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)]
        return loss(pieces[0] if len(pieces) == 1 else pieces)

    start = torch.cat([p.flatten() for p in params.values()])
    with sdpa_kernel(SDPBackend.MATH):
        at = outputs(start)
        jacobian = torch.autograd.functional.jacobian(outputs, start)
    return jacobian, torch.autograd.functional.hessian(loss_of, at)


@pytest.fixture(params=CASES)
def case(request):
    make, inputs, loss = CASES[request.param]
    model = make().double().train()
    jacobian, core = dense_parts(model, inputs, loss)
    return GGNOperator(lambda: model(inputs), loss, dict(model.named_parameters())), jacobian, core


def matrix_of(operator):
    return operator @ torch.eye(operator.shape[0], dtype=operator.dtype)


def flatten(pieces):
    return torch.cat([piece.flatten() for piece in pieces])


def test_products(case):
    operator, jacobian, core = case
    truth = jacobian.mT @ core @ jacobian
    assert operator.shape == tuple(truth.shape) and operator.rows == len(jacobian)
    assert operator.backend == "double_backward"
    torch.testing.assert_close(matrix_of(operator), truth, rtol=1e-9, atol=1e-9 * float(truth.abs().max()))


def test_push_curve_and_pull(case):
    operator, jacobian, core = case
    v, u = gaussian(jacobian.shape[1]), gaussian(jacobian.shape[0], seed=1)
    tight = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(flatten(operator.push(v)), jacobian @ v, **tight)
    torch.testing.assert_close(operator.pull(operator.split_rows(u)), jacobian.mT @ u, **tight)
    torch.testing.assert_close(flatten(operator.curve(operator.split_rows(u))), core @ u, **tight)
    torch.testing.assert_close(flatten(operator.split_rows(u)), u)


def test_blocks_push_and_pull_their_own_part(case):
    operator, jacobian, core = case
    sizes = [p.numel() for p in operator.parameters.tensors]
    chosen = [0, len(sizes) - 1]
    kept = torch.isin(torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)), torch.tensor(chosen))
    part = jacobian[:, kept]
    v, u = gaussian(part.shape[1]), gaussian(len(part), seed=1)
    torch.testing.assert_close(flatten(operator.push(v, chosen)), part @ v)
    torch.testing.assert_close(operator.pull(operator.split_rows(u), chosen), part.mT @ u)
    torch.testing.assert_close(operator.block_product(v, chosen), part.mT @ core @ part @ v)


def test_it_is_the_hessian_of_a_linear_network_and_not_of_another():
    linear = nn.Linear(4, 3).double()
    loss = lambda z: F.cross_entropy(z, Y)  # noqa: E731
    for model, same in ((linear, True), (mlp(4, 5, 3).double(), False)):
        ggn = matrix_of(GGNOperator(lambda m=model: m(X), loss, parameters(model)))
        hessian = dense_hessian(model, lambda m: loss(m(X)))
        assert torch.allclose(ggn, hessian, atol=1e-10) == same
        assert float(torch.linalg.eigvalsh(ggn)[0]) > -1e-12


def test_it_is_the_fisher_matrix_of_a_classifier():
    """The mean over samples and over labels drawn from the network's own chances of the outer products of gradients."""
    model = mlp(4, 5, 3).double()
    fisher = 0
    for x in X:
        chances = model(x).softmax(-1).detach()
        for label, chance in enumerate(chances):
            loss = F.cross_entropy(model(x)[None], torch.tensor([label]))
            g = flatten(torch.autograd.grad(loss, parameters(model)))
            fisher = fisher + chance * torch.outer(g, g) / len(X)
    torch.testing.assert_close(
        matrix_of(GGNOperator(lambda: model(X), lambda z: F.cross_entropy(z, Y), parameters(model))), fisher
    )


def test_a_loss_that_is_linear_in_the_outputs_has_none():
    model = mlp(4, 5, 3).double()
    operator = GGNOperator(lambda: model(X), lambda z: (z * TARGETS).sum(), parameters(model))
    assert not matrix_of(operator).any()
    found = top_eigenvalues(operator)
    assert found.converged and float(found.values[0]) == 0
    assert float(HessianOperator(lambda: (model(X) * TARGETS).sum(), parameters(model)).gradient.norm()) > 0


def test_a_loss_that_is_linear_in_one_of_two_outputs():
    model = Two().double()
    loss = lambda z: F.cross_entropy(z[0], Y) + (z[1] * TARGETS[:, :2]).sum()  # noqa: E731
    jacobian, core = dense_parts(model, X, loss)
    operator = GGNOperator(lambda: model(X), loss, parameters(model))
    torch.testing.assert_close(matrix_of(operator), jacobian.mT @ core @ jacobian)
    assert not matrix_of(operator)[-12:].any()  # the second head


def test_an_output_that_the_loss_does_not_use():
    model = Two().double()
    operator = GGNOperator(lambda: model(X), lambda z: F.cross_entropy(z[0], Y), parameters(model))
    jacobian, core = dense_parts(model, X, lambda z: F.cross_entropy(z[0], Y))
    torch.testing.assert_close(matrix_of(operator), jacobian.mT @ core @ jacobian)


def test_a_parameter_that_takes_no_part_has_zero_rows():
    model, idle = mlp(4, 5, 3).double(), nn.Parameter(torch.ones(2, dtype=X.dtype))
    operator = GGNOperator(lambda: model(X), lambda z: F.cross_entropy(z, Y), [idle, *parameters(model)])
    matrix = matrix_of(operator)
    assert not matrix[:2].any() and not matrix[:, :2].any() and matrix[2:].any()
    block = operator.block([idle])
    assert not (block @ torch.ones(2, dtype=X.dtype)).any()


@pytest.mark.parametrize(
    ("output_fn", "loss_fn", "message"),
    [
        (lambda w: None, lambda z: z, "output_fn must return a tensor, or a list of tensors, that depend on the param"),
        (lambda w: [], lambda z: z, "output_fn must return a tensor"),
        (lambda w: w.detach(), lambda z: z.sum(), "output_fn must return a tensor"),
        (lambda w: [2 * w, w.detach()], lambda z: z[0].sum(), "output_fn must return a tensor"),
        (lambda w: {"logits": w}, lambda z: z["logits"].sum(), "output_fn must return a tensor"),
        (lambda w: 2 * w, lambda z: z, r"the loss must be a scalar tensor, got shape \(3,\)"),
        (lambda w: 2 * w, lambda z: z.sum().item(), "the loss must be a scalar tensor, got float"),
        (lambda w: 2 * w, lambda z: z.sum().detach(), "it carries no graph"),
        (lambda w: 2 * w, lambda z: torch.ones(1, requires_grad=True).sum(), "the loss does not depend on the outputs"),
        (lambda w: torch.ones(3, requires_grad=True) * 2, lambda z: z.sum(), "the outputs do not depend on any of the"),
    ],
)
def test_bad_functions(output_fn, loss_fn, message):
    w = torch.ones(3, requires_grad=True)
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        GGNOperator(lambda: output_fn(w), loss_fn, [w])
    made = output_fn(w)
    is_tensors = isinstance(made, torch.Tensor) or isinstance(made, list) and made
    assert caught.type is (ValueError if is_tensors and "float" not in message else TypeError)


# --- the Gram method ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CASES if name != "not convex"])
@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-4])
def test_gram_bounds_hold_the_truth(name, tol):
    make, inputs, loss = CASES[name]
    model = make().double().train()
    jacobian, core = dense_parts(model, inputs, loss)
    truth = float(torch.linalg.eigvalsh(jacobian.mT @ core @ jacobian)[-1])
    operator = GGNOperator(lambda: model(inputs), loss, parameters(model))
    found = top_eigenvalues(operator, method="gram", tol=tol)
    assert found.lower <= truth * (1 + 1e-12) and truth * (1 - 1e-12) <= found.upper
    assert found.lower <= float(found.values[0]) <= found.upper <= 1.005 * found.lower
    assert float(found.values[0]) == pytest.approx(truth, rel=1e-5)
    x = found.vectors[:, 0]
    assert float(x.norm()) == pytest.approx(1) and found.vectors.shape == (operator.shape[0], 1)
    assert float((operator @ x - found.values[0] * x).norm()) == pytest.approx(float(found.residuals[0]), abs=1e-9)
    assert found.matvecs >= operator.rows


@PROPERTY
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 5), st.integers(-8, 8))
def test_gram_on_random_linear_models(seed, count, outputs, exponent):
    """The Jacobian is known: the eigenvalues are those of the inputs' own Gram matrix."""
    inputs = 10.0**exponent * gaussian(count, 6, seed=seed)
    weight = torch.zeros(outputs, 6, dtype=torch.float64, requires_grad=True)
    operator = GGNOperator(lambda: inputs @ weight.mT, lambda z: z.square().sum() / 2, [weight])
    truth = float(torch.linalg.matrix_norm(inputs, 2)) ** 2
    found = top_eigenvalues(operator, method="gram", tol=1e-2)
    assert found.converged
    assert found.lower <= truth * (1 + 1e-12) and truth * (1 - 1e-12) <= found.upper
    assert float(found.values[0]) == pytest.approx(truth, rel=1e-2)


@pytest.mark.parametrize("seed", range(20))
def test_gram_bounds_hold_in_single_precision(seed):
    """Bounds are bounds: products in single precision round, and the bounds allow for it."""
    inputs = gaussian(9, 6, seed=seed).float()
    weight = torch.zeros(3, 6, requires_grad=True)
    operator = GGNOperator(lambda: inputs @ weight.mT, lambda z: z.square().sum() / 2, [weight])
    truth = float(torch.linalg.matrix_norm(inputs.double(), 2)) ** 2
    found = top_eigenvalues(operator, method="gram", tol=1e-2)
    assert found.lower <= truth <= found.upper
    assert found.converged and float(found.values[0]) == pytest.approx(truth, rel=1e-3)


def test_gram_of_nothing_is_zero():
    weight = torch.zeros(3, 6, requires_grad=True)
    operator = GGNOperator(lambda: torch.zeros(2, 6) @ weight.mT, lambda z: z.square().sum(), [weight])
    found = top_eigenvalues(operator, method="gram")
    assert found.lower == found.upper == float(found.values[0]) == 0


def test_gram_says_how_many_rows_are_too_many():
    weight = torch.ones(2, 1, requires_grad=True)
    inputs = torch.ones(2049, 1)
    operator = GGNOperator(lambda: inputs @ weight.mT, lambda z: z.square().mean(), [weight])
    with pytest.raises(
        ValueError, match=r"the outputs have 4,098 rows .* takes at most 4,096: measure on fewer samples"
    ):
        top_eigenvalues(operator, method="gram")
    assert top_eigenvalues(operator).converged


def test_gram_refuses_what_is_not_convex():
    model = mlp(4, 5, 3).double()
    operator = GGNOperator(lambda: model(X), lambda z: (z * TARGETS).sin().sum(), parameters(model))
    with pytest.raises(ValueError, match="the loss is not convex in the outputs, so method 'gram' does not apply"):
        top_eigenvalues(operator, method="gram")
    with pytest.raises(ValueError, match="method 'gram' is for k=1 of a GGNOperator"):
        top_eigenvalues(operator, 2, method="gram")
    with pytest.raises(ValueError, match="method 'gram' is for k=1 of a GGNOperator"):
        top_eigenvalues(operator + operator, method="gram")


def test_the_three_methods_agree():
    model = mlp(4, 5, 3).double()
    operator = GGNOperator(lambda: model(X), lambda z: F.cross_entropy(z, Y), parameters(model))
    values = [
        float(top_eigenvalues(operator, method=method, tol=1e-5, max_matvecs=2000).values[0])
        for method in ("lanczos", "power", "gram")
    ]
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)


# --- the outputs of a loss ------------------------------------------------------------------------------------------

LOSSES = {
    "cross_entropy": (F.cross_entropy, nn.CrossEntropyLoss(), Y),
    "mse_loss": (F.mse_loss, nn.MSELoss(), TARGETS),
    "binary_cross_entropy_with_logits": (
        F.binary_cross_entropy_with_logits,
        nn.BCEWithLogitsLoss(),
        (TARGETS > 0).double(),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("how", ["function", "module", "keyword"])
def test_known_losses_are_found(name, how):
    function, module, target = LOSSES[name]
    model, seen = mlp(4, 5, 3).double(), []

    def training_loss():
        seen.append(model(X))
        if how == "keyword":
            return 2 * function(input=seen[-1], target=target)
        return 2 * (module if how == "module" else function)(seen[-1], target)

    with OutputsOfLoss() as notes:
        loss = training_loss()
    outputs, names = notes.of(loss)
    assert len(outputs) == 1 and outputs[0] is seen[0] and names == name
    torch.testing.assert_close(loss.detach(), training_loss().detach())
    with OutputsOfLoss() as fresh:  # from there it is one step to the matrix
        loss = training_loss()
    operator = GGNOperator(lambda: fresh.of(loss)[0], lambda z: loss, parameters(model))
    jacobian, core = dense_parts(model, X, lambda z: 2 * function(z, target))
    torch.testing.assert_close(matrix_of(operator), jacobian.mT @ core @ jacobian)


def test_calls_that_do_not_count_towards_the_loss_are_ignored():
    model = mlp(4, 5, 3).double()
    with OutputsOfLoss() as notes:
        z = model(X)
        F.cross_entropy(z.detach(), Y)  # a metric
        with torch.no_grad():
            F.mse_loss(model(X), TARGETS)
        F.mse_loss(z * 2, TARGETS)  # with a graph, but not in the loss
        loss = F.cross_entropy(z, Y)
    F.cross_entropy(z.exp(), Y)  # outside
    outputs, names = notes.of(loss)
    assert len(outputs) == 1 and outputs[0] is z and names == "cross_entropy"


def test_several_independent_outputs():
    model = Two().double()
    with OutputsOfLoss() as notes:
        z = model(X)
        loss = F.cross_entropy(z[0], Y) + 0.3 * F.mse_loss(z[1], TARGETS[:, :2])
    outputs, names = notes.of(loss)
    assert len(outputs) == 2 and outputs[0] is z[0] and outputs[1] is z[1]
    assert names == "cross_entropy and mse_loss"
    jacobian, core = dense_parts(model, X, both)
    operator = GGNOperator(lambda: outputs, lambda _: loss, parameters(model))
    torch.testing.assert_close(matrix_of(operator), jacobian.mT @ core @ jacobian)


def test_of_outputs_that_depend_on_each_other_the_last_is_taken():
    model = mlp(4, 5, 3).double()
    with OutputsOfLoss() as notes:
        early = model(X)
        late = early.tanh() + 1
        loss = F.mse_loss(early, TARGETS) + F.cross_entropy(late, Y)
    outputs, names = notes.of(loss)
    assert len(outputs) == 1 and outputs[0] is late and names == "cross_entropy"


def test_an_output_used_twice_does_not_hide_another():
    """Two losses on the same logits, and a second head: both heads are outputs."""
    model = Two().double()
    with OutputsOfLoss() as notes:
        z = model(X)
        loss = (
            F.cross_entropy(z[0], Y) + F.cross_entropy(z[0], Y, label_smoothing=0.1) + F.mse_loss(z[1], TARGETS[:, :2])
        )
    outputs, _ = notes.of(loss)
    assert {id(output) for output in outputs} == {id(z[0]), id(z[1])}


def test_an_output_that_depends_on_another_does_not_hide_a_third():
    model = Two().double()
    with OutputsOfLoss() as notes:
        early, other = model(X)
        late = early.tanh()
        loss = F.mse_loss(other, TARGETS[:, :2]) + F.mse_loss(early, TARGETS) + F.cross_entropy(late, Y)
    outputs, _ = notes.of(loss)
    assert {id(output) for output in outputs} == {id(other), id(late)}


@pytest.mark.parametrize("loss_of", [lambda z: z.square().mean(), lambda z: F.nll_loss(z.log_softmax(-1), Y)])
def test_no_known_loss_is_said(loss_of):
    model = mlp(4, 5, 3).double()
    with OutputsOfLoss() as notes:
        z = model(X)
        F.cross_entropy(2 * z, Y)  # not in the loss
        loss = loss_of(z)
    with pytest.raises(
        ValueError, match="the outputs were not found: the loss has no call of cross_entropy, .* Pass out"
    ):
        notes.of(loss)


@pytest.mark.parametrize("penalty", [0.0, 0.3])
def test_the_share_of_the_gradient_beside_the_outputs(penalty):
    """Under checkpointing too, whose second evaluation must meet the attention kernel of the first."""
    model = gpt(depth=1, width=4)
    held = {}

    def outputs():
        logits = checkpoint(model, TOKENS, use_reentrant=False)
        held["loss"] = flat_cross_entropy(logits) + penalty * sum(p.square().sum() for p in model.parameters())
        return logits

    operator = GGNOperator(outputs, lambda _: held["loss"], parameters(model))
    logits = model(TOKENS)
    through = torch.autograd.grad(flat_cross_entropy(logits), list(model.parameters()))
    beside = torch.cat([2 * penalty * p.detach().flatten() for p in model.parameters()])
    expected = beside.norm() / (flatten(through) + beside).norm()
    assert operator.share_beside(held["loss"]) == pytest.approx(float(expected), abs=1e-10)
