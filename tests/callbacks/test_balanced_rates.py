"""Balanced rates in a Trainer and in plain loops: what is measured, resume, windows, several processes, refusals."""

import copy

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.nn.functional import cross_entropy

from dynamon.callbacks import LayerwiseLR
from dynamon.monitoring.step_probe import StepObserver
from dynamon.monitoring.watch import Watch
from dynamon.optim import LayerwiseRates
from dynamon.rates import BalancedRates
from tests.helpers import ByHand, Classifier, batches, fit, mlp, same_weights
from tests.models import dense_hessian
from tests.processes import fit_here, in_processes, small

pytestmark = pytest.mark.filterwarnings("ignore")
SGD = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.05)}


class Certain(BalancedRates):
    """Moves after every reading, so that short runs show it; the readings are real."""

    def learn(self, reading):
        self.seen = [*getattr(self, "seen", []), reading]
        log_ratios = np.linspace(-0.1, 0.1, len(self.groups)) * len(self.seen)
        self._log_ratios = log_ratios + 1e-3 * float(np.tanh(np.nansum(reading.before)))
        self._aim(np.exp(self._log_ratios))

    def state_dict(self):
        return {**super().state_dict(), "seen": len(getattr(self, "seen", []))}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.seen = [None] * state["seen"]


def rule_of(steering):
    (rates,) = steering._steered.values()
    return rates.rule


def test_a_dry_run_is_bitwise_that_without():
    plain, dry = Classifier(mlp(0.2)), Classifier(mlp(0.2))
    fit(plain, [])
    steering = LayerwiseLR(Certain(every=2), apply=False)
    fit(dry, [steering])
    assert same_weights(plain, dry) and min(steering.ratios.values()) < 1 < max(steering.ratios.values())


@pytest.mark.parametrize("scheduler", [None, lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9)])
def test_the_readings_are_those_of_the_steps_by_hand(scheduler):
    module, steering = Classifier(mlp().double(), scheduler=scheduler, **SGD), LayerwiseLR(Certain(every=3))
    data = [(x.double(), y) for x, y in batches(count=96)]
    seen = []

    class Weights(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append((copy.deepcopy(pl_module.network), batch))

    loader = torch.utils.data.DataLoader(data, batch_size=None)
    fit(module, [Weights(), steering], loader, steps=12, max_epochs=-1)
    readings = rule_of(steering).seen
    assert len(readings) == 3  # of steps 2, 5 and 8; that of step 11 has no next batch
    for number, reading in enumerate(readings):
        before, (after, (inputs, labels)) = seen[3 * number + 2][0], seen[3 * number + 3]
        for network, slopes in ((before, reading.before), (after, reading.after)):
            gradients = torch.autograd.grad(cross_entropy(network(inputs), labels), list(network.parameters()))
            pairs = zip(gradients, before.parameters(), after.parameters(), strict=True)
            wanted = [float((g * (new - old)).sum()) for g, old, new in pairs]
            np.testing.assert_allclose(slopes, wanted, rtol=1e-9, atol=1e-15)


def test_a_pilot_measures_the_curvature_between_groups_and_commits_for_the_rest():
    module = Classifier(mlp().double(), **SGD)
    loader = torch.utils.data.DataLoader([(x.double(), y) for x, y in batches(count=400)], batch_size=None)
    steering = LayerwiseLR(BalancedRates(["network.0.*", "network.*"], pilot=24))
    fit(module, [steering], loader, steps=40, max_epochs=-1)
    rule = rule_of(steering)
    assert rule.advice.readings == 12 and rule._couplings.shape == (12, 2, 2)
    assert set(steering.ratios.values()) == set(rule.advice.committed.tolist())
    # C is symmetric up to third order, and each reading's sum is the curvature of the whole step
    c = rule._couplings
    assert np.abs(c - c.transpose(0, 2, 1)).max() < 0.05 * np.abs(c).max()


def test_a_resumed_run_is_bitwise_the_run_that_never_stopped(tmp_path):
    def run(steps, **arguments):
        steering = LayerwiseLR(Certain(every=4))
        keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=8, save_top_k=-1)
        module = Classifier(mlp(), **SGD)
        fit(module, [steering, keep], steps=steps, max_epochs=-1, enable_checkpointing=True, **arguments)
        return module, steering

    run(8)  # the step that is read was just taken: its weights are in the checkpoint
    path = tmp_path / "step=8.ckpt"
    own = torch.load(path, weights_only=True)["callbacks"]
    assert [bool(state["pending"]["probe"]["before"]) for key, state in own.items() if "LayerwiseLR" in key] == [True]
    (resumed, again), (whole, steering) = run(20, ckpt_path=str(path)), run(20)
    assert same_weights(whole, resumed) and steering.ratios == again.ratios
    assert len(set(steering.ratios.values())) > 2


