"""The options of ``dynamon demo``. The demo itself needs Lightning, which the other commands do without."""

import argparse
import math
from pathlib import Path
from typing import Any

from dynamon.cli.demo_plan import SIZES
from dynamon.cli.refusal import refusing
from dynamon.monitoring.dynamics_monitor import PRESETS

SECONDS = 90.0  # that the demo takes, about


def add_parser(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "demo",
        help="train a small language model with everything on, and draw what was measured",
        description="Train a byte-level GPT of about one million parameters on the source of the Python standard "
        "library, with DynamicsMonitor and NoiseAdaptiveLR on. Nothing is downloaded. The demo times a step first and "
        f"trains for as long as fits into about {SECONDS:.0f} seconds; the options --steps, --size and --threads are "
        "taken as given. With --steps nothing is timed, and the same seed gives the same training.",
    )
    parser.add_argument("--no-adaptive", action="store_true", help="monitor only: do not change the learning rates")
    parser.add_argument("--steps", type=_positive_int, help="optimizer steps (default: as many as fit)")
    parser.add_argument(
        "--size",
        choices=list(SIZES),
        help="size of model and batches (default: the largest with which enough steps fit; with --steps: full)",
    )
    parser.add_argument(
        "--threads",
        type=_positive_int,
        help="threads of PyTorch (default: the number with which a step is fastest; with --steps: PyTorch's own)",
    )
    parser.add_argument(
        "--preset", choices=list(PRESETS), default="economy", help="what is measured how often (default: economy)"
    )
    parser.add_argument(
        "--budget",
        type=_positive_float,
        default=0.35,
        help="time of monitoring as a share of the time of training (default: 0.35)",
    )
    parser.add_argument(
        "--logdir",
        type=Path,
        default=Path("dynamon_demo"),
        help="folder for event files and picture (default: dynamon_demo)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data order (default: 0)")
    parser.add_argument("--accelerator", default="cpu", help="accelerator for Lightning: cpu, gpu, auto (default: cpu)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    with refusing(ImportError):
        from dynamon.cli import demo
    return demo.run(options)


def _positive_int(text: str) -> int:
    value = int(text) if text.lstrip("+-").isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, got {text}")
    return value


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return value
