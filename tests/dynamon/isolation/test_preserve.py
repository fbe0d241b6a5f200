"""Evaluating the loss again leaves no trace."""

import collections
import copy
import pickle
import random
import warnings
from array import array

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dynamon.isolation.preserve import preserve_state, training_loss
from dynamon.isolation.samples import take_samples
from tests.models import cnn, mlp, samples


class Messy(nn.Module):
    """A module whose training_step leaves every kind of trace."""

    def __init__(self):
        super().__init__()
        import torchmetrics

        self.net, self.dropout = cnn(), nn.Dropout(0.5)
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)
        self.collection = torchmetrics.MetricCollection(
            {"cat": torchmetrics.CatMetric(), "mean": torchmetrics.MeanMetric()}
        )
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("shadow", torch.zeros(2), persistent=False)
        self.register_buffer("mask", None)
        self.counter, self.name, self.last = 0, "before", None
        self.plain_tensor = torch.ones(2)
        self.outputs, self.seen, self.table = [1.0], {3}, {"a": 1}
        self.nested = collections.defaultdict(list, train=[0.5])
        self.queue = collections.deque([1, 2], maxlen=2)
        self.logged = []

    def log(self, name, value):
        self.logged.append((name, value))

    def log_dict(self, values):
        self.logged.append(values)

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        self.log("loss", 1.0)
        self.log_dict({"loss": 1.0})
        out = self.dropout(self.net(inputs))
        self.calls += 1
        self.shadow = torch.ones(3)
        self.mask = torch.ones(4)
        self.register_buffer("late", torch.ones(1))
        self.counter += 1
        self.name, self.last, self.new = "after", out, 7
        self.plain_tensor.add_(1)
        self.outputs.append(2.0)
        self.seen.add(4)
        self.table["b"] = 2
        self.nested["train"].append(0.25)
        self.nested["val"].append(1.0)
        self.queue.append(3)
        self.accuracy(out, labels)
        self.collection.update(out.detach().mean())
        self.net.eval()
        random.random(), np.random.rand(), torch.rand(1)
        batch.clear()
        return cross_entropy(out, labels)


def remember(module):
    """Everything that can be seen of a module and of the random streams, as comparable values."""

    def plain(value):
        if isinstance(value, torch.Tensor):
            return value.dtype, tuple(value.shape), value.tolist()
        if isinstance(value, dict):
            return type(value), {k: plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple | collections.deque):
            return type(value), [plain(v) for v in value]
        return value

    state = {
        name: {
            "attributes": {k: plain(v) for k, v in m.__dict__.items() if k not in ("_modules", "_parameters")},
            "parameters": {k: plain(v) for k, v in m._parameters.items()},
        }
        for name, m in module.named_modules()
    }
    streams = plain(torch.get_rng_state()), pickle.dumps(np.random.get_state()), random.getstate()
    return state, streams


BATCH = samples(6, 2, 6, 6)


def test_everything_is_put_back():
    module = Messy().train()
    module.training_step([t.clone() for t in BATCH], 0)  # so that metrics and buffers hold something
    module.net.train()
    before = remember(module)
    metrics = module.collection._modules
    buffer, outputs, metric_list = module.calls, module.outputs, metrics["cat"].value
    with preserve_state(module):
        training_loss(module, BATCH).backward()
        assert module.counter == 2 and module.outputs == [1.0, 2.0, 2.0] and not module.net.training
    after = remember(module)
    for name, one in before[0].items():
        for kind, values in one.items():
            assert after[0][name][kind] == values, name
    assert after == before
    assert module.calls is buffer and module.outputs is outputs and metrics["cat"].value is metric_list
    assert module.logged == [("loss", 1.0), {"loss": 1.0}]


@pytest.mark.parametrize(
    ("make", "draw"),
    [
        (lambda: np.random.RandomState(0), lambda stream: stream.rand(3)),
        (lambda: np.random.default_rng(0), lambda stream: stream.random(3)),
        (lambda: np.random.MT19937(0), lambda stream: stream.random_raw(3)),
        (lambda: random.Random(0), lambda stream: stream.random()),
        (lambda: bytearray(b"abc"), lambda seen: seen.append(1) or bytes(seen)),
        (lambda: array("d", [1.0]), lambda seen: seen.append(2.0) or seen.tolist()),
    ],
    ids=["RandomState", "Generator", "BitGenerator", "Random", "bytearray", "array"],
)
def test_what_a_module_counts_and_draws_with_is_put_back(make, draw):
    module = nn.Linear(2, 2)
    module.own = own = make()
    with preserve_state(module):
        first = draw(own)
    with preserve_state(module):
        assert np.array_equal(first, draw(own)) and module.own is own


