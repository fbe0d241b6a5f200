"""Diagonal blocks against the rows and columns of dense matrices."""

import pytest
import torch
from torch.nn import functional as F

from dynamon.curvature import BlockOperator, GGNOperator, HessianOperator, blockwise_sharpness, top_eigenvalues
from tests.models import dense_hessian, gpt, mlp, samples

X, Y = samples(12, 4, dtype=torch.float64)
KINDS = ("double_backward", "finite_difference", "ggn")


def loss_of(model):
    return F.cross_entropy(model(X), Y)


def matrix_of(operator):
    return operator @ torch.eye(operator.shape[0], dtype=operator.dtype)


@pytest.fixture(scope="module")
def model():
    return mlp(4, 6, 5, 3).double()


def make(kind, model, named=True):
    params = dict(model.named_parameters()) if named else list(model.parameters())
    if kind == "ggn":
        return GGNOperator(lambda: model(X), lambda z: F.cross_entropy(z, Y), params)
    return HessianOperator(lambda: loss_of(model), params, backend=kind)


@pytest.fixture(scope="module")
def dense(model):
    whole = dense_hessian(model, loss_of)
    return {"double_backward": whole, "finite_difference": whole, "ggn": matrix_of(make("ggn", model))}


def rows(model, names):
    """Which coordinates belong to parameters of these names."""
    kept = [torch.full((p.numel(),), name in names) for name, p in model.named_parameters()]
    return torch.cat(kept)


GLOBS = {
    "0.*": {"0.weight", "0.bias"},
    "*.bias": {"0.bias", "2.bias", "4.bias"},
    "4.weight": {"4.weight"},
    "[24].*": {"2.weight", "2.bias", "4.weight", "4.bias"},
    "*": {"0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"},
}


@pytest.mark.parametrize("glob", GLOBS)
@pytest.mark.parametrize("kind", KINDS)
def test_products(model, dense, kind, glob):
    block = make(kind, model).block(glob)
    kept = rows(model, GLOBS[glob])
    assert isinstance(block, BlockOperator) and block.shape == (int(kept.sum()),) * 2
    torch.testing.assert_close(matrix_of(block), dense[kind][kept][:, kept], rtol=1e-4, atol=1e-6)
    assert block.backend == ("double_backward" if kind == "ggn" else kind)
    chosen = [p for name, p in model.named_parameters() if name in GLOBS[glob]]
    by_tensor = make(kind, model, named=False).block(chosen[::-1])  # the order stays that of the operator
    torch.testing.assert_close(matrix_of(by_tensor), matrix_of(block))


@pytest.mark.parametrize("kind", KINDS)
def test_several_globs_and_a_single_tensor(model, dense, kind):
    several = make(kind, model).block(["0.*", "4.bias"])
    kept = rows(model, {"0.weight", "0.bias", "4.bias"})
    torch.testing.assert_close(matrix_of(several), dense[kind][kept][:, kept], rtol=1e-4, atol=1e-6)
    single = make(kind, model).block([model[2].weight])
    kept = rows(model, {"2.weight"})
    torch.testing.assert_close(matrix_of(single), dense[kind][kept][:, kept], rtol=1e-4, atol=1e-6)


