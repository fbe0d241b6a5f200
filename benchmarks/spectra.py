"""Singular-value statistics of all weight matrices of GPT-2 124M and ResNet-50, against computing singular values.

Run ``python -m benchmarks.spectra``; the table is printed and goes to ``benchmarks/results/spectra.json``. All methods
take turns on the same matrices, so that the ratios mean something on a busy machine. With ``--device cuda`` the same
on a GPU, where ``svdvals`` takes seconds a matrix: it is timed on one matrix of each shape, once, and counted as often
as there are such matrices (a GPU takes them one after the other). That is half a minute at most. WeightWatcher, which
computes all singular values and fits power laws to them, is measured where it is installed; in float64, from NumPy
arrays.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.environment import environment, parser, write
from dynamon.kernels import top_singular
from dynamon.spectra import extremes_of, largest_singular_values, weight_spectra

BARS = {"cpu": {"refresh": 20.0, "full set": 2.0}, "cuda": {"refresh": 30.0, "full set": 10.0}}


def gpt2_shapes(scale: int = 1) -> list[tuple[int, int]]:
    """The matrices of GPT-2 124M: two embeddings, twelve blocks of four."""
    width, tokens = 768 // scale, 50257 // scale
    block = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    return [(tokens, width), (1024 // scale, width), *block * 12]


def resnet50_shapes(scale: int = 1) -> list[tuple[int, int]]:
    """The convolutions of ResNet-50, flattened to ``[out, in * k * k]``, and its head."""
    shapes, inside = [(64, 147)], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, inside), (width, width * 9), (4 * width, width)]
            if block == 0:
                shapes.append((4 * width, inside))
            inside = 4 * width
    return [(max(m // scale, 1), max(n // scale, 1)) for m, n in (*shapes, (1000, 2048))]


def matrices(shapes: list[tuple[int, int]], device: torch.device) -> list[Tensor]:
    """Gaussian matrices with a few strong directions, as trained weights have."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for m, n in shapes:
        rank = max(1, min(m, n) // 16)
        strong = torch.randn(m, rank, generator=generator) @ torch.randn(rank, n, generator=generator) / rank**0.5
        found.append(((torch.randn(m, n, generator=generator) + strong) / n**0.5).to(device))
    return found


def spectral_norm_modules(weights: list[Tensor]) -> Callable[[], list[Tensor]]:
    """``torch.nn.utils.parametrizations.spectral_norm`` with one power iteration, in train mode."""
    modules = []
    for weight in weights:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
        layer.weight.data = weight
        modules.append(nn.utils.parametrizations.spectral_norm(layer))
    return lambda: [layer.parametrizations.weight.original[0, 0] / layer.weight[0, 0] for layer in modules]


def warm_power_steps(weights: list[Tensor], steps: int = 2) -> Callable[[], Tensor]:
    """``top_singular`` from the vectors of the call before; on a GPU matrices of one shape are stacked."""
    groups: dict[object, list[int]] = {}
    for i, weight in enumerate(weights):
        groups.setdefault(weight.shape if weight.is_cuda else i, []).append(i)
    vectors = {key: top_singular(batch(weights, group), steps=20 * steps)[1] for key, group in groups.items()}

    def refresh() -> Tensor:
        values = torch.empty(len(weights), device=weights[0].device)
        for key, group in groups.items():
            found, vectors[key] = top_singular(batch(weights, group), vectors[key], steps)
            values[group] = found
        return values

    return refresh


def batch(weights: list[Tensor], group: list[int]) -> Tensor:
    """Some of the matrices as one tensor; a single one is not copied."""
    return torch.stack([weights[i] for i in group]) if len(group) > 1 else weights[group[0]][None]


def methods(weights: list[Tensor]) -> dict[str, Callable[[], Any]]:
    """What is compared with singular values; each call gives the largest ones."""
    found: dict[str, Callable[[], Any]] = {
        "refresh": warm_power_steps(weights),
        "estimate": lambda: largest_singular_values([w[None] for w in weights]),
        "certificate": lambda: extremes_of(weights).sigma_max,
        "full set": lambda: weight_spectra(weights).sigma_max,
        "torch spectral_norm": spectral_norm_modules(weights),
    }
    watcher = weightwatcher_details(weights)
    if watcher is not None:
        found["WeightWatcher"] = watcher
    return found


def weightwatcher_details(weights: list[Tensor]) -> Callable[[], Tensor] | None:
    """WeightWatcher's analysis of linear layers with these weights: spectra, ranks and power-law fits."""
    try:
        from weightwatcher import WeightWatcher
    except ImportError:
        print('skipped: WeightWatcher, since weightwatcher is missing: pip install -c constraints.txt -e ".[bench]".')
        return None
    model = nn.ModuleList([nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta") for w in weights])
    for layer, weight in zip(model, weights, strict=True):
        layer.weight = nn.Parameter(weight, requires_grad=False)
    limits = {"min_evals": 1, "max_evals": 10**6, "max_N": 10**6}  # by default it skips the token embedding

    def largest() -> Tensor:
        details = WeightWatcher(model=model, log_level=logging.ERROR).analyze(plot=False, **limits)
        values = details.sort_values("layer_id")["sv_max"]
        if len(values) != len(weights):
            raise RuntimeError(f"WeightWatcher analysed {len(values)} matrices of {len(weights)}.")
        return torch.tensor(values.to_numpy(dtype=float), dtype=torch.float64)

    return largest


def seconds(method: Callable[[], Any], device: torch.device) -> float:
    """One call, the device's queue emptied before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    method()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def singular_values(weights: list[Tensor], device: torch.device) -> tuple[float, dict[int, float]]:
    """Seconds of ``svdvals`` for all matrices, and the largest values by position; on a GPU from one of each shape."""
    by_shape: dict[object, list[int]] = {}
    for i, weight in enumerate(weights):
        by_shape.setdefault(weight.shape if device.type == "cuda" else i, []).append(i)
    total, found = 0.0, {}
    for positions in by_shape.values():

        def one(weight: Tensor = weights[positions[0]], position: int = positions[0]) -> None:
            found[position] = torch.linalg.svdvals(weight)[0]

        total += seconds(one, device) * len(positions)
    return total, {position: float(value) for position, value in found.items()}


def compare(name: str, shapes: list[tuple[int, int]], device: torch.device, rounds: int) -> dict[str, Any]:
    """Median seconds of each method in turn, and the errors of its largest singular values."""
    weights = matrices(shapes, device)
    exact = torch.stack([torch.linalg.eigvalsh(_small_gram(w))[-1].sqrt() for w in weights]).cpu()
    compared = methods(weights)
    torch.linalg.svdvals(weights[-1][:64, :64])  # loads what it needs
    last = {label: method() for label, method in compared.items()} if device.type == "cuda" else {}
    times: dict[str, list[float]] = {label: [] for label in ("svdvals", *compared)}
    values: dict[int, float] = {}
    for turn in range(rounds):
        if turn == 0 or device.type == "cpu":
            taken, values = singular_values(weights, device)
            times["svdvals"].append(taken)
        for label, method in compared.items():

            def one(label: str = label, method: Callable[[], Any] = method) -> None:
                last[label] = method()

            times[label].append(seconds(one, device))
    base = _median(times["svdvals"])
    errors = {"svdvals": max(abs(value / float(exact[i]) - 1) for i, value in values.items())}
    for label, found in last.items():
        largest = torch.stack([torch.as_tensor(v).detach().reshape(-1)[0].double().cpu() for v in found])
        errors[label] = float((largest / exact - 1).abs().max())
    rows = [
        {
            "method": label,
            "seconds": _median(taken),
            "times_faster": base / _median(taken),
            "worst_error": errors[label],
        }
        for label, taken in times.items()
    ]
    return {"name": name, "matrices": len(weights), "rows": rows}


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _small_gram(weight: Tensor) -> Tensor:
    wide = weight.double()
    return wide.mT @ wide if wide.shape[0] >= wide.shape[1] else wide @ wide.mT


def report(results: list[dict[str, Any]], device: torch.device) -> None:
    """The table, and which bars are met."""
    for result in results:
        print(f"\n{result['name']}, {result['matrices']} matrices on {device}")
        print(f"  {'method':<22}{'seconds':>10}{'x svdvals':>12}{'worst error':>14}")
        for row in result["rows"]:
            figures = f"{row['seconds']:>10.4f}{row['times_faster']:>12.1f}{row['worst_error']:>14.1e}"
            print(f"  {row['method']:<22}{figures}")
        if result["name"].startswith("GPT-2"):
            speed = {row["method"]: row["times_faster"] for row in result["rows"]}
            for label, bar in BARS[device.type].items():
                print(f"  {'PASS' if speed[label] >= bar else 'MISS'}: {label} {speed[label]:.1f}x, bar {bar:.0f}x")


def main() -> None:
    """Measure, print, write."""
    command = parser("spectra", __doc__)
    command.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    command.add_argument("--rounds", type=int, default=3)
    command.add_argument("--scale", type=int, default=1, help="divide all sizes by this, for a quick look")
    options = command.parse_args()
    if options.smallest:
        options.rounds, options.scale = 1, 64
    device = torch.device(options.device)
    shapes = {"GPT-2 124M": gpt2_shapes(options.scale), "ResNet-50": resnet50_shapes(options.scale)}
    results = [compare(name, found, device, options.rounds) for name, found in shapes.items()]
    report(results, device)
    write(options, "spectra", {"environment": environment("spectra", device.type), "results": results})


if __name__ == "__main__":
    main()
