"""Apple GPUs and other devices without float64 and eigenvalues: every reading is there, to the accuracy of float32."""

import math
from collections.abc import Callable, Iterable, Sequence
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
from torch.utils.data import DataLoader

from dynamon import measure
from dynamon.callbacks import DynamicsMonitor, LayerwiseLR, NoiseAdaptiveLR, SharpnessMonitor, WeightMonitor
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
from dynamon.distributed.ranks import Ranks
from dynamon.isolation.preserve import preserve_state
from dynamon.kernels import nuclear_norm, widest_dtype
from dynamon.monitoring.dynamics_monitor import PRESETS
from dynamon.monitoring.sharpness_monitor import QUANTITIES
from dynamon.monitoring.update_curvature import UpdateCurvatureMeter
from dynamon.norms import get_norm
from dynamon.optim import Lanton, LayerwiseRates
from dynamon.rates import FixedRates, NoiseAdaptiveRates, SpectralTailRates
from tests.apple import DEVICE, STREAM, Strategy, apple, has_kernel
from tests.conformance.subjects import Data, Subject
from tests.helpers import Classifier, batches, fit, mlp, same_weights

TOLERANCE = 5e-3
SOLVED = "_share", "_overlap"  # of eigenvectors that are known to the tolerance of the solver
# Time, what jumps by a whole candidate or burst, second moments that round to zero.
UNLIKE = ("dynamon/", "spectrum/tail", "sharpness/matvecs", "sharpness/excluded_coordinates")
UNLIKE += ("precision/update_size", "precision/gradient_underflow")  # some gradients and steps are rounding alone


@pytest.fixture(autouse=True)
def same_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have solvers on the CPU look as rarely as there: what they end with depends on the product they stop at."""
    monkeypatch.setattr("dynamon.curvature.solvers.lanczos.reads_are_free", lambda device: False)


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


def quick(names: Iterable[str], *slow: str) -> list[Any]:
    """Those names as parameters; slow are those whose tags another one has too."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name in slow else []) for name in names]


@pytest.mark.parametrize("name", quick(CALLBACKS, "full"))
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


