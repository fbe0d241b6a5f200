"""How many products a budget allows, and what is done with fewer than a solve would like."""

import math
from types import SimpleNamespace

import pytest
import torch

from dynamon.curvature.solvers.tracker import EigenTracker
from dynamon.monitoring.budget import Budget
from dynamon.monitoring.matvec_allowance import LEAST, MatvecAllowance


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=0.0)
    for module in ("budget", "matvec_allowance"):
        monkeypatch.setattr(f"dynamon.monitoring.{module}.time.perf_counter", lambda: clock.now)
    return clock


def run_with(fraction: float | None, grace: float = 0.0) -> SimpleNamespace:
    return SimpleNamespace(budget=Budget(fraction, grace), ranks=SimpleNamespace(is_distributed=False, rank=0))


def test_the_price_of_products_is_what_they_took(clock) -> None:
    allowance = MatvecAllowance()
    assert allowance.price(10, None) is None
    guess = allowance.price(10, 0.1)
    assert guess is not None and 1.0 < guess < 3.0  # ten products, each somewhat more than the gradient with its graph
    for seconds in (1.0, 0.5, 9.0):
        allowance.note(seconds, 10)
    assert allowance.price(10, 0.1) == pytest.approx(1.0)


def test_two_kinds_of_products_have_prices_of_their_own(clock) -> None:
    allowance = MatvecAllowance()
    assert allowance.price(10, None, one_sided=True) is None
    assert allowance.price(10, 0.1, one_sided=True) == pytest.approx(allowance.price(10, 0.1) / 2)
    allowance.note(8.0, 10)
    assert allowance.price(4, 0.1, one_sided=True) == pytest.approx(1.6)  # half of the exact ones, until they are timed
    allowance.note(1.0, 4, one_sided=True)
    assert allowance.price(4, 0.1, one_sided=True) == pytest.approx(1.0)
    assert allowance.price(10, 0.1) == pytest.approx(8.0)
    for one_sided, products in ((False, 25), (True, 80)):
        allowance.open(run_with(0.02, grace=20.0), True, None, one_sided)
        assert allowance.rest(0) == pytest.approx(products)


def test_products_end_where_the_budget_does(clock) -> None:
    allowance, run = MatvecAllowance(), run_with(0.02, grace=2.0)
    allowance.note(1.0, 20)
    allowance.open(run, is_limited=True, graph_seconds=None)
    assert allowance.rest(0) == pytest.approx(40)
    clock.now += 1.0  # five products took a second: there is time for five more
    assert allowance.rest(5) == pytest.approx(5)
    clock.now += 5.0
    assert allowance.rest(10) < 0


@pytest.mark.parametrize(("fraction", "is_limited"), [(None, True), (0.02, False)])
def test_fixed_steps_and_no_budget_have_no_limit(clock, fraction, is_limited) -> None:
    allowance = MatvecAllowance()
    allowance.note(1.0, 1)
    allowance.open(run_with(fraction), is_limited, graph_seconds=None)
    clock.now += 100.0
    assert allowance.rest(1000) == math.inf


def test_a_measurement_that_was_planned_is_not_cut_below_the_least(clock) -> None:
    allowance = MatvecAllowance()
    allowance.note(1.0, 1)
    allowance.open(run_with(0.02, grace=0.5), is_limited=True, graph_seconds=None)
    assert allowance.rest(0) == LEAST


def test_a_tracker_takes_no_more_products_than_it_may() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(200, 200, dtype=torch.float64)
    tracker = EigenTracker(tol=1e-6)
    assert tracker.update(matrix @ matrix.T, most=9).matvecs <= 9
    assert not tracker.update(matrix @ matrix.T, most=9).converged
    assert 9 < tracker.update(matrix @ matrix.T).matvecs <= 40
