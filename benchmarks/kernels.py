"""The Triton twins and the products they stand for, on a GPU: time, share of the copy bandwidth, error.

Run ``python -m benchmarks.kernels``; the tables are printed and go to ``benchmarks/results/kernels.json``. It needs an
NVIDIA GPU with Triton and says so elsewhere. The methods of one table take turns, each timed by GPU events with the
cache emptied in between, and ratios are of medians over all turns. ``--sweep`` tries other tilings of the Gram kernel.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.environment import environment, parser, skip, write
from benchmarks.spectra import gpt2_shapes
from dynamon.kernels import (
    gradient_stats,
    gradient_stats_triton,
    gram_triton,
    polar_factor,
    step_polar_factor,
)
from dynamon.kernels.thresholds import GRAM_TWIN, HOST_EIGENVALUES

GRAM_BAR, GRAM_SIDE = 1.5, GRAM_TWIN[torch.float32]  # times faster than cuBLAS from this side on
COPY_BAR, FOREACH_BAR = 0.8, 2.5  # share of the copy bandwidth, times faster than the foreach composition
SIDES = (1024, 2048, 4096, 8192)
PRECISIONS = {torch.bfloat16: ("ieee",), torch.float32: ("ieee", "tf32x3")}
TILINGS = [
    gram_triton.Tiling(side, depth, warps, stages)
    for side in (64, 128)
    for depth in (32, 64, 128)
    for warps in (4, 8)
    for stages in (3, 4)
]


def milliseconds(methods: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median time of each method; they take turns."""
    from triton.testing import do_bench

    times: dict[str, list[float]] = {label: [] for label in methods}
    for _ in range(rounds):
        for label, method in methods.items():
            times[label] += do_bench(method, warmup=25, rep=100, return_mode="all")
    return {label: statistics.median(found) for label, found in times.items()}


