"""Several processes: what one of them meets must not keep the others waiting, and what they show is of all of them."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from torch import Tensor
from torch.nn.functional import cross_entropy

from dynamon.callbacks import DynamicsMonitor, GradientMonitor, NoiseAdaptiveLR, SharpnessMonitor, WeightMonitor
from dynamon.distributed.ranks import Ranks
from dynamon.monitoring import gradient_meter as gradients_module
from dynamon.monitoring import weight_meter as weights_module
from dynamon.monitoring.layer_set import LayerSet
from dynamon.quantities.trends import Trends
from tests.helpers import Classifier, mlp
from tests.processes import Breaks, ProcessFailedError, fit_in_processes, in_processes, loader, rank

# A collective without its partner waits for half an hour.
pytestmark = [pytest.mark.processes, pytest.mark.filterwarnings("ignore")]


class Learner(Classifier):
    """Says the loss of each batch on this process."""

    def __init__(self) -> None:
        super().__init__(mlp().double(), partial(torch.optim.AdamW, lr=1e-2))
        self.lr = 1e-2
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if torch.is_grad_enabled():
            self.losses.append(float(loss))
        return loss

    def train_dataloader(self) -> Any:
        return loader()


def assert_same_tables(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert set(one["tables"]) == set(other["tables"])
    for tag, table in one["tables"].items():
        if "overhead" not in tag:
            assert table["steps"] == other["tables"][tag]["steps"], tag
            assert torch.equal(table["values"].nan_to_num(), other["tables"][tag]["values"].nan_to_num()), tag


class AtEpoch(pl.Callback):
    """Does something at the start of the third epoch."""

    def __init__(self, action: Any) -> None:
        self.action, self.done = action, False

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 2 and not self.done:
            self.done = True
            self.action(trainer, pl_module)


def search(trainer: Any, module: Any) -> None:
    LearningRateFinder(num_training_steps=9, update_attr=False, early_stop_threshold=None).lr_find(trainer, module)


def monitors() -> list[Any]:
    return [
        GradientMonitor(every_n_steps=2, strict=True),
        WeightMonitor(every_n_steps=2, strict=True),
        SharpnessMonitor(every_n_steps=3, quantities=["hessian"], strict=True),
        NoiseAdaptiveLR(warmup=1),
    ]


def test_a_rate_search_in_mid_fit_of_two_processes_leaves_nothing(tmp_path: Path) -> None:
    settings = {"steps": -1, "max_epochs": 4, "data": loader(), "default_root_dir": tmp_path}
    searched = fit_in_processes(Learner, monitors(), others=[AtEpoch(search)], **settings)
    plain = fit_in_processes(Learner, monitors(), **settings)
    assert len(plain[0]["tables"]["gradient/norm"]["steps"]) == 12
    for ours, right in zip(searched, plain, strict=True):
        assert all(torch.equal(ours["weights"][key], right["weights"][key]) for key in right["weights"])
        assert ours["ratios"] == right["ratios"]
        assert_same_tables(ours, right)


BREAKS = {
    "before the step": (gradients_module.GradientSource, "read", 1),
    "after clipping": (gradients_module, "UsedGradients", 0),
    "at the end of the batch": (gradients_module, "_clipped_norm", 1),
    "of weights": (weights_module, "weight_readings", 0),
}


@pytest.mark.parametrize("name", BREAKS)
def test_the_loss_is_the_mean_over_processes_also_where_one_measurement_fails(name: str) -> None:
    broken = Breaks(*BREAKS[name][:2], begin=2, end=5, on=BREAKS[name][2])
    callbacks = [DynamicsMonitor(every_n_steps=1)]
    ranks = fit_in_processes(Learner, callbacks, others=[broken], data=loader(), steps=8, more=lambda m: m.losses)
    assert ranks[0]["failures"] == ranks[1]["failures"] == [3]
    loss = ranks[0]["tables"]["dynamon/loss"]
    expected = np.mean([found["more"] for found in ranks], 0)[loss["steps"]]
    assert {0, 1, 5, 6, 7} <= set(loss["steps"]) and len(set(expected)) == len(expected)
    np.testing.assert_allclose(loss["values"], expected, rtol=1e-12)
    assert_same_tables(*ranks)


class Counted:
    """How many reductions dynamon's losses took by themselves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.checks = 0, 0
        brought, count = Ranks.attached_sums, Ranks._count_failures

        def count_brought(ranks: Ranks) -> Any:
            self.count += ranks._sums is None
            return brought(ranks)

        def count_checks(*arguments: Any) -> Any:
            self.checks += 1
            return count(*arguments)

        monkeypatch.setattr(Ranks, "attached_sums", count_brought)
        monkeypatch.setattr(Ranks, "_count_failures", count_checks)

    def __call__(self, module: Any) -> list[int]:
        return [self.count, self.checks]


