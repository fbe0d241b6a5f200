"""Public functions show an example, and all examples in docstrings run as they stand."""

import doctest
import importlib
import pkgutil

import pytest

import dynamon

PUBLIC = (
    *("dynamon.describe_layers", "dynamon.measure"),
    *("dynamon.layers.layer_table", "dynamon.layers.select"),
    *("dynamon.norms.get_norm", "dynamon.norms.optimizer_family"),
    *("dynamon.rates.FixedRates", "dynamon.rates.NoiseAdaptiveRates", "dynamon.rates.Rule"),
    *("dynamon.optim.LayerwiseRates", "dynamon.optim.Lanton", "dynamon.optim.steering_of"),
    *("dynamon.schedule.refined_schedule", "dynamon.schedule.schedule_factor"),
    *("dynamon.runs.History", "dynamon.runs.Series", "dynamon.runs.read_run"),
    *("dynamon.health.findings", "dynamon.health.judged_loss"),
    *("dynamon.isolation.preserve.preserve_state", "dynamon.board.live.LiveFolder"),
)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_show_an_example(name: str) -> None:
    module, _, last = name.rpartition(".")
    found = doctest.DocTestParser().get_examples(getattr(importlib.import_module(module), last).__doc__)
    assert found and any(example.want for example in found) or name == "dynamon.rates.Rule"


@pytest.mark.parametrize(
    "name", [m.name for m in pkgutil.walk_packages(dynamon.__path__, "dynamon.") if not m.name.endswith("__main__")]
)
def test_examples_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0
