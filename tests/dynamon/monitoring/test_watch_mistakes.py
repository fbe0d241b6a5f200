"""What users of a watch do by mistake is refused, said, or cleaned up."""

import gc
import logging
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import dynamon
from dynamon.monitoring import DynamicsMonitor, GradientMonitor, SharpnessMonitor


def loss_fn(model: Any, batch: Any) -> torch.Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, torch.optim.SGD(model.parameters(), lr=0.05)


def batch_of(index: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(index)
    return [torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)]


def train(watch: Any, model: nn.Module, optimizer: Any, steps: int = 4, scaler: Any = None) -> None:
    for index in range(steps):
        with watch.batch(batch_of(index)):
            loss = loss_fn(model, batch_of(index))
            if scaler is None:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()


def messages(caplog: Any) -> str:
    return "\n".join(record.message for record in caplog.records)


# A loss function of one's own is checked like training_step


class Own:
    """A loss with random numbers of its own, a layer with a buffer of its own, and an iterator."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.norm = nn.BatchNorm1d(3)
        self.stream = iter(torch.utils.data.DataLoader(torch.arange(100.0), batch_size=1))
        self.calls = 0

    def noisy(self, model: Any, batch: Any) -> torch.Tensor:
        noise = torch.randn(16, 6, generator=self.generator)
        return loss_fn(model, [batch[0] + 0.1 * noise, batch[1]])

    def normed(self, model: Any, batch: Any) -> torch.Tensor:
        return cross_entropy(self.norm(model(batch[0])), batch[1])

    def __call__(self, model: Any, batch: Any) -> torch.Tensor:
        next(self.stream)
        return loss_fn(model, batch)

    def counted(self, model: Any, batch: Any) -> torch.Tensor:
        self.calls += 1
        return loss_fn(model, batch)


def weighted(own: Own, model: Any, batch: Any) -> torch.Tensor:
    return own.noisy(model, batch)


def closed_over() -> Any:
    norm, calls = nn.BatchNorm1d(3), []

    def loss(model: Any, batch: Any) -> torch.Tensor:
        calls.append(1)
        return cross_entropy(norm(model(batch[0])), batch[1])

    return loss


EFFECTS = {
    "its own generator": (lambda: Own().noisy, "generator"),
    "a buffer of its own": (lambda: Own().normed, "norm"),
    "an iterator": (Own, "stream"),
    "of what it binds": (lambda: partial(weighted, Own()), "generator"),
    "a layer it closes over": (closed_over, "norm"),
}


@pytest.mark.parametrize("name", EFFECTS)
@pytest.mark.parametrize("whose", ["watch", "monitor"])
def test_a_loss_function_with_effects_switches_sharpness_off(name, whose):
    own, found = EFFECTS[name][0](), EFFECTS[name][1]
    model, optimizer = make()
    mine, theirs = (own, None) if whose == "monitor" else (None, own)
    monitor = SharpnessMonitor(1, quantities=["hessian"], loss_fn=mine)
    watch = dynamon.Watch(model, optimizer, loss_fn=theirs or loss_fn, monitors=monitor)
    with pytest.warns(UserWarning, match="sharpness is off: loss_fn has effects outside the module") as caught:
        train(watch, model, optimizer)
    watch.close()
    (said,) = [str(one.message) for one in caught if "sharpness is off" in str(one.message)]
    assert found in said or "with the same random numbers its loss was" in said
    assert "let it compute the loss and nothing else" in said
    assert "sharpness/hessian_max" not in monitor.history


def test_a_loss_function_may_count_its_calls():
    own = Own()
    model, optimizer = make()
    monitor = SharpnessMonitor(1, quantities=["hessian"], strict=True)
    watch = dynamon.Watch(model, optimizer, loss_fn=own.counted, monitors=monitor)
    train(watch, model, optimizer)
    watch.close()
    assert own.calls > 4 and len(monitor.history["sharpness/hessian_max"].steps) == 4


@pytest.mark.parametrize("every", [1, None])
def test_a_loss_function_without_a_loss_is_named_at_the_end(every, caplog):
    model, optimizer = make()
    watch = dynamon.Watch(model, optimizer, lambda *_: None, monitors=DynamicsMonitor(every_n_steps=every))
    with caplog.at_level(logging.INFO, "dynamon"):
        train(watch, model, optimizer, steps=5)
        watch.close()
    assert "no sharpness reading in this run: loss_fn must return a scalar tensor as loss, got NoneType." in messages(
        caplog
    )


# Scalers, dropped watches, shared monitors


@pytest.mark.parametrize(("enabled", "given", "says"), [(True, False, 1), (True, True, 0), (False, False, 0)])
def test_a_scaler_that_was_not_named_is_noticed(enabled, given, says, recwarn):
    model, optimizer = make()
    scaler = torch.amp.GradScaler("cpu", enabled=enabled)
    watch = dynamon.Watch(model, optimizer, scaler=scaler if given else None, monitors=GradientMonitor(1))
    train(watch, model, optimizer, scaler=scaler)
    watch.close()
    assert len([one for one in recwarn if "Pass scaler=scaler" in str(one.message)]) == says


def hooks(optimizer: torch.optim.Optimizer) -> int:
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


def test_a_dropped_watch_leaves_no_hook_behind(tmp_path):
    model, optimizer = make()
    before = hooks(optimizer)
    watch = dynamon.Watch(model, optimizer, loss_fn=loss_fn, logdir=tmp_path, monitors=DynamicsMonitor(every_n_steps=1))
    train(watch, model, optimizer)
    assert hooks(optimizer) > before
    gone = weakref.ref(watch)
    del watch
    gc.collect()
    assert gone() is None and hooks(optimizer) == before
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_monitor_serves_one_watch_at_a_time():
    monitor, (model, optimizer) = GradientMonitor(1), make()
    first = dynamon.Watch(model, optimizer, monitors=monitor)
    with pytest.raises(ValueError, match="a GradientMonitor that another Watch uses"):
        dynamon.Watch(*make(), monitors=[monitor])
    first.close()
    second = dynamon.Watch(model, optimizer, monitors=monitor)
    del second
    gc.collect()
    dynamon.Watch(model, optimizer, monitors=monitor).close()


# Earlier names


def test_earlier_names_are_named(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    from dynamon.curvature import spectral_density, trace
    from dynamon.runs import read_run, read_run_data

    with pytest.raises(TypeError, match="'samples' any more: it is 'num_vectors'"):
        trace(torch.eye(3), samples=2)
    with pytest.raises(TypeError, match="'probes' any more: it is 'num_vectors'"):
        spectral_density(torch.eye(3), probes=2)
    with pytest.raises(TypeError, match="unexpected keyword"):
        trace(torch.eye(3), vectors=2)
    with SummaryWriter(tmp_path) as writer:
        writer.add_scalar("sharpness/matvecs", 3.0, 0)
    for run in (read_run(tmp_path), read_run_data(tmp_path).scalars):
        assert run["sharpness/products"] is run["sharpness/matvecs"]
        with pytest.raises(KeyError, match="sharpness/other"):
            run["sharpness/other"]
