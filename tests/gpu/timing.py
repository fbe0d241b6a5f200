"""What takes how long on GPT-2 124M: kernels, steering, the budget, every reading. Nothing else may run meanwhile."""

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu, kernels, spectra
from benchmarks.gpu import FULL, TINY, loss_of, measure, train, wait
from dynamon.callbacks import DynamicsMonitor, GradientMonitor, NoiseAdaptiveLR, SharpnessMonitor, WeightMonitor
from dynamon.curvature import HessianOperator, top_eigenvalues
from dynamon.kernels import gradient_stats, polar_factor, step_polar_factor
from dynamon.kernels.thresholds import GRAM_TWIN
from dynamon.layers import describe_layers
from dynamon.optim import Lanton
from dynamon.quantities.weights import layer_spectra, weight_readings
from tests.gpu.report import Check, Report, Skip, add, check
from tests.gpu.subjects import DEVICE, ON_GPU

SIZE = FULL if ON_GPU else TINY
STEERING, BUDGET, RATIO = 0.02, 0.02, 4.0  # shares of a step; training steps a stability ratio may take
STATED = 0.25  # how far what a callback states may lie from what is measured, relative to it
GRACE = 4.0  # seconds for the first reading of each kind, which loads and compiles
NOISE = 0.01  # below which shares of a step are not told apart
HERE = {"size": SIZE, "device": DEVICE}


def _needs_triton() -> None:
    if not ON_GPU:
        raise Skip("needs an NVIDIA GPU with Triton")


