"""The ratios with the most progress at the same curvature, against a generic optimizer; advice from noise."""

import numpy as np
import pytest
from scipy.optimize import minimize

from dynamon.rates.allocation import advise, most_progress, ratios_by_key

LOW, HIGH = 1 / 8, 8.0


def problem(random, groups):
    """Progress and a positive definite curvature, often far from balance, so that bounds matter."""
    root = random.normal(size=(groups, groups))
    curvature = root @ root.T / groups + 0.05 * np.eye(groups)
    progress = random.normal(1, 1, groups)
    return (progress if progress.sum() > 0 else -progress), curvature


def by_generic_optimizer(progress, curvature, low, high, start, reserve):
    """Solve the same problem by sequential quadratic programming."""
    spent = {
        "type": "ineq",
        "fun": lambda s: curvature.sum() - s @ curvature @ s - reserve @ (s - 1) ** 2,
        "jac": lambda s: -2 * (curvature @ s + reserve * (s - 1)),
    }
    return minimize(
        lambda s: -(s @ progress),
        start,
        jac=lambda _: -progress,
        bounds=list(zip(low, high, strict=True)),
        constraints=[spent],
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 500},
    ).x


@pytest.mark.parametrize("seed", range(40))
def test_the_ratios_are_those_of_a_generic_optimizer(seed):
    random = np.random.default_rng(seed)
    groups = int(random.integers(2, 10))
    progress, curvature = problem(random, groups)
    held = random.random(groups) < 0.2
    reserve = (seed % 3) * np.diag(curvature)
    found = most_progress(progress, curvature, LOW, HIGH, held, reserve)
    low, high = np.where(held, 1.0, LOW), np.where(held, 1.0, HIGH)
    other = by_generic_optimizer(progress, curvature, low, high, np.ones(groups), reserve)
    assert (found >= low - 1e-9).all() and (found <= high + 1e-9).all()
    kept = reserve @ (found - 1) ** 2
    assert found @ curvature @ found + kept <= curvature.sum() * (1 + 1e-9)
    assert found @ progress >= other @ progress * (1 - 1e-6)


def test_without_bounds_curvature_per_progress_is_equal_in_all_groups_and_the_curvature_is_spent():
    progress, curvature = problem(np.random.default_rng(3), 4)
    progress = curvature @ np.abs(progress)  # so that no ratio is negative
    s = most_progress(progress, curvature, 1e-6, 1e6)
    quotients = (curvature @ s) / progress
    np.testing.assert_allclose(quotients, quotients[0], rtol=1e-10)
    assert s @ curvature @ s == pytest.approx(curvature.sum(), rel=1e-10)


def test_ratios_of_one_are_the_solution_where_the_quotients_are_equal_already():
    _, curvature = problem(np.random.default_rng(5), 6)
    curvature = np.abs(curvature) + 6 * np.eye(6)
    np.testing.assert_allclose(most_progress(3 * curvature.sum(1), curvature), 1, rtol=1e-12)


def test_a_matrix_that_is_not_positive_definite_is_refused():
    with pytest.raises(np.linalg.LinAlgError):
        most_progress(np.ones(2), np.array([[1.0, 2.0], [2.0, 1.0]]))


def readings(random, progress, curvature, noise, count=12):
    """A pilot whose readings scatter around these values by a share of their mean size."""
    size = np.abs(progress).mean() or 1.0
    ps = progress + noise * size * random.normal(size=(count, len(progress)))
    return ps, curvature + 0.15 * noise * size * random.normal(size=(count, *curvature.shape))


CURVATURE = np.eye(8) + 0.2
BALANCED = CURVATURE.sum(1)


def test_an_advice_holds_the_true_ratios_and_commits_what_is_certain():
    factors = np.array([2.0, 0.5, 1, 1, 1, 1, 1, 1])
    truth = most_progress(BALANCED * factors, CURVATURE, reserve=np.diag(CURVATURE))
    hits = 0
    for seed in range(20):
        found = advise(*readings(np.random.default_rng(seed), BALANCED * factors, CURVATURE, 0.1), seed=seed)
        assert found.refusal is None and found.certain[:2].all()
        assert found.committed[0] > 1 > found.committed[1] and found.gain > 1
        assert len(set(found.committed[~found.certain])) == 1
        assert found.committed @ CURVATURE @ found.committed == pytest.approx(CURVATURE.sum(), rel=0.05)
        hits += int(((found.low <= truth) & (truth <= found.high)).all())
    assert hits >= 18  # all eight at once, at a confidence of 95 %


