"""FSDP2: steering on parts of the parameters is steering on the whole, and a resumed run repeats the run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.fsdp import fully_shard

from dynamon.callbacks import GradientMonitor, LayerwiseLR, NoiseAdaptiveLR, RateAdvisor, WeightMonitor
from dynamon.optim import Lanton
from dynamon.rates import BalancedRates, FixedRates, SpectralTailRates
from tests.processes import Sharded, fit_in_processes, loader, values

pytestmark = [pytest.mark.processes, pytest.mark.filterwarnings("ignore")]


def network() -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Linear(8, 13), nn.Tanh(), nn.Linear(13, 7), nn.Tanh(), nn.Linear(7, 3)]
    return nn.Sequential(*layers).double()


def wide() -> nn.Module:
    """Matrices with spectra that have tails, of different exponents."""
    torch.manual_seed(1)
    layers = [nn.Linear(8, 48), nn.Linear(48, 56), nn.Linear(56, 40), nn.Linear(40, 3)]
    for power, layer in enumerate(layers[1:3], 1):
        u, _, v = torch.linalg.svd(torch.randn(layer.weight.shape), full_matrices=False)
        layer.weight.data = u @ torch.diag(torch.arange(1.0, u.shape[1] + 1) ** (-0.4 * power)) @ v
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh()))).double()


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, foreach=True)


def orthogonal(parameters: Any) -> torch.optim.Optimizer:
    return Lanton(parameters, lr=0.02, noise_adaptive=False)


def by_noise(**options: Any) -> NoiseAdaptiveLR:
    return NoiseAdaptiveLR(**{"warmup": 1, "group_by": "all", **options})


def make(optimizer: Any = adamw, of: Any = network) -> Any:
    return lambda: Sharded(of(), optimizer)


def by_tails() -> LayerwiseLR:
    return LayerwiseLR(SpectralTailRates(0.5, 1.5, refresh=3, ramp=1))


class Balanced(BalancedRates):
    """Moves after every reading, certain or not, so that short runs show it."""

    def learn(self, reading):
        self._log_ratios = self._log_ratios + 0.1 * np.tanh(100 * self._by_group(reading.names, reading.before))
        self._aim(np.exp(self._log_ratios))


def by_balance(rule: BalancedRates | None = None) -> LayerwiseLR:
    return LayerwiseLR(rule or Balanced(every=3))


def by_pilot() -> LayerwiseLR:
    return by_balance(BalancedRates(["network.0.*", "network.2.*", "network.4.*"], pilot=12))


def advisor() -> RateAdvisor:
    return RateAdvisor(pilot=12, group_by="role", strict=True)


def plain(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


CASES = {
    "noise": (adamw, by_noise, {}),
    "noise of windows, at once, clipped": (
        adamw, lambda: by_noise(source="independent", lag=0), {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    ),
    "noise in nuclear norms": (orthogonal, by_noise, {}),
    "tails of spectra": (adamw, by_tails, {}),
    "balance": (adamw, by_balance, {"accumulate_grad_batches": 2}),
    "balance after a pilot": (plain, by_pilot, {"data": loader(96), "steps": 16}),  # without noise, it is certain
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_weights_and_ratios_are_those_of_one_process(name: str) -> None:
    optimizer, steering, settings = CASES[name]
    settings = {"data": loader(), "steps": 8, **settings}
    module = make(optimizer, wide if "tails" in name else network)
    watching = [GradientMonitor(every_n_steps=3, strict=True)]
    (one,) = fit_in_processes(module, [steering(), *watching], 1, **settings)
    ranks = fit_in_processes(module, [steering(), *watching], 2, **settings)
    (ratios,) = one["ratios"]
    assert min(ratios.values()) < 0.99
    for rank in ranks:
        assert rank["ratios"] == ranks[0]["ratios"]  # to the bit, or weights would part
        assert rank["ratios"][0] == pytest.approx(ratios, rel=1e-6)
        for key, weight in one["weights"].items():
            assert torch.equal(rank["weights"][key], ranks[0]["weights"][key])
            torch.testing.assert_close(rank["weights"][key], weight, rtol=1e-7, atol=1e-9)
    noise = [found["tables"]["gradient/dual"]["values"] for found in (one, ranks[0])]
    torch.testing.assert_close(noise[1], noise[0], rtol=1e-6, atol=0)


def test_the_advisor_reads_parts_as_it_reads_the_whole() -> None:
    arguments = {"data": loader(), "steps": 14}
    (one,), ranks = (fit_in_processes(make(), [advisor()], count, **arguments) for count in (1, 2))
    plain = fit_in_processes(make(), [], 2, **arguments)
    for tag in ("advice/progress", "advice/coupling"):
        wanted = values(one, tag)
        assert len(wanted) == 12 and bool((wanted != 0).all())
        for rank in ranks:
            torch.testing.assert_close(values(rank, tag), wanted, rtol=1e-5, atol=1e-7 * float(wanted.abs().max()))
    for rank, own in zip(ranks, plain, strict=True):
        assert all(torch.equal(rank["weights"][key], own["weights"][key]) for key in own["weights"])
    assert any(sentence.startswith("RateAdvisor") for sentence in ranks[0]["said"])


def test_ratios_of_one_leave_training_as_it_was() -> None:
    settings = {"data": loader(), "steps": 8, "gradient_clip_val": 0.1}
    plain = fit_in_processes(make(), [], 2, **settings)
    for callback in (LayerwiseLR(FixedRates({"*": 1.0})), by_noise(apply=False)):
        seen = fit_in_processes(make(), [callback], 2, **settings)
        for one, other in zip(plain, seen, strict=True):
            assert all(torch.equal(one["weights"][key], other["weights"][key]) for key in one["weights"])


def watched() -> list[Any]:
    return [
        GradientMonitor(every_n_steps=2, strict=True),
        WeightMonitor(every_n_steps=2, strict=True),
    ]


RESUMED = {
    "whole, steered": (False, lambda: [*watched(), by_noise()]),
    "whole, readings of steps pending": (False, lambda: [*watched(), by_balance(), advisor()]),
    "in parts, readings of steps pending": (True, lambda: [*watched(), by_balance(), advisor()]),
    "in parts, watched": (True, watched),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path: Path, name: str) -> None:
    """Sanity checks before training leave whole weights in the root of the model."""
    parted, callbacks = RESUMED[name]
    settings = {"data": loader(), "options": {"save_distributed_checkpoint": parted}, "steps": 12}
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    first = fit_in_processes(make(), callbacks(), 2, others=[save], enable_checkpointing=True, **settings)
    path = tmp_path / "step=6.ckpt"
    assert path.is_dir() == parted
    rest = fit_in_processes(make(), callbacks(), 2, ckpt_path=str(path), **settings)
    for rank, own in zip(rest, first, strict=True):
        assert all(torch.equal(rank["weights"][key], own["weights"][key]) for key in own["weights"])
        assert rank["ratios"] == own["ratios"]
        for tag, table in rank["tables"].items():
            if "overhead" not in tag:
                known = own["tables"][tag]
                places = [known["steps"].index(step) for step in table["steps"]]
                assert torch.equal(table["values"].nan_to_num(), known["values"][places].nan_to_num()), tag
        assert rank["tables"]["update/cosine"]["steps"] == [6, 8, 10]


def at_once(whole: nn.Module, mesh: Any) -> None:
    fully_shard(whole, mesh=mesh["data_parallel"])


class Validated(Sharded):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.network(batch[0])


def test_what_an_evaluation_leaves_behind() -> None:
    """The root of an FSDP2 model keeps whole weights after an evaluation, the sanity check before training too."""
    callbacks = [*watched(), by_noise()]
    found = fit_in_processes(
        lambda: Validated(network(), adamw, shard=at_once), callbacks, 2,
        data=loader(), validation=loader(), steps=8, val_check_interval=3,
    )  # fmt: skip
    (one,) = fit_in_processes(make(), [*watched(), by_noise()], 1, data=loader(), steps=8)
    assert found[0]["failures"] == [0, 0, 0]
    for key, weight in one["weights"].items():
        torch.testing.assert_close(found[0]["weights"][key], weight, rtol=1e-7, atol=1e-9)
