"""The cost model of docs/scale.md against counts: floating-point operations by torch's own counter, products, readings.

Run ``python -m benchmarks.scale``; it takes a minute and counts, so a busy machine gives the same. The result goes to
``benchmarks/results/scale.json``.
"""

import warnings
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.environment import environment, parser, write
from dynamon.callbacks import SharpnessMonitor
from dynamon.cli.language_model import GPT, LanguageModel
from dynamon.curvature import HessianOperator
from dynamon.layers import describe_layers
from dynamon.quantities.weights import layer_spectra, weight_readings

SHAPES = {"width 64": (64, 2), "width 128": (128, 2), "width 256": (256, 2), "width 256, depth 6": (256, 6)}
_SAMPLES, _CONTEXT = 4, 64


def counted(function: Any) -> tuple[int, Any]:
    """Floating-point operations of a call, and what it returns."""
    with FlopCounterMode(display=False) as counter:
        result = function()
    return counter.get_total_flops(), result


def operations(width: int, depth: int) -> dict[str, Any]:
    """Counts for one model, in units of 2 x (parameters in matrices) x tokens, which is one forward pass."""
    torch.manual_seed(0)
    model = GPT(width, depth, 4, _CONTEXT)
    tokens = torch.randint(256, (_SAMPLES, _CONTEXT + 1))
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embedding" not in n)
    matrices -= model.position.weight.numel()
    unit = 2 * matrices * _SAMPLES * _CONTEXT

    def loss() -> Tensor:
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    with sdpa_kernel(SDPBackend.MATH):  # whose operations the counter sees as matrix products
        forward, _ = counted(loss)
        step, _ = counted(lambda: torch.autograd.grad(loss(), list(model.parameters())))
        graph, hessian = counted(lambda: HessianOperator(loss, dict(model.named_parameters())))
        product, _ = counted(lambda: hessian @ hessian.gradient)
    layers = describe_layers(model)
    before = {layer.name: layer.parameter.detach() - 1e-3 for layer in layers}
    weights, _ = counted(lambda: weight_readings(layers, before))
    cubes = sum(_gram(layer.parameter) for layer in layers if layer.parameter.ndim == 2)
    layer_spectra(layers)
    return {
        "matrix parameters": matrices,
        "forward": round(forward / unit, 2),
        "gradient": round(step / unit, 2),
        "graph of a gradient": round(graph / unit, 2),
        "Hessian product": round(product / unit, 2),
        "weight reading over its formula": round(weights / cubes, 2),
    }


def _gram(weight: Tensor) -> int:
    """Operations of one Gram matrix and one squaring of it: 2 k^2 (m + k), with k the smaller side."""
    small, large = min(weight.shape), max(weight.shape)
    return 2 * small**2 * (large + small)


def products(smallest: bool) -> dict[str, list[float]]:
    """Hessian products of each reading of a short run."""
    steps, width, depth = (6, 8, 1) if smallest else (50, 32, 2)
    warnings.simplefilter("ignore")
    found = {}
    for quantity in ("stability_ratio", "hessian", "trace", "density", "blocks", "subspace"):
        torch.manual_seed(0)
        monitor = SharpnessMonitor(every_n_steps=5, quantities=[quantity])
        rows = torch.randint(256, (8, 17), generator=torch.Generator().manual_seed(0))
        trainer = pl.Trainer(
            max_steps=steps,
            max_epochs=-1,
            accelerator="cpu",
            callbacks=[monitor],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = LanguageModel(steps, context=16)
        module.network = GPT(width, depth, 4, 16)
        trainer.fit(module, DataLoader(rows, 8))
        found[quantity] = monitor.history["sharpness/matvecs"].values.tolist()
    return found


def main() -> None:
    """Count, print and write."""
    options = parser("scale", __doc__).parse_args()
    shapes = {"width 16": (16, 1)} if options.smallest else SHAPES
    results: dict[str, Any] = {"operations": {}, "products": products(options.smallest)}
    for name, (width, depth) in shapes.items():
        results["operations"][name] = operations(width, depth)
        print(name, results["operations"][name], flush=True)
    for quantity, counts in results["products"].items():
        print(quantity, counts)
    write(options, "scale", {"environment": environment("scale"), "results": results})


if __name__ == "__main__":
    main()