def test_a_module_that_was_never_called_stays_that_way():
    module = Messy()
    before = remember(module)
    keys = list(module.state_dict())
    with preserve_state(module, seed=3):
        training_loss(module, BATCH)
    assert remember(module) == before
    assert not hasattr(module, "new") and not hasattr(module, "late") and module.mask is None
    assert list(module.state_dict()) == keys and not module.logged


def test_metrics_go_on_as_if_nothing_had_happened():
    disturbed, plain = Messy(), Messy()
    for step in range(3):
        batch = samples(6, 2, 6, 6, seed=step)
        for module in (disturbed, plain):
            torch.manual_seed(step)
            module.train()
            module.training_step([t.clone() for t in batch], 0)
        with preserve_state(disturbed):
            training_loss(disturbed, batch)
    assert torch.equal(disturbed.accuracy.compute(), plain.accuracy.compute())
    one, other = disturbed.collection.compute(), plain.collection.compute()
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_it_is_put_back_after_an_exception_too():
    module = Messy()
    before = remember(module)
    with pytest.raises(ZeroDivisionError), preserve_state(module):
        training_loss(module, BATCH)
        raise ZeroDivisionError
    assert remember(module) == before


def test_log_is_muted_inside_and_back_outside():
    module = Messy()
    with preserve_state(module):
        module.log("x", 1)
        module.log_dict({"x": 1}, prog_bar=True)
    assert not module.logged
    module.log("x", 1)
    assert module.logged == [("x", 1)] and "log" not in module.__dict__


def test_a_seed_draws_the_same_masks_every_time():
    module = Messy()
    torch.manual_seed(0)
    losses = []
    for seed in (5, 5, 6):
        with preserve_state(module, seed):
            losses.append(float(training_loss(module, BATCH).detach()))
    assert losses[0] == losses[1] != losses[2]


def test_without_a_seed_the_streams_go_on_inside():
    module = nn.Linear(1, 1)
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    with preserve_state(module):
        assert torch.equal(torch.rand(2), expected)
    assert torch.equal(torch.rand(2), expected)


def test_gradients_and_weights_are_not_looked_at():
    module = mlp(4, 5, 3)
    weight, grad = module[0].weight, torch.ones_like(module[0].weight)
    weight.grad, version = grad, weight._version
    with preserve_state(module):
        pass
    assert module[0].weight is weight and weight.grad is grad and weight._version == version


def test_an_untouched_buffer_is_not_written_to():
    module = nn.BatchNorm1d(3)
    version = module.running_mean._version
    with preserve_state(module):
        pass
    assert module.running_mean._version == version


def test_a_container_that_refuses_changes_is_left_alone():
    class Frozen(dict):
        def _refuse(self, *_):
            raise RuntimeError("frozen")

        clear = update = __setitem__ = __delitem__ = _refuse

    module = nn.Linear(1, 1)
    module.config = Frozen(a=1, b=[2])
    with preserve_state(module):
        module.config["b"].append(3)
    assert module.config == {"a": 1, "b": [2]}


def test_references_to_large_data_are_not_copied():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.data = [torch.ones(3) for _ in range(4)]

    module = Holder()
    items = list(module.data)
    with preserve_state(module):
        module.data.pop()
    assert all(a is b for a, b in zip(module.data, items, strict=True))


class Stepper(nn.Module):
    """training_step is whatever function is given."""

    def __init__(self, step):
        super().__init__()
        self.net = nn.Linear(2, 1)
        self.training_step = step


X = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda batch: None, "training_step must return a scalar|training_step returned None"),
        (lambda batch: 1.0, "training_step .*float"),
        (lambda batch: {"log": 1}, r"training_step returned a dict without 'loss' \(it has \['log'\]\)"),
        (lambda batch: batch, r"training_step must return a scalar loss, got shape \(3, 2\); reduce it first"),
        (lambda batch: batch.sum(), "the loss that training_step returned does not depend on any parameter"),
        (lambda dataloader_iter: None, "reads from dataloader_iter; pass loss_fn=lambda module, batch"),
    ],
)
def test_losses_that_cannot_be_used(step, message):
    with pytest.raises(ValueError, match=message):
        training_loss(Stepper(step), X)


