"""Lanton under a Trainer, which accumulates, clips, schedules and resumes."""

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from dynamon.optim import Lanton
from dynamon.rates import NoiseAdaptiveRates
from tests.helpers import Classifier, batches, same_weights


class Observing(Classifier):
    """Lanton over the module itself; gradients are read before Lightning clips them."""

    def configure_optimizers(self):
        optimizer = Lanton(self, 0.05, rule=NoiseAdaptiveRates(warmup=2, group_by="all", beta2=0.9))
        return [optimizer], [{"scheduler": CosineAnnealingLR(optimizer, 16), "interval": "step"}]

    def on_before_optimizer_step(self, optimizer):
        optimizer.observe()


def lightning(folder, epochs, checkpoint=None, precision="32-true"):
    torch.manual_seed(0)
    module = Observing(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)))
    trainer = Trainer(
        max_epochs=epochs, default_root_dir=folder, accelerator="cpu", precision=precision, logger=False,
        gradient_clip_val=0.5, accumulate_grad_batches=2, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, batches(), ckpt_path=checkpoint)
    return module, trainer


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_in_lightning_with_a_schedule_clipping_accumulation_and_resume(tmp_path, precision):
    whole, trainer = lightning(tmp_path, 4, precision=precision)
    _, first = lightning(tmp_path, 2, precision=precision)
    first.save_checkpoint(tmp_path / "half.ckpt", weights_only=False)
    resumed, second = lightning(tmp_path, 4, tmp_path / "half.ckpt", precision)
    assert same_weights(whole, resumed)
    (optimizer,), (other,) = trainer.optimizers, second.optimizers
    assert optimizer.ratios == other.ratios and min(optimizer.ratios.values()) < 1
    assert optimizer.rates.rule.updates == 4 * 4 - 2  # 4 epochs of 4 steps; the first has no change, the last waits
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)
