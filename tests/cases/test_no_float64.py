"""Apple GPUs and other devices without float64 and eigenvalues: every reading is there, to the accuracy of float32."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from dynamon import measure
from dynamon.callbacks import DynamicsMonitor, LayerwiseLR, NoiseAdaptiveLR, SharpnessMonitor, WeightMonitor
from dynamon.callbacks.dynamics import PRESETS
from dynamon.callbacks.sharpness import QUANTITIES
from dynamon.callbacks.steps import StepMeter
from dynamon.curvature import (
    GGNOperator,
    HessianOperator,
    batch_sharpness,
    blockwise_sharpness,
    directional_sharpness,
    eigenspace_overlap,
    eigenspace_share,
    spectral_density,
    top_eigenvalues,
    trace,
)
from dynamon.kernels import nuclear_norm
from dynamon.norms import get_norm
from dynamon.optim import Lanton
from dynamon.probe import undisturbed
from dynamon.ranks import Ranks
from dynamon.rates import FixedRates, SpectralTailRates
from tests.apple import DEVICE, STREAM, Strategy, apple
from tests.helpers import Classifier, batches, fit, mlp, same_weights

TOLERANCE = 5e-3
SOLVED = "_share", "_overlap"  # of eigenvectors that are known to the tolerance of the solver
UNLIKE = ("dynamon/", "spectrum/tail", "sharpness/products")  # time, and what jumps by a whole candidate or burst


def small() -> nn.Module:
    """Two layers."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3))


def with_dropout() -> nn.Module:
    """Two layers with dropout between."""
    return nn.Sequential(small(), nn.Dropout(0.2))


def small_cnn() -> nn.Module:
    """A convolution with BatchNorm, on ``[n, 2, 8, 8]``."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(2, 3, 3, stride=2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 3))


class Located(Classifier):
    """Remembers where it was trained: afterwards Lightning takes it back."""

    def on_train_end(self) -> None:
        self.trained_on = next(self.parameters()).device


def run(make: Callable[[], Any], network: Callable[[], nn.Module], there: bool, optimizer: Any = None) -> Any:
    """Three steps with a callback, there or on the CPU: the module and the callback."""
    module, callback = Located(network(), optimizer), make()
    data = batches(features=(2, 8, 8) if network is small_cnn else (8,))
    fit(module, [callback], data, steps=3, **({"strategy": Strategy()} if there else {}))
    return module, callback


def assert_alike(found: Any, wanted: Any) -> None:
    """Both callbacks have the same readings, and some."""
    assert set(found.history) == set(wanted.history)
    assert len(set(wanted.history)) > 2
    for tag in wanted.history:
        one, other = found.history[tag], wanted.history[tag]
        np.testing.assert_array_equal(one.steps, other.steps, tag)
        if not tag.startswith(UNLIKE):
            tolerance = 10 * TOLERANCE if tag.endswith(SOLVED) else TOLERANCE
            np.testing.assert_allclose(one.values, other.values, tolerance, 1e-5, err_msg=tag)


CALLBACKS = {
    "steering": (lambda: NoiseAdaptiveLR(), mlp, None),
    "tails": (lambda: LayerwiseLR(SpectralTailRates(refresh=1, ramp=0)), lambda: nn.Sequential(nn.Linear(8, 64)), None),
    "full": (lambda: DynamicsMonitor("full", every_n_steps=1, strict=True), small, None),
    "full, convolutions": (lambda: DynamicsMonitor("full", every_n_steps=3, strict=True), small_cnn, None),
    "sharpness": (lambda: SharpnessMonitor(every_n_steps=3, quantities=QUANTITIES, strict=True), small, None),
    "weights": (
        lambda: WeightMonitor(every_n_steps=1, histograms=True, convolutions=True, strict=True),
        small_cnn,
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    ),
    "Lanton": (
        lambda: DynamicsMonitor("full", every_n_steps=3, strict=True),
        small,
        lambda p: Lanton(list(p), lr=1e-2),
    ),
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_run_on_a_device_without_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, network, optimizer = CALLBACKS[name]
    _, wanted = run(make, network, False, optimizer)
    with apple(monkeypatch):
        module, found = run(make, network, True, optimizer)
        assert module.trained_on == DEVICE
        assert_alike(found, wanted)


NEUTRAL = {
    **{preset: lambda preset=preset: [DynamicsMonitor(preset, every_n_steps=1, strict=True)] for preset in PRESETS},
    "sharpness": lambda: [SharpnessMonitor(every_n_steps=2, quantities=QUANTITIES, strict=True)],
    "weights": lambda: [WeightMonitor(every_n_steps=1, histograms=True, convolutions=True, strict=True)],
    "steering by ones": lambda: [LayerwiseLR(FixedRates({"*": 1.0}))],
    "steering, dry": lambda: [NoiseAdaptiveLR(warmup=1, apply=False)],
}


def trained(callbacks: Sequence[Any], **arguments: Any) -> tuple[Classifier, Tensor, Tensor]:
    """A module after four steps there, and both random streams."""
    module = Classifier(with_dropout())
    fit(module, list(callbacks), steps=4, **{"strategy": Strategy(), **arguments})
    return module.cpu(), torch.get_rng_state(), STREAM.get_state()


@pytest.mark.parametrize("name", NEUTRAL)
def test_callbacks_leave_training_there_as_it_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with apple(monkeypatch):
        (plain, *streams), (monitored, *after) = trained([]), trained(NEUTRAL[name]())
        assert same_weights(plain, monitored)
        assert all(map(torch.equal, streams, after))
        torch.manual_seed(3)
        assert not torch.equal(STREAM.get_state(), streams[1])  # dropout draws from it


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("lag", [0, 1])
def test_a_run_that_is_taken_up_there_repeats_the_one_that_never_stopped(
    lag: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A probe's samples, tracked vectors and blocks, updates and gradients come back from the host."""
    quantities = ["hessian", "blocks", "subspace"]

    def callbacks() -> list[Any]:
        monitor = DynamicsMonitor(every_n_steps=2, quantities=quantities, strict=True)
        return [monitor, NoiseAdaptiveLR(warmup=1, lag=lag)]

    data, save = batches(32), ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    with apple(monkeypatch):
        whole, kept = Classifier(small()), callbacks()
        shared = {"steps": 8, "max_epochs": -1}
        fit(whole, [*kept, save], data, strategy=Strategy(), enable_checkpointing=True, **shared)
        second, again = Classifier(small()), callbacks()
        fit(second, again, data, strategy=Strategy(), ckpt_path=tmp_path / "step=4.ckpt", **shared)
        assert same_weights(whole.cpu(), second.cpu())
    for tag in ("sharpness/hessian_max", "sharpness/block", "update/operator", "gradient/dual"):
        one, other = kept[0].history[tag], again[0].history[tag]
        np.testing.assert_allclose(one.values[one.steps >= 4], other.values, 1e-5, err_msg=tag)