def test_no_training_step():
    with pytest.raises(ValueError, match="Linear has no training_step; pass loss_fn=lambda module, batch"):
        training_loss(nn.Linear(2, 1), X)


def test_loss_fn_is_preferred_and_named_in_errors():
    module = Stepper(lambda batch: None)
    assert training_loss(module, X, lambda m, batch: m.net(batch).sum()).requires_grad
    with pytest.raises(ValueError, match="loss_fn must return a scalar loss, got shape"):
        training_loss(module, X, lambda m, batch: m.net(batch))


@pytest.mark.parametrize("index", [False, True, "star"])
@pytest.mark.parametrize("kind", ["tensor", "dict", "one element"])
def test_forms_of_training_step(index, kind):
    module = Stepper(None)

    def loss(batch):
        value = module.net(batch).sum()
        return {"tensor": value, "dict": {"loss": value, "other": 1}, "one element": value.reshape(1)}[kind]

    def indexed(batch, batch_idx):
        assert batch_idx == 0
        return loss(batch)

    module.training_step = {False: loss, True: indexed, "star": lambda *a: indexed(*a)}[index]
    found = training_loss(module, X)
    assert found.shape == () and found.item() == module.net(X).sum().item()


def test_a_batch_that_training_step_changes_stays_as_it_was():
    def step(batch):
        batch["x"].zero_()
        batch["names"].clear()
        value = batch.pop("extra")
        return module.net(batch["x"]).sum() + value

    module = Stepper(step)
    batch = {"x": X.clone(), "names": ["a", "b"], "extra": 2.0}
    kept = copy.deepcopy(batch)
    training_loss(module, batch)
    assert batch.keys() == kept.keys() and torch.equal(batch["x"], kept["x"]) and batch["names"] == ["a", "b"]


def test_a_batch_that_cannot_be_copied_whole():
    batch = {"x": X.clone(), "open": (i for i in range(3))}

    def step(batch):
        batch["x"].zero_()
        return module.net(batch["x"]).sum()

    module = Stepper(step)
    training_loss(module, batch)
    assert batch["x"].all()


Point = collections.namedtuple("Point", "x y")


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.5, 1.0])
def test_take_samples(fraction):
    x, y = torch.arange(16).reshape(8, 2), torch.arange(8)
    count = max(2, round(8 * fraction))
    for batch in ([x, y], (x, y), {"x": x, "y": {"deep": [y]}}, Point(x, y), x):
        found = take_samples(batch, fraction, sizes=[8])
        part = found.batch
        assert found.samples == count and type(part) is type(batch) and found.is_cut == (count < 8)
        first = part if isinstance(part, torch.Tensor) else part["x"] if isinstance(part, dict) else part[0]
        assert torch.equal(first, x[:count]) and first.data_ptr() != x.data_ptr()
    part = take_samples({"x": x, "scale": torch.tensor(2.0), "name": "a", "n": 3}, fraction, sizes=[8]).batch
    assert part["scale"] == 2 and part["name"] == "a" and part["n"] == 3


def test_take_samples_cuts_lists_that_go_with_the_samples():
    batch = {"x": torch.ones(4, 2), "y": torch.ones(4), "names": ["a", "b", "c", "d"], "sizes": (7, 8)}
    found = take_samples(batch, 0.5)
    part = found.batch
    assert found.samples == 2 and part["x"].shape == (2, 2) and part["sizes"] == (7, 8)
    assert part["names"] == ["a", "b"]


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        ([torch.ones(8, 2), torch.ones(3)], None),
        ([torch.tensor(1.0)], None),
        ({"text": "no tensors"}, None),
        (torch.nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(2, 2)]), 2),
    ],
    ids=["sizes differ", "no dimension", "no tensor", "packed"],
)
def test_batches_whose_samples_cannot_be_told_apart_are_taken_whole(batch, samples):
    found = take_samples(batch, 0.25)
    assert found.samples == samples and type(found.batch) is type(batch) and found.reason and not found.is_cut
    if isinstance(batch, list):
        assert all(torch.equal(a, b) and a is not b for a, b in zip(found.batch, batch, strict=True))


def test_samples_carry_no_graph():
    x = torch.ones(4, requires_grad=True) * 2
    part = take_samples([x], 0.5, sizes=[4]).batch
    assert len(part[0]) == 2 and not part[0].requires_grad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copied = take_samples([x, torch.ones(3)], 0.5).batch
    assert torch.equal(copied[0], x)