@check("kernels", 12.0, alone=True, rank=1)
def gradient_statistics(report: Report) -> None:
    """Share of the bandwidth of a copy, and times the foreach composition; then host and device told apart."""
    for dtype in (torch.float32, torch.bfloat16):
        gradients = [torch.randn(shape, device=DEVICE).to(dtype) for shape in spectra.gpt2_shapes(1 if ON_GPU else 32)]
        previous = [torch.randn_like(g) for g in gradients]
        call = partial(gradient_stats, gradients, previous)
        name = str(dtype).removeprefix("torch.")
        own = measure(call, DEVICE)
        report.note(f"gradient_stats, {name}", own)
        source = torch.empty(3 * sum(g.nbytes for g in gradients) // 2, dtype=torch.uint8, device=DEVICE)
        copy = measure(partial(torch.empty_like(source).copy_, source), DEVICE)  # moves as many bytes
        if own["device ms"]:
            share = copy["device ms"] / own["device ms"]
            report.note(f"{name}: share of a copy's bandwidth, kernels alone", round(share, 3))
    del gradients, previous, call, source
    _needs_triton()
    # Where it does not, the composition of PyTorch's kernels is taken without an error.
    twin = partial(kernels.gradient_stats_triton.runs, torch.device(DEVICE, torch.cuda.current_device()))
    for dtype in (torch.float32, torch.bfloat16):
        report.hold(f"the Triton twin runs, {dtype}", twin(dtype, dtype, torch.float64, True))
    for row in kernels.stats(1):
        kind = f"{row['method']}, {row['gradients']} and {row['previous']}"
        report.note(f"{kind}: ms", float(f"{row['milliseconds']:.4g}"))
        if row["method"] == "twin":
            report.bar(f"{kind}: share of a copy's bandwidth", row["share_of_copy"], least=kernels.COPY_BAR)
            times = row["times_faster_than_foreach"]
            report.bar(f"{kind}: times the foreach composition", times, least=kernels.FOREACH_BAR)


@check("timing", 18.0, alone=True, rank=2)
def steering_fused(report: Report) -> None:
    """Steps of GPT-2 124M with and without, a fused optimizer."""
    _steering(report, True)


@check("timing", 18.0, alone=True, rank=6)
def steering_foreach(report: Report) -> None:
    """The same with a foreach optimizer."""
    _steering(report, False)


def _steering(report: Report, fused: bool) -> None:
    warm, steps = (10, 60) if ON_GPU else (1, 3)
    times: dict[str, list[float]] = {"plain": [], "steered": []}
    stated, groups = 0.0, 0
    for turn in range(4):
        name = ("plain", "steered")[turn % 2]
        steering = NoiseAdaptiveLR(warmup=2) if turn % 2 else None
        clock = train([steering] if steering else [], steps, fused=fused, warm=warm, **HERE)
        times[name].append(1e3 * clock.mean)
        report.note(f"{name}, ms a step, turn {turn // 2 + 1}", round(1e3 * clock.mean, 3))
        if steering is not None:
            stated, groups = steering.overhead, len(set(steering.ratios.values()))
    measured = min(times["steered"]) / min(times["plain"]) - 1
    report.note("different ratios", groups)
    report.note("measured and stated", [round(measured, 4), round(stated, 4)])
    report.bar("share of a step", measured, most=STEERING)
    report.bar("stated less measured", abs(stated - measured), most=max(STATED * measured, NOISE))


@check("timing", 30.0, alone=True, rank=3)
def the_budget(report: Report) -> None:
    """A default monitor on a run that is long enough for its readings, against steps without."""
    steps, warm = (320, 10) if ON_GPU else (6, 1)

    def plain(when: str) -> gpu.Clock:
        clock = train([], warm + steps // 6, warm=warm, **HERE)
        report.note(f"plain, {when}: ms a step, s of the start", [round(1e3 * clock.mean, 3), round(clock.start, 3)])
        return clock

    before = plain("before")
    monitor = DynamicsMonitor()
    clock = train([monitor], steps, warm=steps // 2, **HERE)
    after = plain("after")
    step, start = min(before.mean, after.mean), min(before.start, after.start)
    training, spent = steps * step, getattr(getattr(monitor, "_budget", None), "spent_on", {})
    extra = clock.total - start - training
    report.note(
        "monitored, ms a step, all and second half", [round(1e3 * clock.total / steps, 3), round(1e3 * clock.mean, 3)]
    )
    report.note("seconds beyond plain steps", round(extra, 3))
    report.note("seconds booked", {name: round(value, 3) for name, value in spent.items()})
    report.note("readings", {tag: len(monitor.history[tag].steps) for tag in READ if tag in monitor.history})
    report.note("share of training: measured and stated", [round(extra / training, 4), round(monitor.overhead, 4)])
    report.bar("seconds beyond plain steps", extra, most=(BUDGET + NOISE) * training + GRACE)
    report.bar("second half: share of training", clock.mean / step - 1, most=BUDGET * (1 + STATED) + NOISE / 2)
    measured = extra / training
    report.bar("stated less measured", abs(monitor.overhead - measured), most=max(STATED * measured, NOISE))


@check("timing", 12.0, alone=True, rank=6.5)
def stated_overhead_without_a_budget(report: Report) -> None:
    """Where monitoring costs much, what it says of itself against what is measured."""
    steps, warm = (80, 10) if ON_GPU else (6, 1)
    plain = train([], steps // 2, warm=warm, **HERE)
    monitor = DynamicsMonitor(budget=None)
    clock = train([monitor], steps, warm=warm, **HERE)
    training = steps * plain.mean
    measured = (clock.total - plain.start - training) / training
    report.note("measured and stated", [round(measured, 4), round(monitor.overhead, 4)])
    report.bar("stated over measured, less one", abs(monitor.overhead / max(measured, 1e-9) - 1), most=STATED)


READ = ("gradient/norm", "noise/dual", "weight/operator", "spectrum/sigma_max", "spectrum/effective_rank")
READ += ("sharpness/directional", "sharpness/critical_multiple", "sharpness/stability_ratio")


READINGS: dict[str, tuple[Callable[[int], Any], int]] = {
    "stability ratio": (lambda n: SharpnessMonitor(every_n_steps=n, quantities=["stability_ratio"]), 5),
    "stability ratio, probe of an eighth": (
        lambda n: SharpnessMonitor(every_n_steps=n, quantities=["stability_ratio"], probe_fraction=0.125),
        5,
    ),
    "gradients": (lambda n: GradientMonitor(every_n_steps=n), 4),
    "weights": (lambda n: WeightMonitor(every_n_steps=n), 4),
    "directional and critical": (
        lambda n: SharpnessMonitor(every_n_steps=n, quantities=["directional", "critical"]),
        5,
    ),
}


@check("timing", 25.0, alone=True, rank=4)
def readings(report: Report) -> None:
    """Milliseconds of each reading in training, and in training steps; the device is waited for at each step."""
    steps = 24 if ON_GPU else 5
    plain = statistics.median(train([], steps, exact=True, **HERE).steps[steps // 3 :])
    report.note("a plain step, ms", round(1e3 * plain, 3))
    for name, (make, every) in READINGS.items():
        every, periods = (every, 4) if ON_GPU else (2, 1)
        monitor = make(every)
        clock = train([monitor], (2 + periods) * every + 1, exact=True, **HERE)
        own = clock.steps[2 * every : (2 + periods) * every]  # the first ones compile, and solve from nothing
        seconds = every * (statistics.mean(own) - plain)
        row = {"ms": round(1e3 * seconds, 2), "steps": round(seconds / plain, 2), "failures": monitor.failures}
        report.note(name, {**row, "first step, ms": round(1e3 * max(clock.steps[: 2 * every]), 1)})
        report.hold(f"{name}: no failure", monitor.failures == 0)
        if name == "stability ratio":
            report.bar("stability ratio: training steps a reading", seconds / plain, most=RATIO)


class Parts:
    """GPT-2 124M with its gradients, and what is measured of it."""

    def __init__(self) -> None:
        self.network = gpu.model(SIZE, DEVICE)
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randint(SIZE.tokens, (SIZE.batch, SIZE.context + 1), generator=generator).to(DEVICE)
        self.layers = describe_layers(self.network)
        self.before = {la.name: la.parameter.detach() + 1e-4 for la in self.layers}

    def loss(self, samples: int) -> Tensor:
        return loss_of(self.network, self.x[:samples])

    def operator(self) -> HessianOperator:
        return HessianOperator(lambda: self.loss(max(1, SIZE.batch // 4)), dict(self.network.named_parameters()))


def _curvature(report: Report, dtype: torch.dtype | None) -> None:
    parts = Parts()
    with torch.autocast(DEVICE, dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False):
        report.note("graph of the gradient, quarter of a batch", measure(parts.operator, DEVICE, 2))
        operator = parts.operator()
        vector = torch.randn(operator.shape[0], device=DEVICE, dtype=operator.dtype)
        vector /= vector.norm()
        report.note("backend", operator.backend)
        report.note("product", measure(lambda: operator @ vector, DEVICE, 3))
        begin = time.perf_counter()
        found = top_eigenvalues(operator)
        wait(DEVICE)
        seconds = time.perf_counter() - begin
        report.note("top eigenvalue, from nothing: s, products", [round(seconds, 3), found.matvecs])


def _full_spectra(report: Report) -> None:
    parts = Parts()
    report.note("weights, ms", measure(lambda: weight_readings(parts.layers, parts.before), DEVICE, 2))
    for turn in ("first", "second"):
        wait(DEVICE)
        begin = time.perf_counter()
        layer_spectra(parts.layers)
        wait(DEVICE)
        report.note(f"full spectra, {turn}, s", round(time.perf_counter() - begin, 3))


def _steps_of_optimizers(report: Report) -> None:
    parts = Parts()
    for parameter in parts.network.parameters():
        parameter.grad = torch.randn_like(parameter)
    for name, how in {"fused": {"fused": True}, "foreach": {"foreach": True}}.items():
        optimizer = torch.optim.AdamW(parts.network.parameters(), 1e-4, **how)  # type: ignore[arg-type]
        report.note(f"AdamW {name}", measure(optimizer.step, DEVICE))
    for noise in (False, True):
        lanton = Lanton(parts.network, 0.01, noise_adaptive=noise)
        report.note(f"Lanton{' with noise' if noise else ''}", measure(lanton.step, DEVICE, 2))


PIECES: dict[str, tuple[Callable[[Report], None], float, float]] = {
    "pieces: weights and full spectra": (_full_spectra, 10.0, 8.0),
    "pieces: curvature, bf16": (lambda report: _curvature(report, torch.bfloat16), 10.0, 7.0),
    "pieces: steps of optimizers": (_steps_of_optimizers, 8.0, 9.0),
    "pieces: curvature, float32": (lambda report: _curvature(report, None), 14.0, 12.0),
}
for _name, (_run, _seconds, _rank) in PIECES.items():
    add(Check(_name, "timing", _run, _seconds, alone=True, rank=_rank))


@check("kernels", 15.0, alone=True, rank=5)
def spectra_of_gpt2(report: Report) -> None:
    """Times ``svdvals`` of all matrices; a GPU takes them one after the other, so one of each shape is timed."""
    device = torch.device(DEVICE)
    weights = spectra.matrices(spectra.gpt2_shapes(1 if ON_GPU else 16), device)
    compared, times = spectra.methods(weights), {}
    for name in ("refresh", "full set", "certificate", "estimate"):
        spectra.seconds(compared[name], device)
        times[name] = spectra.seconds(compared[name], device)
        report.note(f"{name}, s", float(f"{times[name]:.4g}"))
    torch.linalg.svdvals(weights[-1][:64, :64])  # loads what it needs
    svdvals, _ = spectra.singular_values(weights, device)
    report.note("svdvals, s", float(f"{svdvals:.4g}"))
    for name, least in spectra.BARS["cuda"].items():
        report.bar(f"{name}: times svdvals", svdvals / times[name], least=least)


@check("kernels", 6.0, alone=True, rank=13)
def eigenvalues_on_the_host_or_the_device(report: Report) -> None:
    """Which of them is quicker by side, against what is chosen."""
    if not ON_GPU:
        raise Skip("needs an NVIDIA GPU")
    for row in kernels.eigenvalues(1):
        found = [float(f"{row[key]:.4g}") for key in ("milliseconds", "chosen_to_best")]
        report.note(f"side {row['side']}, {row['method']}: ms, and what is chosen to the best", found)


@check("kernels", 15.0, alone=True, rank=10)
def gram_products(report: Report) -> None:
    """The Triton twin against cuBLAS."""
    _needs_triton()
    used = {str(dtype).removeprefix("torch."): least for dtype, least in GRAM_TWIN.items()}
    best: dict[tuple[str, int], float] = {}
    for row in kernels.gram(1):
        kind = (row["dtype"], row["side"])
        report.note(f"{row['method']}, {kind[0]}, side {kind[1]}: ms", float(f"{row['milliseconds']:.4g}"))
        if row["method"] != "cuBLAS":
            best[kind] = max(best.get(kind, 0.0), row["times_faster"])
    for (dtype, side), times in best.items():
        if side >= used.get(dtype, math.inf):
            report.bar(f"{dtype}, side {side}: times cuBLAS", times, least=kernels.GRAM_BAR)


@check("kernels", 6.0, alone=True, rank=11)
def polar_factors(report: Report) -> None:
    """Against Muon's iteration, where this torch has it."""
    methods: dict[str, Callable[[Tensor], Any]] = {
        "float32": polar_factor,
        "as steps take it": step_polar_factor,
    }
    try:
        from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, _zeropower_via_newtonschulz

        muon = (DEFAULT_A, DEFAULT_B, DEFAULT_C)
        methods["Muon"] = lambda matrix: _zeropower_via_newtonschulz(matrix, muon, 5, 1e-7)
    except ImportError:
        report.note("Muon", "not in this torch")
    for shape in ((768, 768), (3072, 768), (4096, 4096)) if ON_GPU else ((16, 16),):
        matrix = torch.randn(shape, device=DEVICE)
        for name, method in methods.items():
            report.note(f"{list(shape)}, {name}", measure(lambda method=method, m=matrix: method(m), DEVICE))