def test_a_reading_is_of_the_step_and_not_of_a_batch_of_its_window():
    steering = LayerwiseLR(Certain(every=2))
    fit(Classifier(mlp(), **SGD), [steering], steps=8, max_epochs=-1, accumulate_grad_batches=3)
    readings = rule_of(steering).seen
    assert len(readings) == 3 and all(np.abs(reading.before).max() > 0 for reading in readings)


def test_watch_serves_the_steering_of_a_plain_loop():
    data = list(batches(count=160))
    module = Classifier(mlp(), **SGD)
    steering = LayerwiseLR(Certain(every=3))
    fit(module, [steering], torch.utils.data.DataLoader(data, batch_size=None), steps=14, max_epochs=-1)
    network = Classifier(mlp()).network
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    rates = LayerwiseRates(optimizer, Certain(every=3), network)

    def loss_fn(model, batch):
        return cross_entropy(model(batch[0]), batch[1])

    with Watch(network, optimizer, loss_fn, monitors=[]) as watch:
        for batch in data[:14]:
            with watch.batch(batch):
                optimizer.zero_grad()
                loss_fn(network, batch).backward()
                optimizer.step()
    assert {f"network.{name}": ratio for name, ratio in rates.ratios.items()} == pytest.approx(steering.ratios)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), module.network.parameters(), strict=True))


def test_a_failing_reading_changes_nothing_and_says_so_twice():
    plain, module = Classifier(mlp(), **SGD), Classifier(mlp(), **SGD)
    fit(plain, [], steps=12, max_epochs=-1)

    def loss_fn(model, batch):
        raise RuntimeError("no second time")

    steering = LayerwiseLR(Certain(every=1), loss_fn=loss_fn)
    with pytest.warns(UserWarning, match="a reading of a step failed: no second time") as caught:
        fit(module, [steering], steps=12, max_epochs=-1)
    assert same_weights(plain, module)
    assert sum("a reading of a step failed" in str(one.message) for one in caught) == 2


def test_optimizers_that_cannot_take_ratios_are_named():
    with pytest.raises(ValueError, match="LBFGS"):
        fit(Classifier(mlp(), optimizer=lambda p: torch.optim.LBFGS(p)), [LayerwiseLR(BalancedRates(every=2))])


def test_manual_optimisation_needs_a_loss_function():
    plain, module = ByHand(mlp(), **SGD), ByHand(mlp(), **SGD)
    fit(plain, [])
    with pytest.warns(UserWarning, match="all ratios stay as they are: .*loss_fn"):
        fit(module, [LayerwiseLR(Certain(every=2))])
    assert same_weights(plain, module)
    steering = LayerwiseLR(Certain(every=2), loss_fn=lambda m, batch: cross_entropy(m.network(batch[0]), batch[1]))
    fit(ByHand(mlp(), **SGD), [steering], steps=7, max_epochs=-1)
    assert len(rule_of(steering).seen) == 3


@pytest.mark.processes
def test_two_processes_have_one_set_of_ratios():
    def work(rank):
        steering = LayerwiseLR(Certain(every=2))
        fit_here(Classifier(small(), **SGD), [steering], steps=8)
        return steering.ratios, [reading.before.tolist() for reading in rule_of(steering).seen]

    (one, first), (other, second) = in_processes(work)
    assert one == other and len(set(one.values())) > 1
    assert first == second


def test_the_oracle_of_couplings_is_the_dense_hessian():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    inputs, labels = torch.randn(32, 4, dtype=torch.float64), torch.randint(3, (32,))

    def loss_fn(model, batch):
        return cross_entropy(model(inputs), labels)

    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4)
    rates = LayerwiseRates(optimizer, BalancedRates(["0.*", "2.*"], pilot=12), network)
    observer = StepObserver(network, optimizer, loss_fn)
    hessian = dense_hessian(network, lambda model: loss_fn(model, None))
    before = [p.detach().clone() for p in network.parameters()]
    loss_fn(network, None).backward()
    observer.keep()
    optimizer.step()
    steps = [p.detach() - b for p, b in zip(network.parameters(), before, strict=True)]
    whole = torch.cat([step.flatten() for step in steps])
    size = sum(step.numel() for step in steps[:2])
    u = torch.stack([torch.where(torch.arange(len(whole)) < size, whole, 0.0), whole])
    u[1] -= u[0]
    wanted = (u @ hessian @ u.T).numpy()
    rates.rule.learn_couplings(observer.couplings(None, rates.rule.probe_groups))
    np.testing.assert_allclose(rates.rule._couplings[0], wanted, rtol=1e-3)
