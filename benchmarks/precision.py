"""What weights in bfloat16 lose of their updates, and what that costs: one small GPT, two precisions, two rates.

Run ``python -m benchmarks.precision`` from the repository root. It writes ``benchmarks/results/precision.json``,
which ``docs/precision.md`` shows. All runs see the same batches and begin at the same weights, rounded to
bfloat16 in the one precision. The loss is that of batches that none of them was trained on.
"""

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.environment import environment, parser, write
from dynamon.callbacks import WeightMonitor
from dynamon.cli.demo_data import standard_library_text, training_batches, validation_batches
from dynamon.cli.language_model import GPT
from dynamon.health import findings
from dynamon.runs.history import RunData

BATCH, CONTEXT = 16, 64
RATES = (3e-4, 3e-3)
PRECISIONS = ("32-true", "bf16-true")


class Model(pl.LightningModule):
    """A GPT under AdamW at a constant rate, after a warm-up of a tenth of the run."""

    def __init__(self, width: int, rate: float, steps: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = GPT(width=width, depth=3, context=CONTEXT)
        self.rate, self.warm_up = rate, max(steps // 10, 1)

    def loss_of(self, batch: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of a batch."""
        return F.cross_entropy(self.network(batch[:, :-1]).flatten(0, 1).float(), batch[:, 1:].flatten())

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        """Return the loss."""
        return self.loss_of(batch)

    def configure_optimizers(self) -> Any:
        """AdamW with decay of all weights."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.rate, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / self.warm_up))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def run(precision: str, rate: float, width: int, steps: int, every: int) -> dict[str, Any]:
    """Train once and return what the table shows."""
    texts = standard_library_text()
    module, monitor = Model(width, rate, steps), WeightMonitor(every_n_steps=every)
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer = pl.Trainer(
        accelerator="cpu",
        precision=precision,  # type: ignore[arg-type]
        max_steps=steps,
        callbacks=[monitor],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, training_batches(texts[0], BATCH, CONTEXT, steps, 0))
    with torch.no_grad():
        held_out = [float(module.loss_of(batch)) for batch in validation_batches(texts[1], BATCH, CONTEXT, 20)]
    history = monitor.history
    layers = history["precision/update_lost"].layers or ()
    kinds = {"matrices": [".norm" not in f".{n}" and "_norm" not in n for n in layers]}
    kinds["gains"] = [not matrix for matrix in kinds["matrices"]]
    after = history["precision/update_lost"].steps >= module.warm_up

    def middle(tag: str, kind: str) -> float:
        return float(f"{np.nanmedian(history[tag].values[after][:, np.array(kinds[kind])]):.3g}")

    moved = {n: float((p.float() != start[n].to(p.dtype).float()).float().mean()) for n, p in module.named_parameters()}
    return {
        "loss": float(f"{np.mean(held_out):.4g}"),
        "decay lost": middle("precision/decay_lost", "matrices"),
        "kinds": {
            kind: {
                "lost": middle("precision/update_lost", kind),
                "size": middle("precision/update_size", kind),
                "moved at all": float(
                    f"{np.median([moved[n] for n, own in zip(layers, flags, strict=True) if own]):.3g}"
                ),
            }
            for kind, flags in kinds.items()
        },
        "findings": {
            one.rule: len(one.layers) for one in findings(RunData.of(history)) if one.rule.startswith("precision/")
        },
        "layers": len(layers),
    }


def main() -> None:
    """Run all combinations."""
    options = parser("precision", __doc__).parse_args()
    width, steps, every, rates = (16, 6, 2, RATES[:1]) if options.smallest else (64, 300, 10, RATES)
    results = []
    for rate in rates:
        for precision in PRECISIONS:
            results.append({"precision": precision, "rate": rate, **run(precision, rate, width, steps, every)})
            print(results[-1], flush=True)
    size = sum(p.numel() for p in GPT(width=width, depth=3, context=CONTEXT).parameters())
    write(
        options,
        "precision",
        {"environment": environment("precision", steps=steps, parameters=size), "results": results},
    )


if __name__ == "__main__":
    main()
