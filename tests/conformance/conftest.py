import logging

import pytest

pytest.register_assert_rewrite("tests.conformance.checks")  # so that a check that fails shows what it compared


@pytest.fixture(autouse=True)
def quiet():
    """Lightning's remarks at every fit, some thousand times over."""
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    logger.setLevel(logging.WARNING)
    yield
    logger.setLevel(before)


@pytest.fixture(autouse=True)
def a_coarse_density(monkeypatch):
    """A third of the products, which are half of what the dearest cells take; how exact it is, others test."""
    monkeypatch.setattr("dynamon.monitoring.curvature_solves.DENSITY_STEPS", 20)
