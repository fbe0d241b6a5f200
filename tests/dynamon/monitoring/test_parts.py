"""A monitor of everything takes its parts, and a user states roles and geometry: in a plain loop."""

import copy
import logging
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import dynamon
from dynamon.layers import measurable_layers
from dynamon.monitoring import DynamicsMonitor, GradientMonitor, SharpnessMonitor, WeightMonitor
from dynamon.quantities import weights

ROLES = {"0.weight": "head"}


def loss_fn(model: Any, batch: Any) -> torch.Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def trained(*monitors: Any, steps: int = 7, make: Any = torch.optim.SGD, state: Any = None) -> dynamon.Watch:
    """Train a small network under a watch."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    optimizer = make(model.parameters(), lr=0.05)
    watch = dynamon.Watch(model, optimizer, loss_fn=loss_fn, monitors=monitors)
    if state is not None:
        watch.load_state_dict(state)
    for index in range(watch.step, watch.step + steps):
        generator = torch.Generator().manual_seed(index)
        batch = [torch.randn(16, 6, generator=generator).double(), torch.randint(3, (16,), generator=generator)]
        with watch.batch(batch) as block:
            block.loss = loss_fn(model, batch)
            block.loss.backward()
            watch.gradients = [p.grad.clone() for p in model.parameters()]
            optimizer.step()
            optimizer.zero_grad()
    watch.close()
    return watch


def test_a_part_measures_what_it_measures_alone():
    def make(**more: Any) -> SharpnessMonitor:
        return SharpnessMonitor(quantities=["hessian", "ggn"], tol=1e-4, probe_fraction=0.5, strict=True, **more)

    alone, others = make(every_n_steps=2), WeightMonitor(2, convolutions=True, strict=True)
    part = SharpnessMonitor(quantities=["hessian", "ggn"], tol=1e-4, probe_fraction=0.5)
    whole = DynamicsMonitor(every_n_steps=2, strict=True, sharpness=part, weights=WeightMonitor(convolutions=True))
    trained(alone), trained(others), trained(whole)
    for tag in ("sharpness/hessian_max", "sharpness/ggn_max", "sharpness/hessian_min"):
        assert np.array_equal(whole.history[tag].values, alone.history[tag].values)
    assert np.array_equal(whole.history["weight/operator"].values, others.history["weight/operator"].values)
    assert "sharpness/critical" not in whole.history  # of the preset, which the part replaces
    assert "gradient/norm" in whole.history  # of the preset, since no part was given
    assert part.history is whole.history
    assert part.overhead == whole.overhead > 0


def test_a_part_has_its_own_steps_or_those_of_the_whole():
    whole = DynamicsMonitor(every_n_steps=2, sharpness=SharpnessMonitor(3), weights=WeightMonitor())
    trained(whole, steps=9)
    assert whole.history["sharpness/hessian_max"].steps.tolist() == [0, 3, 6]
    assert whole.history["weight/operator"].steps.tolist() == whole.history["gradient/norm"].steps.tolist()
    assert set(whole.history["weight/operator"].steps) == {0, 2, 4, 6, 8}


def test_copies_of_a_composed_monitor_have_their_own_history():
    whole = DynamicsMonitor(every_n_steps=2, sharpness=SharpnessMonitor())
    trained(whole)
    for twin in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        assert len(twin.history) == len(whole.history)
        assert twin._given["sharpness"].history is twin.history is not whole.history


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: DynamicsMonitor(sharpness=SharpnessMonitor(budget=0.5)), ValueError, "give it to DynamicsMonitor"),
        (lambda: DynamicsMonitor(weights=WeightMonitor(grace=0)), ValueError, "grace is given to weights"),
        (lambda: DynamicsMonitor(gradients=GradientMonitor(layers=["a"])), ValueError, "layers is given to gradients"),
        (lambda: DynamicsMonitor(gradients=GradientMonitor(roles=ROLES)), ValueError, "roles is given to gradients"),
        (lambda: DynamicsMonitor(tol=1e-3, sharpness=SharpnessMonitor()), ValueError, "tol is given beside sharpness"),
        (lambda: DynamicsMonitor(histograms=True, weights=WeightMonitor()), ValueError, "histograms is given beside"),
        (lambda: DynamicsMonitor(sharpness=WeightMonitor()), TypeError, "sharpness must be a SharpnessMonitor"),
        (lambda: DynamicsMonitor(sharpness="full"), TypeError, "got str"),
        (lambda: GradientMonitor(roles={"a": "body"}), ValueError, "choose one of hidden"),
        (lambda: GradientMonitor(roles=["head"]), TypeError, "roles must map globs to roles"),
        (lambda: WeightMonitor(geometry="l2"), ValueError, "geometry must be one of sign"),
        (lambda: SharpnessMonitor(geometry={"SGD": "l2"}), ValueError, "geometry must be one of sign"),
        (lambda: DynamicsMonitor(geometry=2), TypeError, "geometry must be a string or map"),
        (lambda: trained(GradientMonitor(1, roles={"9.*": "head"})), ValueError, "matches no parameter"),
        (lambda: trained(GradientMonitor(1, geometry={"SOAP": "sign"})), ValueError, "the optimizers are SGD"),
    ],
)
def test_what_cannot_be_meant_is_refused(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_stated_roles_choose_the_norms():
    watch = trained(DynamicsMonitor(every_n_steps=2, strict=True, roles=ROLES))
    layers = {layer.name: layer for layer in watch.monitors[0]._run.layers}
    assert layers["0.weight"].role == "head"
    shown = watch.history["weight/operator"]
    row = shown.values[-1][shown.layers.index("0.weight")]
    weight = layers["0.weight"].parameter.detach().numpy()  # after the last step, which was read
    by_hand = np.sqrt(6) * np.linalg.norm(weight, axis=1).max()  # RMS to inf
    assert row == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("geometry", ["sign", {"SGD": "sign"}, "euclidean", None])
def test_a_stated_geometry_chooses_the_dual_norms(geometry):
    watch = trained(GradientMonitor(1, strict=True, geometry=geometry))
    shown = watch.history["gradient/dual"]
    dual = [g.abs().sum() if geometry in ("sign", {"SGD": "sign"}) else g.norm() for g in watch.gradients]
    assert shown.values[-1] == pytest.approx([float(d) for d in dual], rel=1e-6)


class NoBase(torch.optim.Optimizer):
    """Of which nothing is known."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(group["lr"] * p.grad)


