"""Two processes and four find what one process finds on all of their samples."""

import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import cross_entropy

from dynamon.callbacks import GradientMonitor, NoiseAdaptiveLR, SharpnessMonitor, WeightMonitor
from dynamon.monitoring.sharpness_monitor import QUANTITIES
from tests.helpers import Classifier, mlp
from tests.models import dense_hessian
from tests.processes import fit_in_processes, loader, regression, values

pytestmark = pytest.mark.processes

OWN_CLOCK = {"dynamon/overhead", "dynamon/steering_overhead"}
OTHER_SOURCE = re.compile("noise/(independent|scale|snr)")  # by processes where there are several
ITERATIVE = re.compile("sharpness/.*(_max|_min|ratio|ratio_next|block|share|overlap|critical|edge)")
NOT_A_VALUE = re.compile(".*_residual|sharpness/matvecs|sharpness/outliers")  # how a solve went


def classifier() -> Classifier:
    return Classifier(mlp().double())


def monitors(every: int = 3) -> list:
    sharpness = SharpnessMonitor(
        every_n_steps=every, quantities=QUANTITIES, probe_fraction=1.0, tol=1e-6, max_matvecs=200, strict=True
    )
    others = [kind(every_n_steps=every, histograms=True, strict=True) for kind in (GradientMonitor, WeightMonitor)]
    return [sharpness, *others]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_tag_is_that_of_one_process(ranks: int) -> None:
    (one,) = fit_in_processes(classifier, monitors(), 1, steps=16)
    several = fit_in_processes(classifier, monitors(), ranks, steps=16)
    compared = {tag for tag in one["tables"] if not OTHER_SOURCE.match(tag) and tag not in OWN_CLOCK}
    assert compared <= set(several[0]["tables"]) and len(compared) > 100
    assert {"sharpness/hessian_max_bracket", "spectrum/nuclear", "sharpness/batch"} <= compared
    for tag in compared:
        alone, together = one["tables"][tag], several[0]["tables"][tag]
        assert alone["steps"] == together["steps"], tag
        if not NOT_A_VALUE.fullmatch(tag):
            within = 1e-4 if ITERATIVE.fullmatch(tag) else 1e-6
            torch.testing.assert_close(
                together["values"], alone["values"], rtol=within, atol=1e-12, equal_nan=True, msg=lambda m, t=tag: t + m
            )
    for tag in set(several[0]["tables"]) - OWN_CLOCK:  # callbacks that watch a metric decide alike on all ranks
        assert all(
            torch.equal(values(rank, tag).nan_to_num(), values(several[0], tag).nan_to_num()) for rank in several
        )


def test_parts_of_different_sizes_count_by_their_samples() -> None:
    callback = SharpnessMonitor(every_n_steps=1, quantities=["hessian"], probe_fraction=1.0, tol=1e-7, strict=True)
    data = loader(bounds=(11,))
    ranks = fit_in_processes(classifier, [callback], data=data, steps=3, more=whole_hessian)
    for rank in ranks:
        assert float(values(rank, "sharpness/hessian_max")[-1]) == pytest.approx(rank["more"], rel=1e-8)
        assert values(rank, "sharpness/probe_samples").tolist() == [16.0] * 3


def whole_hessian(module: Classifier) -> float:
    x, y = regression()[:16]
    return float(torch.linalg.eigvalsh(dense_hessian(module.network, lambda f: cross_entropy(f(x), y)))[-1])


def noise_at_the_start(ranks: int, window: int, norm) -> dict[str, float]:
    """From the definition: local gradients against their mean, at the initial weights."""
    x, y = regression()[: 16 * window]
    gradients = []
    for rank in range(ranks):
        module = classifier()
        loss = [cross_entropy(module.network(part[rank::ranks]), of[rank::ranks]) for part, of in batches(x, y)]
        torch.stack(loss).mean().backward()
        gradients.append({name: p.grad for name, p in module.named_parameters()})
    found = {}
    for name in gradients[0]:
        mean = torch.stack([g[name] for g in gradients]).mean(0)
        squares = [2 / (ranks - 1) * float(norm(g[name] - mean)) ** 2 for g in gradients]
        found[name] = (sum(squares) / ranks) ** 0.5
    return found


def batches(x: torch.Tensor, y: torch.Tensor):
    return zip(x.split(16), y.split(16), strict=True)


SETTINGS = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 3},
    "static": {"options": {"static_graph": True}},
    "unused": {"options": {"find_unused_parameters": True}},
    "views": {"options": {"gradient_as_bucket_view": True}, "accumulate_grad_batches": 2},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_noise_between_processes_is_its_definition(name: str) -> None:
    settings = {**SETTINGS[name], "steps": 3}
    plain = fit_in_processes(classifier, [], data=loader(), **settings)
    seen = fit_in_processes(classifier, [GradientMonitor(every_n_steps=1, strict=True)], data=loader(), **settings)
    window = settings.get("accumulate_grad_batches", 1)
    truth = noise_at_the_start(2, window, lambda g: g.abs().sum())  # Adam: the dual norm is the sum of magnitudes
    for rank in seen:
        torch.testing.assert_close(
            values(rank, "noise/independent")[0], torch.tensor(list(truth.values())).double(), rtol=1e-6, atol=0
        )
        assert rank["failures"] == [0]
        assert all(torch.equal(rank["weights"][key], plain[0]["weights"][key]) for key in rank["weights"])


