"""Where the stability ratio's spikes live: the top eigenvector's share by layer and row, and how far Adam lags behind.

Run ``python -m benchmarks.spikes`` from the repository root; the result goes to ``benchmarks/results/spikes.json`` and
a picture to ``docs/pictures/spikes.png`` (``--picture``). It trains the small language model of ``dynamon demo`` with
the demo's optimizer, and measures on a quarter of the first batch. ``lag`` is the share of the top eigenvector (by
squared entries, in scaled coordinates) in coordinates whose squared gradient on the probe is above ten times Adam's
second moment: there the step that Adam would take is shorter than the ratio supposes.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.environment import environment, parser, write
from dynamon.cli.demo_data import standard_library_text, training_batches
from dynamon.cli.demo_plan import SIZES
from dynamon.cli.language_model import LanguageModel
from dynamon.curvature import HessianOperator, top_eigenvalues
from dynamon.stability import stability_operator, stability_scaling

BEHIND = 10.0  # squared gradient over second moment from which on Adam lags behind
STEPS, EVERY = 120, 4


def loss_of(model: LanguageModel, batch: Tensor) -> Tensor:
    """Cross-entropy of a batch, without logging."""
    return F.cross_entropy(model.network(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def read(model: LanguageModel, optimizer: torch.optim.AdamW, probe: Tensor) -> dict[str, Any]:
    """The ratio in both forms, the Hessian's eigenvalue, and where the ratio's top eigenvector lies."""
    named = dict(model.network.named_parameters())
    hessian = HessianOperator(lambda: loss_of(model, probe), named)
    now = top_eigenvalues(stability_operator(hessian, stability_scaling(optimizer, named)), max_matvecs=30)
    coming = stability_scaling(optimizer, named, gradient=hessian.gradient)
    following = top_eigenvalues(stability_operator(hessian, coming), max_matvecs=30, warm_start=now.vectors)
    plain = top_eigenvalues(hessian, max_matvecs=30)
    moment = torch.cat([optimizer.state[p]["exp_avg_sq"].reshape(-1) for p in named.values()])
    mass = now.vectors[:, 0] ** 2
    parts = dict(zip(named, mass.split([p.numel() for p in named.values()]), strict=True))
    layer = max(parts, key=lambda name: float(parts[name].sum()))
    rows = parts[layer].view(named[layer].shape[0], -1).sum(1)
    numbers = {
        "ratio": now.values[0],
        "next": following.values[0],
        "hessian": plain.values[0],
        "share of the layer": parts[layer].sum(),
        "share of its first row": rows.max(),
        "lag": mass[hessian.gradient**2 > BEHIND * moment].sum(),
    }
    return {"layer": layer, "row": int(rows.argmax())} | {key: float(f"{float(v):.4g}") for key, v in numbers.items()}


def run(steps: int, size: str) -> list[dict[str, Any]]:
    """Train and read every few steps, from the second reading on: before it Adam's moments are of the first steps."""
    torch.manual_seed(0)
    shape = SIZES[size]
    text, _ = standard_library_text()
    model = LanguageModel(2 * STEPS, context=shape.context, width=shape.width, depth=shape.depth)
    optimizer = model.configure_optimizers()["optimizer"]
    readings, probe = [], None
    for step, batch in enumerate(training_batches(text, shape.batch, shape.context, steps, 0), start=1):
        probe = batch[: shape.batch // 4] if probe is None else probe
        optimizer.param_groups[0]["lr"] = model.rate * model._rate(step - 1)
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % EVERY == 0 and step > EVERY:
            readings.append({"step": step} | read(model, optimizer, probe))
            print(readings[-1], flush=True)
    return readings


def jumps(readings: list[dict[str, Any]], form: str) -> dict[str, float]:
    """How much a form jumps: the median factor between neighbours, and the largest one."""
    values = torch.tensor([one[form] for one in readings], dtype=torch.float64).log().diff().abs().exp()
    return {"median": round(float(values.median()), 3), "largest": round(float(values.max()), 3)}


def draw(readings: list[dict[str, Any]], path: Path) -> None:
    """Both forms above, below where the ratio's top eigenvector lies in coordinates whose second moment lags."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = [one["step"] for one in readings]
    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(8, 5), layout="constrained")
    for form, label in (("ratio", "stability_ratio"), ("next", "stability_ratio_next")):
        above.semilogy(steps, [one[form] for one in readings], "o-", markersize=3, label=label)
    above.axhline(1, color="grey", linewidth=0.8)
    above.legend()
    below.plot(steps, [one["lag"] for one in readings], "o-", markersize=3, color="tab:red")
    below.set(xlabel="step", ylim=(0, 1), ylabel="top eigenvector where\ng² > 10 v (share)")
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    """The command line."""
    command = parser("spikes", __doc__)
    command.add_argument("--picture", type=Path, help="where to draw the picture; none without it")
    return command.parse_args()


def main() -> None:
    """Train, print how much either form jumps, and write the result."""
    options = parse()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    readings = run(12 if options.smallest else STEPS, "small")
    result = {
        "environment": environment("spikes"),
        "jumps": {form: jumps(readings, form) for form in ("ratio", "next")},
    }
    result["environment"]["seconds in all"] = round(time.perf_counter() - begin)
    print(result["jumps"])
    write(options, "spikes", result | {"readings": readings})
    if options.picture is not None:
        draw(readings, options.picture)


if __name__ == "__main__":
    main()