@pytest.mark.parametrize("monitor", [GradientMonitor, WeightMonitor, SharpnessMonitor])
def test_the_loss_takes_no_reduction_of_its_own(monkeypatch: pytest.MonkeyPatch, monitor: Any) -> None:
    counted = Counted(monkeypatch)
    ranks = fit_in_processes(Learner, [monitor(every_n_steps=2)], data=loader(), steps=6, more=counted)
    for found in ranks:
        assert found["tables"]["dynamon/loss"]["steps"] == [0, 2, 4]
        assert found["more"][0] == 0 and found["more"][1] > 3


class ReturnsNone(Learner):
    """Skips a batch on some of the processes, which Lightning refuses."""

    def __init__(self, on: tuple[int, ...]) -> None:
        super().__init__()
        self.on = on

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == 3 and rank() in self.on else super().training_step(batch, batch_idx)


@pytest.mark.parametrize("on", [(0, 1), (1,)])
def test_a_skipped_batch_ends_the_run_with_lightnings_word_for_it(on: tuple[int, ...]) -> None:
    with pytest.raises(ProcessFailedError, match="returning None in distributed training is not supported"):
        fit_in_processes(lambda: ReturnsNone(on), monitors(), data=loader(), steps=8)


class ByHand(Learner):
    """Manual optimisation that leaves out a step on all processes, and returns a loss on the first one only."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        if batch_idx == 4:
            return None
        loss = cross_entropy(self.network(batch[0]), batch[1])
        self.losses.append(float(loss))
        self.manual_backward(loss)
        optimizer.step()
        return loss.detach() if rank() == 0 else None


def test_a_loss_that_only_one_process_returns() -> None:
    watching = [GradientMonitor(every_n_steps=1, strict=True), WeightMonitor(every_n_steps=1, strict=True)]
    ranks = fit_in_processes(ByHand, watching, data=loader(), steps=8, more=lambda m: m.losses)
    loss = ranks[0]["tables"]["dynamon/loss"]
    np.testing.assert_allclose(loss["values"], ranks[0]["more"], rtol=1e-12)
    assert_same_tables(*ranks)


class Unfreezes(pl.Callback):
    """Gives the optimizer the first layer at the fifth step."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 4 and len(trainer.optimizers[0].param_groups) == 1:
            trainer.optimizers[0].add_param_group({"params": list(pl_module.network[0].parameters())})


class Head(Learner):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.network[3].parameters(), lr=1e-2)


def test_layers_that_join_on_all_processes() -> None:
    watching = [*monitors()[:2], NoiseAdaptiveLR(warmup=1)]
    ranks = fit_in_processes(Head, watching, others=[Unfreezes()], data=loader(), steps=10)
    assert ranks[0]["tables"]["gradient/norm"]["steps"] == [0, 2, 4, 6, 8]
    assert ranks[0]["ratios"] == ranks[1]["ratios"] and len(ranks[0]["ratios"][0]) == 4
    assert_same_tables(*ranks)