def test_noise_of_four_processes_and_what_follows_from_it() -> None:
    callback = GradientMonitor(every_n_steps=1, strict=True)
    ranks = fit_in_processes(classifier, [callback], 4, data=loader(), steps=4)
    truth = noise_at_the_start(4, 1, lambda g: g.abs().sum())
    torch.testing.assert_close(
        values(ranks[3], "noise/independent")[0], torch.tensor(list(truth.values())).double(), rtol=1e-6, atol=0
    )
    length, noise = values(ranks[0], "gradient/l2")[0] ** 2, noise_at_the_start(4, 1, torch.linalg.vector_norm)
    variance = torch.tensor(list(noise.values())).double() ** 2 / 2
    expected = (length - variance).clamp_min(0) / variance
    torch.testing.assert_close(values(ranks[0], "noise/snr")[0], expected, rtol=1e-5, atol=1e-7)
    if length.sum() > variance.sum():
        scale = float(variance.sum() / (length.sum() - variance.sum()))
        assert float(values(ranks[0], "noise/scale")[0]) == pytest.approx(scale, rel=1e-5)


@pytest.mark.parametrize("ranks,read_every", [(2, 1), (2, 3), (4, 1)])
def test_steering_by_the_noise_between_processes(ranks: int, read_every: int) -> None:
    steering = NoiseAdaptiveLR(warmup=1, group_by="all", source="independent", read_every=read_every)
    watching = GradientMonitor(every_n_steps=2, strict=True)
    found = fit_in_processes(classifier, [steering, watching], ranks, data=loader(), steps=10)
    assert min(found[0]["ratios"][0].values()) < 1
    for rank in found[1:]:
        assert rank["ratios"] == found[0]["ratios"]
        assert all(torch.equal(rank["weights"][key], found[0]["weights"][key]) for key in rank["weights"])


def test_noise_between_processes_is_what_one_process_finds_by_halves() -> None:
    """Two ranks of eight samples are two halves of an accumulation window, at the first step."""
    (halves,) = fit_in_processes(
        classifier, [GradientMonitor(1, strict=True)], 1,
        data=loader(8), accumulate_grad_batches=2, steps=1,
    )  # fmt: skip
    ranks = fit_in_processes(classifier, [GradientMonitor(1, strict=True)], data=loader(16, bounds=(8,)), steps=1)
    torch.testing.assert_close(
        values(ranks[0], "noise/independent"), values(halves, "noise/independent"), rtol=1e-6, atol=0
    )


def still() -> Classifier:
    return Classifier(mlp().double(), lambda p: torch.optim.SGD(p, lr=0.0))


def test_uneven_batches_and_an_uneven_last_one() -> None:
    """At weights that stay, so that only what is measured differs: DDP itself does not weigh by samples."""
    quantities = [q for q in QUANTITIES if q not in ("directional", "critical", "stability_ratio", "subspace")]
    settings = {"steps": 8, "max_epochs": -1}  # the sixth batch is uneven, and the sixth measurement has a bracket
    found = []
    for ranks, bounds in ((1, ()), (2, (3,))):
        callback = SharpnessMonitor(
            1, quantities=quantities, probe_fraction=1.0, probe_batches=2, tol=1e-6, max_matvecs=200, strict=True
        )
        data = loader(count=88, bounds=bounds)
        found.append(fit_in_processes(still, [callback], ranks, data=data, **settings)[0]["tables"])
    one, two = found
    for tag in set(one) - OWN_CLOCK - {"dynamon/loss"}:
        assert one[tag]["steps"] == two[tag]["steps"], tag
        if not NOT_A_VALUE.fullmatch(tag):
            torch.testing.assert_close(two[tag]["values"], one[tag]["values"], rtol=1e-5, atol=1e-12, equal_nan=True)
    assert {"sharpness/batch", "sharpness/ggn_max", "sharpness/trace", "sharpness/hessian_max_bracket"} <= set(one)


def test_a_resumed_run_measures_what_the_whole_one_did(tmp_path: Path) -> None:
    def callbacks() -> list:
        return [*monitors(every=2), NoiseAdaptiveLR(warmup=1, group_by="all", source="independent")]

    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    whole = fit_in_processes(classifier, callbacks(), data=loader(), others=[save], enable_checkpointing=True, steps=12)
    path = str(tmp_path / "step=6.ckpt")
    rest = fit_in_processes(classifier, callbacks(), data=loader(), steps=12, ckpt_path=path)
    for rank, own in zip(rest, whole, strict=True):
        assert all(torch.equal(rank["weights"][key], own["weights"][key]) for key in own["weights"])
        assert rank["ratios"] == own["ratios"]
        for tag in set(rank["tables"]) - OWN_CLOCK:
            table, known = rank["tables"][tag], own["tables"][tag]
            places = [known["steps"].index(step) for step in table["steps"]]
            assert torch.equal(table["values"].nan_to_num(), known["values"][places].nan_to_num()), tag
        assert len(rank["tables"]["sharpness/hessian_max"]["steps"]) == 3
