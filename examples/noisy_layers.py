"""Two of eight layers have noisy gradients: what the noise rule measures, and what it saves.

Each layer has a target of its own and a quadratic loss; noise of a known size is added to its gradient, thirty times
as much in two layers, which have little to learn. One rate for all must be small for their sake and then is slow for
the others. The noise rule (LANTON, arXiv 2510.14009) finds the two by itself. The script checks three things: that the
measured noise is the noise that was added, that the ratios are those of the formula, and that the rule reaches the
target in fewer steps than the best single rate. That is a problem made for the rule; ``docs/evidence.md`` says what it
does for real ones.

Takes about ten seconds; run ``python examples/noisy_layers.py``. The picture goes to ``noisy_layers.png``, or where
``--out`` says.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dynamon.optim import LayerwiseRates
from dynamon.rates import NoiseAdaptiveRates

LAYERS, SIDE = 8, 16
NOISY = (2, 5)
NOISE, TIMES = 0.1, 30.0  # of an entry of the gradient, and how much more the noisy layers have
TARGET = 8.0  # the loss to be reached, of 770 at the start
ALPHA, FLOOR = 0.1, 0.1
Curve = list[float]


class Quadratic(nn.Module):
    """Half the squared distance of eight matrices from their targets; gradients come with noise."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ParameterList(torch.zeros(SIDE, SIDE) for _ in range(LAYERS))
        self.targets = []
        for index, weight in enumerate(self.layers):
            noisy = index in NOISY
            self.targets.append((0.1 if noisy else 1.0) * torch.randn(SIDE, SIDE, generator=generator))
            size = NOISE * (TIMES if noisy else 1.0)
            weight.register_hook(lambda g, s=size: g + s * torch.randn(g.shape, generator=generator))

    def forward(self) -> Tensor:
        pairs = zip(self.layers, self.targets, strict=True)
        return sum((0.5 * (weight - target).square().sum() for weight, target in pairs), torch.zeros(()))


def train(rate: float, adaptive: bool, steps: int, seed: int) -> tuple[Curve, LayerwiseRates | None]:
    """Losses without noise, until the target is reached, and what steered."""
    model = Quadratic(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    rule = NoiseAdaptiveRates(alpha=ALPHA, floor=FLOOR, warmup=0)
    rates = LayerwiseRates(optimizer, rule, model) if adaptive else None
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model()
        losses.append(float(loss.detach()))
        if losses[-1] <= TARGET or not math.isfinite(losses[-1]):
            break
        loss.backward()
        optimizer.step()
    return losses, rates


def steps_to_target(adaptive: bool, rates: Sequence[float], steps: int, seeds: int) -> dict[float, float]:
    """Mean number of steps by base rate; infinite where one run does not get there."""
    found = {}
    for rate in rates:
        curves = [train(rate, adaptive, steps, seed)[0] for seed in range(seeds)]
        reached = all(curve[-1] <= TARGET for curve in curves)
        found[rate] = sum(map(len, curves)) / seeds if reached else math.inf
    return found


def check_noise(rates: LayerwiseRates) -> None:
    """The measured H against E|G - G'|^2 = 2 sigma^2 n, and the ratios against the formula."""
    assert rates.rule.noise is not None
    sizes = [NOISE * (TIMES if index in NOISY else 1.0) for index in range(LAYERS)]
    exact = torch.tensor([2 * size**2 * SIDE**2 for size in sizes], dtype=torch.float64)
    measured = torch.from_numpy(rates.rule.noise.squared)
    worst = float((measured / exact - 1).abs().max())
    floor = ALPHA**2 * float(measured.quantile(0.5))
    ratios = ((floor + measured.min()) / (floor + measured)).pow(0.25).clamp_min(FLOOR)
    apart = float((torch.tensor(list(rates.ratios.values()), dtype=torch.float64) - ratios).abs().max())
    print(f"noise: H within {worst:.1%} of what was added; ratio of the noisy layers {float(ratios.min()):.3f}")
    if worst > 0.1:
        raise SystemExit(f"H is off by {worst:.1%}, and not by at most 10 %.")
    if apart > 1e-6:
        raise SystemExit(f"ratios are {apart:.2g} off the formula.")


def draw(path: Path, found: dict[bool, dict[float, float]], curves: dict[bool, Curve]) -> None:
    """Steps to the target by base rate, and the loss of the best runs."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print('no picture: matplotlib is not installed (pip install "lightning-dynamon[demo]")')
        return
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for adaptive, color in ((False, "#D55E00"), (True, "#0072B2")):
        name = "noise rule" if adaptive else "one rate for all"
        reached = {rate: steps for rate, steps in found[adaptive].items() if math.isfinite(steps)}
        left.plot(list(reached), list(reached.values()), "o-", color=color, label=name)
        right.plot(curves[adaptive], color=color, label=name)
    left.set(xscale="log", yscale="log", xlabel="base rate", ylabel="steps to the target")
    left.set_xticks(ticks := [0.003, 0.01, 0.03], labels=list(map(str, ticks)))
    left.set_xticks([], minor=True)
    right.axhline(TARGET, color="#666666", linewidth=0.8)
    right.set(yscale="log", xlabel="step", ylabel="loss, each at its best rate")
    right.legend(frameon=False)
    figure.suptitle("Two of eight layers have thirty times the noise")
    figure.savefig(path, dpi=110)
    print(f"picture: {path}")


def main(steps: int = 1200, seeds: int = 2, out: str | Path = "noisy_layers.png") -> None:
    """Try base rates a factor of the square root of two apart, with and without the rule."""
    found = {}
    for adaptive, first in ((False, 0.002), (True, 0.01)):
        grid = [first * 2 ** (k / 2) for k in range(7)]
        found[adaptive] = steps_to_target(adaptive, grid, steps, seeds)
    best = {adaptive: min(runs, key=lambda rate, runs=runs: runs[rate]) for adaptive, runs in found.items()}
    for adaptive, rate in best.items():
        grid = list(found[adaptive])
        name = "noise rule" if adaptive else "one rate for all"
        print(f"{name}: {found[adaptive][rate]:.0f} steps at its best base rate, {rate:.4f}")
        if rate in (grid[0], grid[-1]):
            raise SystemExit(f"{name}: the best rate {rate:.4f} is at the edge of those tried.")
    curves = {adaptive: train(rate, adaptive, steps, 0)[0] for adaptive, rate in best.items()}
    draw(Path(out), found, curves)
    rates = train(best[True], True, steps, seed=0)[1]
    assert rates is not None
    rates.settle()
    check_noise(rates)
    saved = found[False][best[False]] / found[True][best[True]]
    print(f"the rule needs {saved:.1f} times fewer steps")
    if not saved > 1.5:
        raise SystemExit(f"the rule needs {saved:.2f} times fewer steps, and not over 1.5.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("noisy_layers.png"), help="where the picture goes")
    main(out=parser.parse_args().out)