def said(caplog: Any, *monitors: Any) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.INFO, "dynamon"):
        trained(*monitors, make=NoBase, steps=3)
    return [record.message for record in caplog.records]


def test_what_is_assumed_is_said_once_and_not_where_it_is_stated(caplog):
    parts = [GradientMonitor(1), WeightMonitor(1), SharpnessMonitor(1, quantities=["directional"])]
    messages = said(caplog, *parts)
    roles = [m for m in messages if m.startswith("Roles assumed")]
    assert roles == [
        "Roles assumed by name or place: head: 2.weight. They choose norms; roles={glob: role} states others."
    ]
    assert len([m for m in messages if "assumed to descend" in m and "pass geometry='sign'" in m]) == 1
    stated = {"roles": {"2.weight": "head"}, "geometry": "euclidean"}
    assert not [m for m in said(caplog, DynamicsMonitor(every_n_steps=1, **stated)) if "assumed" in m]


def numbers(state: Any) -> int:
    """How many numbers the tensors in a state have."""
    if isinstance(state, torch.Tensor):
        return state.numel()
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return sum(map(numbers, values))


@pytest.mark.parametrize("saves", [True, False])
def test_checkpoints_hold_solver_vectors_where_wanted(saves):
    monitor = SharpnessMonitor(3, quantities=["hessian", "blocks"], save_vectors=saves, save_probe=False)
    first = trained(monitor)
    state = copy.deepcopy(first.state_dict())
    assert (numbers(state["monitors"][0]["sharpness"]) > 80) == saves  # the model has 83 parameters
    again = trained(SharpnessMonitor(3, quantities=["hessian"], strict=True), state=state)
    assert again.history["sharpness/hessian_max"].steps.tolist() == [9, 12]
    products = again.history["sharpness/matvecs"].values
    assert products[0] > 0


def test_monitors_of_one_watch_have_one_budget_and_one_grace():
    first, second = GradientMonitor(grace=1.0), WeightMonitor(budget=0.1, grace=2.0)
    fixed = SharpnessMonitor(3, budget=0.5, grace=60.0, quantities=["directional"])
    trained(first, second, fixed, steps=12)
    ledger = first._budget.ledger
    assert ledger is second._budget.ledger is fixed._budget.ledger
    assert (ledger.fraction, ledger.grace) == (0.1, 2.0)  # fixed steps are outside of it
    assert first._budget.left == second._budget.left
    assert ledger.spent == first._budget.spent + second._budget.spent
    assert fixed.history["sharpness/directional"].steps.tolist() == [0, 3, 6, 9]
    for monitor, tag in ((first, "gradient/norm"), (second, "weight/operator")):
        assert 0 < len(monitor.history[tag].steps)
        assert monitor.history[tag].steps[0] < 10


def test_without_a_limit_each_monitor_reads_as_often_as_it_may():
    monitors = [GradientMonitor(budget=None), WeightMonitor(budget=None), SharpnessMonitor(budget=None)]
    watch = trained(*monitors, steps=45)
    assert watch.history["gradient/norm"].steps.tolist() == list(range(2, 45, 4))
    assert watch.history["weight/operator"].steps.tolist() == [2, 22, 42]


def test_guessing_a_price_is_cheap_and_keeps_to_its_share(monkeypatch):
    """Parts grow until one tells enough, or the time is over; where nothing is left, nothing is timed."""
    clock, sides = [0.0], []

    def measure(stacks: Any) -> Any:
        side = stacks[0].shape[-1]
        sides.append(side)
        clock[0] += 1e-3 + 1e-9 * side**3
        return real(stacks)

    real = weights.extremes_of
    monkeypatch.setattr(weights, "extremes_of", measure)
    monkeypatch.setattr(weights.time, "perf_counter", lambda: clock[0])
    layers = measurable_layers(nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512)))
    guess = weights.guess_seconds(layers, most=1.0)
    assert guess == pytest.approx(2 * (1e-3 + 2 * 1e-9 * 512**3), rel=0.02)
    assert clock[0] <= 0.1 * guess and max(sides) == 128
    clock[0], sides[:] = 0.0, []
    weights.guess_seconds(layers, most=0.004)
    assert clock[0] < 0.008 and max(sides) == 32


def test_a_resumed_run_has_a_loss_where_something_was_measured_only():
    first = trained(GradientMonitor(2), steps=3)
    assert first.history["dynamon/loss"].steps.tolist() == [0, 2]
    again = trained(GradientMonitor(2), steps=4, state=copy.deepcopy(first.state_dict()))
    assert again.history["gradient/norm"].steps.tolist() == again.history["dynamon/loss"].steps.tolist() == [4, 6]
