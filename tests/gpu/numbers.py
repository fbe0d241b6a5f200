"""What is measured on the device, held against float64 on the CPU."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dynamon
from dynamon.curvature import HessianOperator
from dynamon.spectra import weight_spectrum
from tests.gpu.hazards import autocast
from tests.gpu.report import Check, Report, add, check
from tests.gpu.subjects import CLASSES, CONTEXT, DEVICE, TOKENS, Grouped, Recurrent, gpt, loss_of

PRODUCT = 1e-4  # most error of a product in float32, of its length


class Attention(nn.Module):
    """Causal attention and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.head = nn.Linear(64, 192), nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.all(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        return self.head(F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2).mean(1))


def _on_vectors(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(64, 64), *layers, nn.Linear(64, CLASSES))


def _convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 16, 3, 1, 1, groups=16),
        nn.GroupNorm(4, 16), nn.Tanh(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(256, CLASSES),
    )  # fmt: skip


class Mean(nn.Module):
    """A module on sequences, its mean through a head."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(1))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LSTM": (lambda: Recurrent(dropout=0.0), (16, 20, 8)),
    "GRU": (lambda: Recurrent(nn.GRU, 0.0), (16, 20, 8)),
    "RNN": (lambda: Recurrent(nn.RNN, 0.0), (16, 20, 8)),
    "attention": (Attention, (8, 64, 64)),
    "LayerNorm": (_on_vectors(nn.LayerNorm(64), nn.GELU()), (64, 64)),
    "RMSNorm": (_on_vectors(nn.RMSNorm(64), nn.SiLU()), (64, 64)),
    "grouped queries": (lambda: Mean(Grouped(64, 4, False)), (8, 32, 64)),
    "convolutions": (_convolutions, (16, 3, 32, 32)),
}
ARMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "TF32": {"tf32": True},
    "channels last": {"last": True},
    "bf16": {"cast": torch.bfloat16},
}


def product(network: nn.Module, x: Tensor, y: Tensor, cast: torch.dtype | None = None) -> tuple[Tensor, str]:
    """The Hessian times a fixed unit vector, in float64 on the CPU; and how it was taken."""
    with autocast(cast):
        operator = HessianOperator(lambda: loss_of(network, (x, y)), dict(network.named_parameters()))
        generator = torch.Generator().manual_seed(1)
        vector = torch.randn(operator.shape[0], generator=generator, dtype=torch.float64)
        found = operator @ (vector / vector.norm()).to(x.device, operator.dtype)
    return found.double().cpu(), operator.backend


@contextlib.contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Products, convolutions and recurrent layers of float32 in TensorFloat-32, or not."""
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = precision
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def compare_products(report: Report, kind: str) -> None:
    """One kind of layer, on the device in several ways."""
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    exact = make().double()
    x, y = torch.randn(shape).double(), torch.randint(CLASSES, shape[:1])
    true, _ = product(exact, x, y)
    for name, arm in ARMS.items():
        if arm.get("last") and len(shape) != 4:
            continue
        network = copy.deepcopy(exact).to(DEVICE, torch.float32)
        given = x.to(DEVICE, torch.float32)
        if arm.get("last"):
            network, given = (t.to(memory_format=torch.channels_last) for t in (network, given))
        with products_in("tf32" if arm.get("tf32") else "ieee"):
            found, backend = product(network, given, y.to(DEVICE), arm.get("cast"))
        error = float((found - true).norm() / true.norm())
        report.note(name, [float(f"{error:.3g}"), backend])
        if name == "float32":
            report.hold(f"{name}: error below {PRODUCT:g}", error < PRODUCT)
            report.hold(f"{name}: by double backward", backend == "double_backward")
        elif backend == "double_backward":
            most = 0.1 if name == "bf16" else 0.03
            report.hold(f"{name}: error below {most:.0%}", error < most)


for _kind in LAYERS:
    add(
        Check(
            f"Hessian products, {_kind}",
            "numbers",
            lambda report, kind=_kind: compare_products(report, kind),
            2.0,
            rank=9.0 if _kind in ("LSTM", "GRU") else 70.0,
        )
    )


@check("numbers", 6.0, rank=71)
def spectra_of_weights(report: Report) -> None:
    """Against float64."""
    for shape in ((768, 768), (3072, 768), (64, 147), (96, 1, 49)) if DEVICE == "cuda" else ((48, 32), (9, 1, 7)):
        weight = 0.02 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        exact = weight_spectrum(weight.double(), exact=True)
        for dtype in (torch.float32, torch.bfloat16):
            given = weight.to(dtype).float() if dtype == torch.bfloat16 else weight
            true = weight_spectrum(given.double(), exact=True) if dtype == torch.bfloat16 else exact
            found = weight_spectrum(weight.to(DEVICE, dtype))
            errors = {
                name: float((getattr(found, name).cpu() / getattr(true, name) - 1).abs().max())
                for name in ("sigma_max", "stable_rank", "effective_rank", "nuclear")
            }
            name = f"{list(shape)} {str(dtype).removeprefix('torch.')}"
            report.note(name, {key: float(f"{error:.2g}") for key, error in errors.items()})
            report.hold(f"{name}: sigma_max within 1e-4", errors["sigma_max"] < 1e-4)
            report.hold(f"{name}: others within 1 %", max(errors.values()) < 0.01)


@check("numbers", 5.0, rank=10)
def devices_agree(report: Report) -> None:
    """Every number of ``measure`` on the same weights and batch."""
    torch.manual_seed(0)
    network, tokens = gpt(), torch.randint(TOKENS, (8, CONTEXT + 1))
    found = {}
    for device, dtype in (("cpu", torch.float64), (DEVICE, torch.float32)):
        own = copy.deepcopy(network).to(device, dtype)
        found[dtype] = dynamon.measure(own, (tokens.to(device),), loss_fn=_loss)
    true, seen = found[torch.float64], found[torch.float32]
    off = {}
    for tag, value in true.items():
        if not isinstance(value, float) or not value or "residual" in tag or "upper" in tag:
            continue
        most = 0.03 if "hessian" in tag or "stability" in tag else 0.01
        if not abs(seen.get(tag, math.nan) / value - 1) <= most:
            off[tag] = [float(f"{value:.4g}"), float(f"{seen.get(tag, math.nan):.4g}")]
    report.note("tags", len(true))
    report.note("off", off)
    report.hold("all within 1 %, eigenvalues within 3 %, which they are computed to", not off)


def _loss(network: nn.Module, batch: Any) -> Tensor:
    tokens = batch[0]
    return F.cross_entropy(network(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