def test_blocks_combine_and_scale(model, dense):
    block, kept = make("double_backward", model).block("0.*"), rows(model, GLOBS["0.*"])
    truth = dense["double_backward"][kept][:, kept]
    scale = torch.rand(len(truth), generator=torch.Generator().manual_seed(0), dtype=X.dtype)
    expected = scale[:, None] * (2 * truth + dense["ggn"][kept][:, kept]) * scale
    torch.testing.assert_close(matrix_of((2 * block + make("ggn", model).block("0.*")).scaled(scale)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_all_at_once(model, dense, kind):
    blocks = {"first": "0.*", "head": list(model[4].parameters()), "biases": "*.bias"}
    names = {"first": GLOBS["0.*"], "head": {"4.weight", "4.bias"}, "biases": GLOBS["*.bias"]}
    operator = make(kind, model)
    found = blockwise_sharpness(operator, blocks, tol=1e-4, max_matvecs=100)
    whole = float(torch.linalg.eigvalsh(dense[kind])[-1])
    assert list(found) == list(blocks)
    for name, pairs in found.items():
        kept = rows(model, names[name])
        truth = float(torch.linalg.eigvalsh(dense[kind][kept][:, kept])[-1])
        assert pairs.converged and float(pairs.values[0]) == pytest.approx(truth, rel=1e-3)
        assert pairs.vectors.shape[0] == int(kept.sum()) and float(pairs.values[0]) <= whole * (1 + 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_they_say_how_products_were_made_and_how_well(model, kind):
    """As top_eigenvalues does for one block."""
    operator = make(kind, model)
    one = top_eigenvalues(operator.block("0.*"), tol=5e-2, max_matvecs=20)
    pairs = blockwise_sharpness(operator, {"first": "0.*"})["first"]
    assert one.backend == operator.backend and (one.product_error > 0) == (kind == "finite_difference")
    assert pairs.backend == one.backend and pairs.product_error == pytest.approx(one.product_error)


def test_differences_that_cannot_be_trusted_are_not_converged():
    """A loss that wiggles below the step of the differences."""
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    rough = HessianOperator(
        lambda: w.square().sum() / 2 + 1e-12 * (w * 3e6).cos().sum(), {"w": w}, backend="finite_difference"
    )
    assert not top_eigenvalues(rough.block("w")).converged
    assert not blockwise_sharpness(rough, {"w": "w"})["w"].converged


def test_warm_starts():
    """Those that fit are used; those of another size are not. Few digits: for more, a cold run has the gap."""
    tokens = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(0))
    model = gpt(depth=1).double()
    operator = HessianOperator(
        lambda: F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()), dict(model.named_parameters())
    )
    blocks = {"attention": "blocks.0.qkv.*", "mlp": "blocks.0.mlp.*", "table": "wte.*"}
    cold = blockwise_sharpness(operator, blocks, tol=5e-2, max_matvecs=200)
    starts = {"attention": cold["attention"].vectors, "mlp": cold["table"].vectors}
    warm = blockwise_sharpness(operator, blocks, tol=5e-2, max_matvecs=200, warm_starts=starts)
    for name in blocks:
        assert warm[name].converged and float(warm[name].values[0]) == pytest.approx(
            float(cold[name].values[0]), rel=5e-2
        )
    assert warm["attention"].matvecs < cold["attention"].matvecs
    assert warm["mlp"].matvecs == cold["mlp"].matvecs and torch.equal(warm["mlp"].vectors, cold["mlp"].vectors)


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_choices(model, kind):
    with pytest.raises(ValueError, match=r"\['9.\*'\] matches no parameter; there are \['0.weight'"):
        make(kind, model).block("9.*")
    with pytest.raises(ValueError, match="a block by name needs params as a mapping"):
        make(kind, model, named=False).block("0.*")
    with pytest.raises(ValueError, match=r"a tensor of shape \(7,\) is not among the operator's parameters"):
        make(kind, model).block([torch.ones(7)])
    with pytest.raises(ValueError, match="matches no parameter"):
        make(kind, model).block([])
    with pytest.raises(ValueError, match=r"expected \[30\] or \[30, k\], got \(5,\)"):
        make(kind, model).block("0.*") @ torch.ones(5, dtype=X.dtype)


@pytest.mark.parametrize("seed", range(4))
def test_a_block_of_one_entry(seed) -> None:
    """In one dimension a start vector and the gradient can be opposite, and their sum nothing."""
    weight = torch.tensor(2.0, requires_grad=True)
    for sign in (1.0, -1.0):
        operator = HessianOperator(lambda sign=sign: 1.5 * weight**2 + sign * 20 * weight, {"weight": weight})
        found = blockwise_sharpness(operator, {"weight": "weight"}, seed=seed)["weight"]
        assert float(found.values[0]) == pytest.approx(3.0)