def test_third_order_widens_the_interval():
    twist = np.triu(np.full((8, 8), 0.3), 1)
    apart = advise(*readings(np.random.default_rng(0), BALANCED, CURVATURE + twist - twist.T, 0.02))
    alike = advise(*readings(np.random.default_rng(0), BALANCED, CURVATURE, 0.02))
    assert (apart.high - apart.low > 2 * (alike.high - alike.low)).all()


def moved_and_refused(seeds, progress, curvature, noise):
    """The shares of pilots that would move somebody, and that are refused."""
    moved = refused = 0
    for seed in range(seeds):
        found = advise(*readings(np.random.default_rng(seed), progress, curvature, noise), seed=seed)
        moved, refused = moved + int((found.committed != 1).any()), refused + int(found.refusal is not None)
    return moved / seeds, refused / seeds


def test_pure_noise_is_refused():
    assert moved_and_refused(1000, np.zeros(8), np.zeros((8, 8)), 1.0) == (0.0, 1.0)


def test_noise_around_balance_moves_somebody_in_at_most_a_twentieth_of_pilots():
    moved, refused = moved_and_refused(60, BALANCED, CURVATURE, 0.1)
    assert moved <= 0.1 and refused == 0  # 0.05 and two standard errors of 60 pilots


@pytest.mark.slow
def test_noise_around_balance_moves_somebody_in_at_most_a_twentieth_of_a_thousand_pilots():
    moved, refused = moved_and_refused(1000, BALANCED, CURVATURE, 0.1)
    assert moved <= 0.05 and refused == 0


@pytest.mark.parametrize(
    ("progress", "curvature", "part"),
    [
        (-BALANCED, CURVATURE, "progress of all groups together"),
        (BALANCED, -CURVATURE, "curvature along the step is not positive"),
        (BALANCED, CURVATURE + np.eye(8)[[1, 0, *range(2, 8)]] * ([1.5] * 2 + [0] * 6), "not positive definite"),
    ],
)
def test_what_cannot_be_solved_is_refused_in_one_sentence(progress, curvature, part):
    found = advise(*readings(np.random.default_rng(0), progress, curvature, 0.02))
    assert part in found.refusal and found.refusal.count(". ") == 0
    assert found.committed.tolist() == [1.0] * 8 and not found.certain.any()


def test_a_group_without_curvature_of_its_own_is_held_and_the_others_are_advised():
    flat = CURVATURE - 1.5 * np.diag(np.eye(8)[7])
    found = advise(*readings(np.random.default_rng(0), BALANCED * ([3.0] + [1.0] * 7), flat, 0.05))
    assert found.refusal is None and found.ratios[7] == 1 and not found.certain[7] and found.certain[0]


def test_a_schedule_and_the_scale_of_the_loss_do_not_matter():
    ps, cs = readings(np.random.default_rng(0), BALANCED * ([3.0] + [1.0] * 7), CURVATURE, 0.05)
    rate = np.geomspace(1, 1e-3, 12)
    one, other = advise(ps, cs), advise(7 * rate[:, None] * ps, 7 * rate[:, None, None] ** 2 * cs)
    assert one.certain.tolist() == other.certain.tolist()
    np.testing.assert_allclose(one.ratios, other.ratios, rtol=0.15)  # the running median lags behind a steep schedule


def test_too_few_finite_readings_are_refused():
    ps, cs = readings(np.random.default_rng(0), BALANCED, CURVATURE, 0.02)
    cs[3:, 0, 0] = np.nan
    assert "there are 3 finite readings" in advise(ps, cs).refusal


def test_what_to_paste_leaves_out_ratios_of_one():
    keys = [("role:embedding",), ("a.weight", "b.weight"), ("head.weight",)]
    assert ratios_by_key(keys, np.array([1.0, 0.3333, 1.002])) == {"a.weight": 0.33, "b.weight": 0.33}