def test_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = next(iter(batches(features=(2, 8, 8))))

    def loss_fn(module: nn.Module, given: Any) -> Tensor:
        return cross_entropy(module(given[0]), given[1])

    wanted = measure(small_cnn(), batch, loss_fn=loss_fn)
    with apple(monkeypatch):
        found = measure(small_cnn().to(DEVICE), [part.to(DEVICE) for part in batch], loss_fn=loss_fn)
    assert set(found) == set(wanted)
    for tag, value in wanted.items():
        if isinstance(value, dict):
            assert set(found[tag]) == set(value), tag
        if not tag.startswith(UNLIKE):
            one, other = (list(v.values()) if isinstance(v, dict) else v for v in (found[tag], value))
            np.testing.assert_allclose(one, other, TOLERANCE, 1e-5, err_msg=tag)


def curvature(device: Any) -> dict[str, float]:
    """What is computed with operators, on a small network in train mode."""
    network = mlp().to(device)
    x, y = (part.to(device) for part in next(iter(batches())))
    params = list(network.parameters())
    hessian = HessianOperator(lambda: cross_entropy(network(x), y), params)
    ggn = GGNOperator(lambda: network(x), lambda z: cross_entropy(z, y), params)
    pairs = {name: top_eigenvalues(hessian, k=2, method=name, tol=1e-4) for name in ("lanczos", "power")}
    pairs["gram"] = top_eigenvalues(ggn, method="gram", tol=1e-4)
    density = spectral_density(hessian, steps=10, probes=2)
    scipy = hessian.to_scipy() @ np.ones(hessian.shape[0])
    return {
        **{f"{name} {i}": float(value) for name, found in pairs.items() for i, value in enumerate(found.values)},
        "upper": float(pairs["gram"].upper or math.nan),
        "trace": trace(hessian, samples=4).value,
        "density": float((density.weights * density.nodes).sum()),
        "directional": directional_sharpness(hessian, hessian.gradient).sharpness,
        "batch": batch_sharpness([hessian]),
        "share": eigenspace_share(pairs["lanczos"].vectors, hessian.gradient),
        "overlap": eigenspace_overlap(pairs["lanczos"].vectors, pairs["power"].vectors),
        "scipy": float(np.linalg.norm(scipy)),
    }


