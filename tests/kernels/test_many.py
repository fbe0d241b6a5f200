"""Many matrices in few calls, estimates in bfloat16, and which way is taken where."""

import pytest
import torch

from dynamon.kernels import (
    gram,
    gram_iteration,
    nuclear,
    nuclear_norm,
    polar,
    polar_factor,
    step_polar_factor,
    thresholds,
)
from dynamon.kernels.gram import gram_extremes, warm_up
from dynamon.kernels.nuclear import eigenvalues, gram_eigenvalues
from tests.launches import Launches

SHAPES = [(3, 8, 8), (2, 8, 20), (1, 30, 8), (2, 5, 7), (1, 1, 4), (2, 8, 8), (1, 7, 5)]


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def spectra():
    """Matrices of the kinds that iterations find easy or hard, with their singular values."""
    for seed in range(40):
        side = [64, 128, 256, 384][seed % 4]
        rows, columns = [(side, side), (2 * side, side), (side, 3 * side), (side, side + 7)][seed // 4 % 4]
        matrix = gaussian(rows, columns, seed=seed)
        if seed % 5 == 1:
            matrix = matrix + 3 * torch.outer(gaussian(rows, seed=99), gaussian(columns, seed=98))
        if seed % 5 == 2:
            matrix = gaussian(rows, 8, seed=97) @ gaussian(8, columns, seed=96) + 0.1 * matrix
        if seed % 5 == 3:
            u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
            matrix = (u * torch.arange(1, len(vh) + 1) ** -1.0) @ vh
        if seed % 5 == 4:
            u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
            matrix = u @ vh
        yield matrix * 10.0 ** (seed % 7 - 3)


@pytest.mark.parametrize("at_once", [2**27, 200, 1])
def test_many_matrices_have_the_bounds_of_each(monkeypatch, at_once):
    monkeypatch.setattr(gram, "_AT_ONCE", at_once)
    stacks = [gaussian(*shape, seed=i) * 10.0 ** (5 * i - 15) for i, shape in enumerate(SHAPES)]
    stacks += [gaussian(2, 8, 8, dtype=torch.float64), gaussian(2, 8, 8, dtype=torch.bfloat16)]
    found = gram_extremes(stacks, 8)
    lower, upper = zip(*(gram_iteration(stack, 8) for stack in stacks), strict=True)
    for bound, expected in ((found.lower, lower), (found.upper, upper)):
        expected = torch.cat([e.double() for e in expected])
        torch.testing.assert_close(bound * found.scale, expected, rtol=2e-5, atol=0)
    exact = torch.cat([torch.linalg.svdvals(stack.double())[:, 0] for stack in stacks])
    assert (found.lower * found.scale <= exact).all() and (exact <= found.upper * found.scale).all()
    energies = torch.cat([stack.double().square().sum((-2, -1)) for stack in stacks])
    torch.testing.assert_close(found.energy * found.scale**2, energies, rtol=1e-5, atol=0)


def test_estimates_in_bfloat16_are_within_one_percent():
    for matrix in spectra():
        found = gram_extremes([matrix[None]], 8, half=True)
        exact = float(torch.linalg.svdvals(matrix.double())[0])
        assert float((found.lower + found.upper) / 2 * found.scale) == pytest.approx(exact, rel=0.01)
    assert not (gram_extremes([torch.zeros(1, 3, 3)], 8, half=True).upper * 0).any()


def flat(side, ratio):
    """Four singular values of one, all others at a ratio of it, where one of the polynomials may turn."""
    u, v = (torch.linalg.qr(gaussian(side, side, seed=seed, dtype=torch.float64))[0] for seed in (side, side + 1))
    sigma = torch.full((side,), ratio, dtype=torch.float64)
    sigma[:4] = 1
    return (u * sigma @ v.mT).float()


def hard_spectra():
    yield from spectra()
    yield from (flat(128, float(ratio)) for ratio in torch.logspace(-1.95, 0, 60))
    yield from (torch.eye(side) for side in (4, 16, 200))


def test_nuclear_norms_in_bfloat16_are_within_half_a_percent():
    for matrix in hard_spectra():
        exact = float(torch.linalg.svdvals(matrix.double()).sum())
        assert float(nuclear_norm(matrix, "bfloat16")) == pytest.approx(exact, rel=5e-3)


@pytest.mark.parametrize(("steps", "tolerance"), [(5, 0.25), (6, 0.05), (7, 0.01)])
def test_singular_values_of_a_step_in_bfloat16(steps, tolerance):
    for matrix in hard_spectra():
        u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        found = polar_factor(matrix, steps, dtype=torch.bfloat16).double()
        large = s > 0.01 * (s**4).sum() ** 0.25
        assert ((u.mT @ found @ vh.mT).diagonal()[large] - 1).abs().max() <= tolerance
        assert torch.linalg.matrix_norm(found, 2) <= 1 + tolerance


def test_half_precision_is_chosen_by_the_table(monkeypatch):
    matrix = gaussian(40, 30)
    assert torch.equal(step_polar_factor(matrix), polar_factor(matrix))
    assert torch.equal(nuclear_norm(matrix, "estimate"), nuclear_norm(matrix, "auto"))
    for module in (polar, nuclear):
        monkeypatch.setattr(module, "half_pays", lambda device: True)
    assert torch.equal(step_polar_factor(matrix), polar_factor(matrix, dtype=torch.bfloat16))
    assert torch.equal(nuclear_norm(matrix, "estimate"), nuclear_norm(matrix, "bfloat16"))
    assert torch.equal(nuclear_norm(matrix, "auto"), nuclear_norm(matrix, "gram"))  # exact where that is asked for
    wide = matrix.double()
    assert torch.equal(step_polar_factor(wide), polar_factor(wide))
    assert torch.equal(nuclear_norm(wide, "estimate"), nuclear_norm(wide, "auto"))


class OnGpu:
    """What a choice is asked about, without a GPU."""

    def __init__(self, *shape, dtype=torch.float32):
        self.shape, self.dtype, self.device, self.is_cuda = torch.Size(shape), dtype, torch.device("cuda", 0), True


def test_the_table(monkeypatch):
    assert not thresholds.half_pays(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not thresholds.half_pays(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert thresholds.half_pays(torch.device("cuda", 0))

    chosen = {side: thresholds.takes_gram_twin(OnGpu(3, side, side)) for side in (768, 1024, 2048, 4096, 8192)}
    assert chosen == {768: False, 1024: False, 2048: False, 4096: True, 8192: True}
    assert not thresholds.takes_gram_twin(OnGpu(4096, 4096, dtype=torch.float64))
    assert not thresholds.takes_gram_twin(torch.empty(4096, 1).expand(4096, 4096))  # on a CPU
    monkeypatch.setattr(thresholds, "product_rounding", lambda matrix: 2.0**-10)  # TensorFloat-32 is faster still
    assert not thresholds.takes_gram_twin(OnGpu(4096, 4096))

    host = {side: thresholds.eigenvalues_on_host(OnGpu(side, side)) for side in (1, 32, 64, 512, 768)}
    assert host == {1: False, 32: False, 64: True, 512: True, 768: False}
    assert not thresholds.eigenvalues_on_host(torch.ones(64, 64))


def test_gram_iteration_takes_the_twin_where_the_table_says(monkeypatch):
    taken = []

    def twin(matrix):
        taken.append(tuple(matrix.shape))
        return matrix.mT @ matrix

    matrix = gaussian(2, 12, 9)
    expected = gram_iteration(matrix, 5)
    monkeypatch.setattr(gram, "takes_gram_twin", lambda matrix: True)
    monkeypatch.setattr(gram, "symmetric_gram", twin)
    assert torch.equal(gram_iteration(matrix, 5)[0], expected[0]) and not taken  # it cannot run on a CPU
    monkeypatch.setattr(gram, "supported", lambda matrix: True)
    for found, bound in zip(gram_iteration(matrix, 5), expected, strict=True):
        assert torch.equal(found, bound)
    assert taken == [(2, 12, 9), *[(2, 9, 9)] * 4]
    warm_up(torch.device("cpu"), [3, 7])
    assert taken[-1] == (1, 3, 3) and len(taken) == 6


def test_eigenvalues_of_many_matrices_are_asked_for_in_parts(monkeypatch):
    """Above 65,535 cuSOLVER gives CUSOLVER_STATUS_INVALID_VALUE: a depthwise convolution has as many."""
    calls = []

    def solve(part):
        assert len(part) <= 2**15
        calls.append(len(part))
        return torch.linalg.eigvalsh(part)

    tall = gaussian(70_001, 3, 2)
    found = eigenvalues(tall.mT @ tall, solve)
    torch.testing.assert_close(found, torch.linalg.eigvalsh(tall.mT @ tall))
    assert calls == [2**15, 2**15, 70_001 - 2**16]
    assert eigenvalues((tall.mT @ tall).view(70_001, 1, 2, 2)).shape == (70_001, 1, 2)


def test_vectors_need_no_solver():
    tall = gaussian(1000, 9, 1)
    with Launches() as launches:
        found = gram_eigenvalues(tall)
    assert not any("eig" in name for name in launches.calls)
    torch.testing.assert_close(found, tall.square().sum(-2))
    torch.testing.assert_close(nuclear_norm(gaussian(50, 1, 6)), gaussian(50, 6).norm(dim=-1))
