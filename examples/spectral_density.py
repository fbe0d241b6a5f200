"""The Hessian of a classifier: the data set the outliers, the width scales the bulk.

Networks with one hidden layer of several widths learn a mixture of overlapping Gaussians, once with few classes and
once with many. Stochastic Lanczos quadrature then gives the density of all eigenvalues of each Hessian. A few stand
far apart from the rest, one less than there are classes: the logits of a softmax matter only up to a constant that
all share. Their number does not depend on the width. What the width adds, almost 16 times as many parameters here, all
goes into the bulk, and there to zero: the share of the eigenvalues below a hundredth of the largest rises towards one
(Sagun et al., arXiv 1706.04454; Papyan, arXiv 1811.07062; Ghorbani et al., arXiv 1901.10159).

Takes about fifteen seconds; run ``python examples/spectral_density.py``. The picture goes to
``spectral_density.png``, or where ``--out`` says.
"""

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from dynamon.curvature import HessianOperator, SpectralDensity, spectral_density

Grid = dict[tuple[int, int], SpectralDensity]  # by classes and width
SMALL = 0.01  # of the largest eigenvalue


def gaussian_mixture(classes: int, samples: int = 1500, inputs: int = 16) -> tuple[Tensor, Tensor]:
    """Points around the centre of their class, and the classes; the clouds overlap."""
    generator = torch.Generator().manual_seed(0)
    centres = 1.5 * nn.functional.normalize(torch.randn(classes, inputs, generator=generator), dim=1)
    labels = torch.arange(samples) % classes
    return centres[labels] + torch.randn(samples, inputs, generator=generator), labels


def trained_density(classes: int, width: int, steps: int) -> SpectralDensity:
    """Train on all the data at once, then take the density of the training loss's Hessian."""
    data, labels = gaussian_mixture(classes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(data.shape[1], width), nn.ReLU(), nn.Linear(width, classes))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)

    def loss() -> Tensor:
        return nn.functional.cross_entropy(network(data), labels)

    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return spectral_density(HessianOperator(loss, network.parameters()), steps=60, num_vectors=3)


def share_small(density: SpectralDensity) -> float:
    """Share of the eigenvalues below a hundredth of the largest one, negative ones included."""
    return 1 - density.share_above(SMALL * float(density.nodes.max()))


def print_table(densities: Grid) -> None:
    """One line a network."""
    print("classes  width  eigenvalues  outliers  smallest outlier  bulk ends  share below 1 % of the largest")
    for (classes, width), density in densities.items():
        outliers = density.outliers
        smallest = f"{outliers[-1]:.3f}" if len(outliers) else "-"
        print(
            f"{classes:7d} {width:6d} {density.size:12d} {len(outliers):9d} {smallest:>17s} "
            f"{density.bulk_edge:10.3f} {share_small(density):31.3f}"
        )


def check(densities: Grid) -> None:
    """Compare outliers and bulk with what the papers say."""
    for (classes, width), density in densities.items():
        found = len(density.outliers)
        if found != classes - 1:
            raise SystemExit(f"{classes} classes, width {width}: {found} outliers and not {classes - 1}.")
    for (before, after), (first, second) in zip(pairwise(densities), pairwise(densities.values()), strict=True):
        if before[0] == after[0] and not share_small(first) < share_small(second):
            raise SystemExit(f"{before[0]} classes: from width {before[1]} to {after[1]} no more values near zero.")
    print("one outlier less than classes at every width, and with the width more of the bulk near zero")


def draw(path: Path, densities: Grid) -> None:
    """One panel a network: a row for each number of classes, a column for each width."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print('no picture: matplotlib is not installed (pip install "lightning-dynamon[demo]")')
        return
    rows, columns = (list(dict.fromkeys(key[i] for key in densities)) for i in (0, 1))
    figure = Figure(figsize=(4 * len(columns), 3 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True)
    for (classes, width), density in densities.items():
        axes = density.plot(panels[rows.index(classes), columns.index(width)])
        axes.set_title(f"{classes} classes, width {width}: {density.size} eigenvalues", fontsize="medium")
    figure.suptitle("Hessian eigenvalues: the data set the outliers, the width scales the bulk")
    figure.savefig(path, dpi=110)
    print(f"picture: {path}")


def main(
    classes: Sequence[int] = (10, 20),
    widths: Sequence[int] = (32, 128, 512),
    steps: int = 100,
    out: str | Path = "spectral_density.png",
) -> None:
    """Train each network, draw its density, then check outliers and bulk; widths go up."""
    densities = {(number, width): trained_density(number, width, steps) for number in classes for width in widths}
    print_table(densities)
    draw(Path(out), densities)
    check(densities)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("spectral_density.png"), help="where the picture goes")
    main(out=parser.parse_args().out)