def gaussian(side: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(device="cuda").manual_seed(side)
    return torch.randn(side, side, generator=generator, device="cuda").to(dtype)


def gram(rounds: int, sides: Sequence[int] = SIDES) -> list[dict[str, Any]]:
    """``symmetric_gram`` against one full product, which in half precision rounds what it returns."""
    rows = []
    for dtype, precisions in PRECISIONS.items():
        for side in sides:
            matrix = gaussian(side, dtype)
            methods: dict[str, Callable[[], Any]] = {"cuBLAS": lambda matrix=matrix: matrix.mT @ matrix}
            for precision in precisions:
                methods[precision] = lambda matrix=matrix, precision=precision: gram_triton.symmetric_gram(
                    matrix, precision=precision
                )
            times = milliseconds(methods, rounds)
            exact = matrix[:, :64].double().mT @ matrix.double()
            for label, method in methods.items():
                rows.append(
                    {
                        "dtype": str(dtype).removeprefix("torch."),
                        "side": side,
                        "method": label,
                        "milliseconds": times[label],
                        "times_faster": times["cuBLAS"] / times[label],
                        "error": float((method()[:64].double() - exact).abs().max() / side),
                    }
                )
    return rows


def sweep(rounds: int) -> list[dict[str, Any]]:
    """Every tiling that the GPU has room for, at one side."""
    rows = []
    for dtype, precisions in PRECISIONS.items():
        matrix = gaussian(GRAM_SIDE, dtype)
        for precision in precisions:
            for tiling in TILINGS:

                def method(tiling=tiling, matrix=matrix, precision=precision):  # type: ignore[no-untyped-def]
                    return gram_triton.symmetric_gram(matrix, precision=precision, tiling=tiling)

                try:
                    found = milliseconds({"": method}, rounds)[""]
                except Exception as error:  # too much shared memory, mostly
                    print(f"  {dtype} {precision} {tiling}: {type(error).__name__}")
                    continue
                rows.append({"dtype": str(dtype), "precision": precision, "tiling": str(tiling), "milliseconds": found})
    return sorted(rows, key=lambda row: (row["dtype"], row["precision"], row["milliseconds"]))


def polar(
    rounds: int, shapes: Sequence[tuple[int, int]] = ((1024, 1024), (4096, 1024), (4096, 4096))
) -> list[dict[str, Any]]:
    """``polar_factor`` and the Newton-Schulz iteration of ``torch.optim.Muon``, five steps each."""
    try:
        from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, _zeropower_via_newtonschulz
    except ImportError:
        print("This torch has no Newton-Schulz iteration of Muon to compare with; polar_factor runs alone.")
        peer = None
    else:

        def peer(matrix: Tensor) -> Tensor:
            return _zeropower_via_newtonschulz(matrix, (DEFAULT_A, DEFAULT_B, DEFAULT_C), 5, 1e-7)

    rows = []
    for shape in shapes:
        matrix = gaussian(max(shape), torch.float32)[: shape[0], : shape[1]].contiguous()
        methods: dict[str, Callable[[], Any]] = {
            "polar_factor": lambda matrix=matrix: polar_factor(matrix),
            "step_polar_factor": lambda matrix=matrix: step_polar_factor(matrix),
        }
        if peer is not None:
            methods["Muon"] = lambda matrix=matrix: peer(matrix)
        times = milliseconds(methods, rounds)
        for label, method in methods.items():
            values = torch.linalg.svdvals(method().double())
            rows.append(
                {
                    "shape": shape,
                    "method": label,
                    "milliseconds": times[label],
                    "smallest": float(values.min()),
                    "largest": float(values.max()),
                }
            )
    return rows


def eigenvalues(rounds: int, sides: Sequence[int] = (32, 64, 128, 256, 512, 768, 1024)) -> list[dict[str, Any]]:
    """Eigenvalues of Gram matrices on the GPU and, the way there and back included, on the host, eight at a time."""
    rows = []
    for side in sides:
        matrices = torch.stack([gaussian(side, torch.float32) for _ in range(8)])
        matrices = matrices.mT @ matrices
        methods: dict[str, Callable[[], Any]] = {
            "GPU": lambda matrices=matrices: torch.linalg.eigvalsh(matrices),
            "host": lambda matrices=matrices: torch.linalg.eigvalsh(matrices.cpu()).cuda(),
        }
        times = {label: _once(method, rounds) / 8 for label, method in methods.items()}
        chosen = "host" if side in HOST_EIGENVALUES else "GPU"
        for label in methods:
            ratio = times[chosen] / min(times.values())
            rows.append({"side": side, "method": label, "milliseconds": times[label], "chosen_to_best": ratio})
    return rows


def _once(method: Callable[[], Any], rounds: int) -> float:
    """Median milliseconds of a call that waits for the host too, after one that is not counted."""
    method()
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        method()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def stats(rounds: int, scale: int = 1) -> list[dict[str, Any]]:
    """The twin against the foreach reference and a plain copy, on the gradients of GPT-2 124M."""
    rows = []
    for dtype, stored in ((torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)):
        gradients = [torch.randn(shape, device="cuda").to(dtype) for shape in gpt2_shapes(scale)]
        previous = [torch.randn_like(g, dtype=stored) for g in gradients]
        entries = sum(g.numel() for g in gradients)
        moved = entries * (dtype.itemsize + 2 * stored.itemsize)  # two reads, one write
        source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda")  # a copy reads and writes: as many bytes
        target = torch.empty_like(source)

        def reference(gradients=gradients, previous=previous):  # type: ignore[no-untyped-def]
            with mock.patch.object(gradient_stats_triton, "supported", return_value=False):
                return gradient_stats(gradients, previous)

        def twin(gradients=gradients, previous=previous):  # type: ignore[no-untyped-def]
            return gradient_stats_triton.triton_gradient_stats(gradients, previous)

        methods: dict[str, Callable[[], Any]] = {
            "copy": lambda source=source, target=target: target.copy_(source),
            "foreach": reference,
            "twin": twin,
        }
        times = milliseconds(methods, rounds)
        for label in methods:
            rows.append(
                {
                    "gradients": str(dtype).removeprefix("torch."),
                    "previous": str(stored).removeprefix("torch."),
                    "method": label,
                    "milliseconds": times[label],
                    "gigabytes_per_second": moved / times[label] / 1e6,
                    "share_of_copy": times["copy"] / times[label],
                    "times_faster_than_foreach": times["foreach"] / times[label],
                }
            )
    return rows


def table(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows of one shape."""
    print(f"\n{title}")
    print("".join(f"{label:>26}" for label in rows[0]))
    for row in rows:
        print("".join(f"{value:>26.4g}" if isinstance(value, float) else f"{value!s:>26}" for value in row.values()))


def bars(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Which bars are met."""
    found = []

    def judge(what: str, value: float, bar: float) -> None:
        found.append(f"{'PASS' if value >= bar else 'MISS'}: {what} {value:.2f}, bar {bar}")

    for dtype in PRECISIONS:
        name = str(dtype).removeprefix("torch.")
        for side in sorted({r["side"] for r in results["gram"] if r["side"] >= GRAM_SIDE}):
            rows = [r for r in results["gram"] if (r["dtype"], r["side"]) == (name, side) and r["method"] != "cuBLAS"]
            best = max(rows, key=lambda row: row["times_faster"])
            judge(f"Gram {name} {side} ({best['method']}), times cuBLAS", best["times_faster"], GRAM_BAR)
    for row in results["gradient_stats"]:
        if row["method"] == "twin":
            kind = f"gradient_stats {row['gradients']} and {row['previous']}"
            judge(f"{kind}, share of copy bandwidth", row["share_of_copy"], COPY_BAR)
            judge(f"{kind}, times the foreach composition", row["times_faster_than_foreach"], FOREACH_BAR)
    return found


def main() -> None:
    """Measure, print, write."""
    command = parser("kernels", __doc__)
    command.add_argument("--rounds", type=int, default=5)
    command.add_argument("--sweep", action="store_true", help="also time other tilings of the Gram kernel")
    options = command.parse_args()
    if not gram_triton.can_run(torch.device("cuda")) or not torch.cuda.is_available():
        skip("benchmarks.kernels needs an NVIDIA GPU and Triton.")
    measured: dict[str, Callable[[int], list[dict[str, Any]]]]
    measured = {"gram": gram, "polar": polar, "eigenvalues": eigenvalues, "gradient_stats": stats}
    if options.smallest:
        options.rounds = 1
        measured = {
            "gram": partial(gram, sides=(GRAM_SIDE,)),
            "polar": partial(polar, shapes=((128, 64),)),
            "eigenvalues": partial(eigenvalues, sides=(32,)),
            "gradient_stats": partial(stats, scale=32),
        }
    results = {name: measure(options.rounds) for name, measure in measured.items()}
    if options.sweep:
        results["sweep"] = sweep(1)
    for name, rows in results.items():
        table(name, rows)
    judged = bars(results)
    print("", *judged, sep="\n")
    import triton

    versions = {"triton": triton.__version__, "cuda": torch.version.cuda}
    precision = torch.get_float32_matmul_precision()
    place = environment("kernels", "cuda", **versions, float32_matmul_precision=precision)
    write(options, "kernels", {"environment": place, "bars": judged, "results": results})


if __name__ == "__main__":
    main()