@pytest.mark.parametrize("name", quick(NEUTRAL, "economy", "standard"))
def test_callbacks_leave_training_there_as_it_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with apple(monkeypatch):
        (plain, *streams), (monitored, *after) = trained([]), trained(NEUTRAL[name]())
        assert same_weights(plain, monitored)
        assert all(map(torch.equal, streams, after))
        torch.manual_seed(3)
        assert not torch.equal(STREAM.get_state(), streams[1])  # dropout draws from it


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("lag", [0, pytest.param(1, marks=pytest.mark.slow)])
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


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.parametrize("model", ["transformer with SDPA", "LSTM"])
def test_models_with_other_layers(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained_there(there: bool) -> list[Any]:
        callbacks = [DynamicsMonitor("standard", every_n_steps=3, strict=True), NoiseAdaptiveLR(warmup=1)]
        data = Data(model, shuffle=False).train_dataloader()
        options = {"strategy": Strategy()} if there else {}
        fit(Subject(model), callbacks, data, steps=3, **options)
        return callbacks

    wanted = trained_there(False)
    with apple(monkeypatch):
        for one, other in zip(trained_there(True), wanted, strict=True):
            assert_alike(one, other)


@pytest.mark.parametrize("source", ["successive", "independent"])
@pytest.mark.parametrize("arguments", [{}, {"lag": 0}, {"read_every": 2}], ids=str)
def test_steering_in_a_loop_of_ones_own(source: Any, arguments: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained_there(device: Any) -> list[float]:
        network = mlp().to(device)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        rates = LayerwiseRates(optimizer, NoiseAdaptiveRates(source=source, warmup=1), network, **arguments)
        loader = list(batches())
        for x, y in [*loader[:6]]:
            optimizer.zero_grad()
            for half in (slice(0, 4), slice(4, 8)):
                (cross_entropy(network(x[half].to(device)), y[half].to(device)) / 2).backward()
                if half.start == 0:
                    rates.observe_part(0.5)
            optimizer.step()
        return list(rates.ratios.values())

    wanted = trained_there("cpu")
    with apple(monkeypatch):
        found = trained_there(DEVICE)
    assert found == pytest.approx(wanted, rel=1e-4) and min(found) < 1


def test_accumulated_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained_there(there: bool) -> list[Any]:
        steering = NoiseAdaptiveLR(warmup=1, source="independent")
        callbacks = [DynamicsMonitor(every_n_steps=2, quantities=["critical"], strict=True), steering]
        options = {"strategy": Strategy()} if there else {}
        fit(Classifier(mlp()), callbacks, steps=4, accumulate_grad_batches=2, **options)
        return callbacks

    wanted = trained_there(False)
    with apple(monkeypatch):
        for one, other in zip(trained_there(True), wanted, strict=True):
            assert_alike(one, other)


def test_where_tensors_are_made_there_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers in float64 are the host's own."""
    wanted = curvature("cpu")
    with apple(monkeypatch), DEVICE:
        found = curvature(DEVICE)
        monitor = DynamicsMonitor("full", every_n_steps=3, strict=True)
        fit(Classifier(small()), [monitor, NoiseAdaptiveLR()], on_host(batches()), steps=3, strategy=Strategy())
    assert found["lanczos 0"] == pytest.approx(wanted["lanczos 0"], rel=1e-3)
    assert "sharpness/block" in monitor.history


def on_host(loader: Any) -> DataLoader[Any]:
    """Its batches, since the loader's own generator would be asked for on the device."""
    return DataLoader(list(loader), batch_size=None)


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
    density = spectral_density(hessian, steps=10, num_vectors=2)
    wanted = {name: found.vectors[:, :2] for name, found in pairs.items()}  # further ones have not settled
    scipy = hessian.to_scipy() @ np.ones(hessian.shape[0])
    return {
        **{f"{name} {i}": float(value) for name, found in pairs.items() for i, value in enumerate(found.values)},
        "upper": float(pairs["gram"].upper or math.nan),
        "trace": trace(hessian, num_vectors=4).value,
        "density": float((density.weights * density.nodes).sum()),
        "directional": directional_sharpness(hessian, hessian.gradient).sharpness,
        "batch": batch_sharpness([hessian]),
        "share": eigenspace_share(wanted["lanczos"], hessian.gradient),
        "overlap": eigenspace_overlap(wanted["lanczos"], wanted["power"]),
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


def test_where_random_numbers_cannot_be_put_back_nothing_is_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    with apple(monkeypatch):
        plain, *streams = trained([])
        monkeypatch.delattr(torch.mps, "get_rng_state")
        monitor = DynamicsMonitor(every_n_steps=1, strict=True)
        with pytest.warns(UserWarning, match="torch cannot put back the random numbers"):
            monitored, *after = trained([monitor])
        assert same_weights(plain, monitored)
        assert all(map(torch.equal, streams, after))
    assert "gradient/dual" in monitor.history and "weight/operator" in monitor.history
    assert not any(tag.startswith("sharpness/") for tag in monitor.history)


@pytest.mark.parametrize(("kind", "is_wide"), [("cpu", True), ("cuda", True), ("mps", False), ("hpu", False)])
def test_the_widest_dtype_of_a_device(kind: str, is_wide: bool) -> None:
    assert (widest_dtype(torch.device(kind)) == torch.float64) is is_wide


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
    with preserve_state(module, seed=7):
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
    run: Any = SimpleNamespace(ranks=Ranks(cpu, alone=True), device=cpu)
    with Waits() as waits:
        moved = UpdateCurvatureMeter._has_moved(meter, run)
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


REFUSED = {
    "float64": lambda x: x.double(),
    "numbers in float64": lambda x: torch.zeros(2, dtype=torch.float64, device=DEVICE),
    "a tensor in float64": lambda x: torch.zeros(2, dtype=torch.float64).to(DEVICE),
    "sums in float64": lambda x: x.sum(dtype=torch.float64),
    "complex128": lambda x: torch.complex(x, x).to(torch.complex128),
    "numpy": lambda x: x.numpy(),
    "as an array": lambda x: np.asarray(x),
    "pinned memory": lambda x: torch.empty_like(x, pin_memory=True),
    "two devices": lambda x: x + torch.ones(3, 3),
    "eigvalsh": torch.linalg.eigvalsh,
    "eigh": torch.linalg.eigh,
    "eigvals": torch.linalg.eigvals,
    "svdvals": torch.linalg.svdvals,
    "qr": torch.linalg.qr,
    "histc": torch.histc,
    "geqrf": torch.geqrf,
    "a mode of values": lambda x: torch.mode(x),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_stand_in_refuses_what_the_device_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with apple(monkeypatch):
        there = torch.ones(3, 3).to(DEVICE)
        with pytest.raises((TypeError, RuntimeError)):
            REFUSED[name](there)


def test_kernels_by_the_table_of_torch() -> None:
    names = ("mm", "add.Tensor", "aminmax", "linalg_vector_norm", "index_copy", "bincount", "_foreach_norm.Scalar")
    assert all(map(has_kernel, names))
    assert not any(map(has_kernel, ("mode", "_linalg_eigh", "geqrf", "mkldnn_rnn_layer")))