@pytest.mark.parametrize("on", [0, 1])
def test_a_monitor_that_cannot_begin_on_one_process_is_off_on_all(monkeypatch: Any, on: int) -> None:
    read = LayerSet._read

    def fails(self: LayerSet) -> None:
        if rank() == on:
            raise RuntimeError("no such layer")
        read(self)

    monkeypatch.setattr(LayerSet, "_read", fails)
    ranks = fit_in_processes(Learner, [DynamicsMonitor(every_n_steps=1)], data=loader(), steps=4)
    assert ranks[0]["tables"] == ranks[1]["tables"] == {}


@pytest.mark.parametrize("bounds", [(5,), (8,)])
def test_windows_that_are_unlike_on_one_process_only(bounds: tuple[int, ...]) -> None:
    """The last batch of an epoch has 8 samples: of 5 and 3, the first process sees no change, of 8 and 0 neither."""
    data = loader(16, 88, bounds=bounds) if bounds == (5,) else loader(16, 88)
    watching = [GradientMonitor(every_n_steps=1, strict=True), NoiseAdaptiveLR(warmup=1)]
    ranks = fit_in_processes(Learner, watching, data=data, steps=14)
    assert ranks[0]["ratios"] == ranks[1]["ratios"]
    assert_same_tables(*ranks)


def check_trends(size: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (size,))
    torch.manual_seed(0)
    shapes = [(13, 8), (3,), (40, 33), (1, 5)]
    places = [[Shard(0)], [Shard(0)], [Shard(1)], [Replicate()]]
    likes = [distribute_tensor(torch.zeros(shape), mesh, place) for shape, place in zip(shapes, places, strict=True)]
    ranks = Ranks(torch.device("cpu"))
    whole, parted = Trends([torch.zeros(shape) for shape in shapes]), Trends(likes, ranks)
    for step in range(7):
        now, before = [[torch.randn(shape) for shape in shapes] for _ in range(2)]
        alike = torch.tensor([step != 2, True, step not in (3, 4), step != 0])
        right = whole.cosines(whole.products(range(4), now, before), alike)
        parts = [
            [distribute_tensor(t, mesh, place).to_local() for t, place in zip(tensors, places, strict=True)]
            for tensors in (now, before)
        ]
        held = torch.tensor([1.0, 1.0, 1.0, float(size)])
        products = ranks.sum_or_nan(partial(parted.products, range(4), *parts), 8).view(2, 4) / held
        torch.testing.assert_close(parted.cosines(products, alike), right, rtol=1e-5, atol=1e-6)
        assert step < 5 or right.abs().min() > 0
        if step == 3:
            state = parted.state_dict(list("abcd"))
            for name, row in whole.state_dict(list("abcd")).items():
                torch.testing.assert_close(state[name], row, rtol=1e-5, atol=1e-6)
            parted = Trends(likes, ranks)
            parted.load_state_dict(state, list("abcd"))


def test_trends_of_parts_are_those_of_wholes() -> None:
    in_processes(lambda _: check_trends(2), 2, group=True)
    in_processes(lambda _: check_trends(3), 3, group=True)


def test_a_trend_is_kept_over_a_reading_that_has_nothing_to_compare() -> None:
    zero = [torch.zeros(4), torch.zeros(3)]
    trends = Trends(zero)
    first = [torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])]
    other = [torch.tensor([0.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])]
    assert trends.cosines(trends.products((0, 1), first, zero)).tolist() == [0, 0]
    unlike = trends.products((0, 1), other, zero)
    assert trends.cosines(unlike, torch.tensor([False])).tolist() == [0, 0]
    assert trends.cosines(trends.products((1,), other[1:], zero[1:])).tolist() == [1]  # the first has no gradient
    assert trends.cosines(trends.products((0, 1), first, zero)).tolist() == [1, 1]
