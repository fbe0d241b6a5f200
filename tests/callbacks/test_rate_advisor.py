"""The rate advisor: it changes nothing, resumes, and says in the terminal and from files what its readings say."""

import re

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.nn.functional import cross_entropy

from dynamon.callbacks import RateAdvisor
from dynamon.cli import main
from dynamon.layers import describe_layers
from dynamon.monitoring import RateAdvisor as PlainAdvisor
from dynamon.monitoring.watch import Watch
from dynamon.optim.lanton import RADII
from dynamon.rates import FixedRates, rate_groups
from dynamon.rates.advice_text import advice_lines
from dynamon.rates.allocation import advise
from tests.helpers import Classifier, batches, fit, mlp, same_weights

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 40


def network() -> nn.Module:
    """A net whose first layer takes steps that are much too large."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 3))


def optimizer(parameters):
    first, second, *others = list(parameters)
    return torch.optim.SGD([{"params": [first, second], "lr": 1.0}, {"params": others, "lr": 0.02}], lr=0.1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("advisor")
    advisor = RateAdvisor(pilot=36, readings=12, group_by="parameter_groups")
    module = Classifier(network(), optimizer=optimizer)
    loggers = [TensorBoardLogger(root, name="tb"), CSVLogger(root, name="csv")]
    fit(module, [advisor], batches(count=1280, size=32), steps=STEPS, max_epochs=-1, logger=loggers)
    return root, advisor, module


def test_it_changes_nothing(run):
    plain = Classifier(network(), optimizer=optimizer)
    fit(plain, [], batches(count=1280, size=32), steps=STEPS, max_epochs=-1)
    assert same_weights(plain, run[2])


def test_the_advice_is_that_of_the_readings_in_its_history(run):
    _, advisor, _ = run
    progress, coupling = advisor.history["advice/progress"], advisor.history["advice/coupling"]
    assert len(progress) == 12 and progress.layers == ("group 0", "group 1")
    assert coupling.layers[1] == "group 0 | group 1"
    again = advise(progress.values, coupling.values.reshape(-1, 2, 2))
    assert again.ratios.tolist() == advisor.advice.ratios.tolist()


@pytest.mark.parametrize("kind", ["tb", "csv"])
def test_the_command_says_the_same_from_files(run, kind, capsys):
    root, advisor, _ = run
    assert main(["advise", str(root / kind)]) == 0
    told = capsys.readouterr().out
    wanted = str(advisor).splitlines()
    assert [line for line in told.splitlines() if line in wanted] == wanted


def test_the_command_refuses_in_one_sentence(tmp_path, capsys):
    fit(Classifier(mlp()), [], logger=CSVLogger(tmp_path), steps=2)
    assert main(["advise", str(tmp_path)]) == 2
    assert "no readings of RateAdvisor" in capsys.readouterr().err
    assert main(["advise", str(tmp_path), "--low", "2"]) == 2
    assert "low must lie in (0, 1]" in capsys.readouterr().err


def test_it_goes_on_after_a_resume(tmp_path):
    def go(steps, **arguments):
        advisor = RateAdvisor(pilot=48, readings=12, group_by="role", strict=True)
        keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=8, save_top_k=-1)
        module = Classifier(network(), optimizer=optimizer)
        fit(module, [advisor, keep], steps=steps, max_epochs=-1, enable_checkpointing=True, **arguments)
        return module, advisor

    go(8)  # the weights for the second reading are in the checkpoint
    (resumed, again), (whole, advisor) = go(56, ckpt_path=str(tmp_path / "step=8.ckpt")), go(56)
    assert same_weights(whole, resumed)
    assert advisor.advice.readings == again.advice.readings == 12
    assert advisor.advice.ratios.tolist() == again.advice.ratios.tolist()


def test_a_plain_loop_has_it_too():
    model = network()
    steps = optimizer(model.parameters())
    advisor = PlainAdvisor(pilot=24, readings=12, group_by=["0.*", "2.*"])

    def loss_fn(model, batch):
        return cross_entropy(model(batch[0]), batch[1])

    with Watch(model, steps, loss_fn, monitors=advisor) as watch:
        for batch in list(batches(count=240))[:30]:
            with watch.batch(batch):
                steps.zero_grad()
                loss_fn(model, batch).backward()
                steps.step()
    assert advisor.advice.readings == 12 and [group.label for group in advisor.groups] == ["0.*", "2.*"]


def test_lines_to_paste_run(run):
    """What it tells to paste is what FixedRates and an optimizer take."""
    text = "\n".join(str(run[1]).splitlines())
    model = network()
    found = re.findall(r"optimizer\.param_groups\[(\d)\]\[\"lr\"\] \*= ([\d.e-]+)", text)
    assert bool(found) == bool(run[1].advice.certain.any())
    rates = {"0.*": 0.5, "role:vector": 2.0}
    groups = rate_groups(model, rates, lr=0.1)
    by_ratio = {round(group["lr"] / 0.1, 6): len(group["params"]) for group in groups}
    rule = FixedRates(rates)
    rule.start(describe_layers(model), [])
    assert by_ratio == {ratio: int((rule.ratios() == ratio).sum()) for ratio in set(rule.ratios().tolist())}
    with pytest.raises(ValueError, match="matches no layer"):
        rate_groups(model, {"nothing.*": 2.0}, lr=0.1)


@pytest.mark.parametrize(
    "arguments", [{"readings": 2}, {"pilot": 5}, {"group_by": "x"}, {"low": 0.0}, {"high": 0.5}, {"loss_fn": 3}]
)
def test_arguments_out_of_range_are_named(arguments):
    with pytest.raises((ValueError, TypeError), match=next(iter(arguments))):
        RateAdvisor(**arguments)


def test_advice_in_words_names_roles_for_lanton():
    random = np.random.default_rng(0)
    curvature = np.eye(3) + 0.2
    progress = curvature.sum(1) * [3.0, 1.0, 0.3] * (1 + 0.02 * random.normal(size=(12, 3)))
    advice = advise(progress, curvature * (1 + 0.02 * random.normal(size=(12, 3, 3))))
    text = "\n".join(advice_lines(advice, ["role:hidden", "role:head", "role:vector"], RADII))
    radius = float(re.search(r'radii={.*"vector": ([\d.]+)', text)[1])
    assert radius == pytest.approx(RADII["vector"] * advice.committed[2], rel=0.06)
    shown = [line.split() for line in text.splitlines() if line.rstrip().endswith(("hidden", "head", "vector"))]
    assert [float(line[4]) for line in shown] == [float(f"{ratio:.2g}") for ratio in advice.committed]
    table = re.search(r"ratios = (\{.*\})", text)[1]
    assert FixedRates(eval(table))  # noqa: S307