def test_curvature(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = curvature("cpu")
    with apple(monkeypatch):
        found = curvature(DEVICE)
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-3), name


@pytest.mark.parametrize("method", ["auto", "gram", "polar", "svd"])
def test_nuclear_norm(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0))
    wanted = torch.linalg.svdvals(matrix.double()).sum(-1)
    with apple(monkeypatch):
        found = nuclear_norm(matrix.to(DEVICE), method)
        assert found.device == DEVICE
        assert found.tolist() == pytest.approx(wanted.tolist(), rel=1e-4)


@pytest.mark.parametrize("name", ["spectral", "rms_to_rms"])
def test_norms_with_singular_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, norm = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)), get_norm(name)
    with apple(monkeypatch):
        there = matrix.to(DEVICE)
        assert norm.primal(there).item() == pytest.approx(norm.primal(matrix).item(), rel=1e-5)
        torch.testing.assert_close(norm.lmo(there).cpu(), norm.lmo(matrix))


@pytest.mark.parametrize("several", [False, True], ids=["mps", "xpu"])
def test_random_streams_of_any_accelerator_are_put_back(several: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    held, kind, module = [1, 2], "xpu" if several else "mps", mlp()

    known = {"is_available": lambda: True, "get_rng_state": lambda: held[0]}
    known["manual_seed"] = known["set_rng_state"] = lambda state: held.__setitem__(0, state)
    if several:
        known["is_initialized"], known["get_rng_state_all"] = lambda: True, lambda: list(held)
        known["set_rng_state_all"] = lambda states: held.__setitem__(slice(None), states)
        known["manual_seed_all"] = lambda seed: held.__setitem__(slice(None), [seed, seed])
    monkeypatch.setattr(torch, kind, SimpleNamespace(**known))
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: SimpleNamespace(type=kind))
    with undisturbed(module, seed=7):
        assert held == [7, 7 if several else 2]
    assert held == [1, 2]


class Waits(TorchDispatchMode):
    """Counts what the host reads of tensors."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("steps", [[0.0, 0.0, 0.0], [0.0, 1e-30, 0.0], [math.nan], []])
def test_whether_a_step_moved_anything_is_read_once(steps: list[float]) -> None:
    cpu = torch.device("cpu")
    meter: Any = SimpleNamespace(_update={str(i): torch.full((2, 3), step) for i, step in enumerate(steps)})
    run: Any = SimpleNamespace(ranks=Ranks(cpu, alone=True), module=SimpleNamespace(device=cpu))
    with Waits() as waits:
        moved = StepMeter._has_moved(meter, run)
    assert moved == any(step != 0 for step in steps)
    assert waits.count == 1


@pytest.mark.parametrize("method", ["lanczos", "power"])
def test_a_warm_start_of_another_device_comes_along(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with apple(monkeypatch):
        network = mlp().to(DEVICE)
        x, y = (part.to(DEVICE) for part in next(iter(batches())))
        hessian = HessianOperator(lambda: cross_entropy(network(x), y), dict(network.named_parameters()))
        cold = top_eigenvalues(hessian, k=2, method=method)
        warm = top_eigenvalues(hessian, k=2, method=method, warm_start=cold.vectors.cpu())
        assert float(warm.values[0]) == pytest.approx(float(cold.values[0]), rel=1e-2)
        blocks = blockwise_sharpness(hessian, {"all": "*"})
        again = blockwise_sharpness(hessian, {"all": "*"}, warm_starts={"all": blocks["all"].vectors.cpu()})
        assert float(again["all"].values[0]) == pytest.approx(float(blocks["all"].values[0]), rel=1e-1)


def test_what_a_checkpoint_brings_lies_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def monitor() -> SharpnessMonitor:
        quantities = ["stability_ratio", "hessian", "subspace", "blocks", "preconditioned", "ggn", "bracket"]
        return SharpnessMonitor(every_n_steps=1, quantities=quantities, strict=True)

    with apple(monkeypatch):
        first, second = monitor(), monitor()
        fit(Classifier(mlp().to(DEVICE)), [first], steps=2, strategy=Strategy())
        second.load_state_dict(tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, first.state_dict()))
        fit(Classifier(mlp().to(DEVICE)), [second], steps=2, strategy=Strategy())
    assert second.failures == 0 and len(second.history["sharpness/block"].values) > 0
