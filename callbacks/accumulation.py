"""Where in an accumulation window a batch stands, and where independent gradients come from."""

import lightning.pytorch as pl

from dynamon.callbacks.decisions import averages_gradients, is_sharded_run


def half_window(trainer: pl.Trainer) -> float | None:
    """The share of the window's batches that the gradients hold, at its middle; None at every other batch.

    To be asked after a backward pass under automatic optimisation. The last window of an epoch may be shorter.
    """
    batch, wanted = trainer.fit_loop.epoch_loop.batch_idx, trainer.accumulate_grad_batches
    begin = batch // wanted * wanted
    length = int(min(wanted, trainer.num_training_batches - begin))
    done = batch - begin + 1
    return done / length if done == length // 2 else None


def window_is_whole(trainer: pl.Trainer) -> bool:
    """Whether the step about to be taken ends a window of the length that :func:`half_window` took it for.

    At the end of an epoch of unknown length it does not, and what was kept of the window is no half of it.
    """
    batch, wanted = trainer.fit_loop.epoch_loop.batch_idx, trainer.accumulate_grad_batches
    begin = batch // wanted * wanted
    return batch - begin + 1 == int(min(wanted, trainer.num_training_batches - begin))


def has_windows(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
    """Whether the gradients of what counts as one batch are accumulated over several, by Lightning.

    Those of one process, or under FSDP2 of all of them, which are summed in every backward pass.
    """
    whole = trainer.world_size == 1 or is_sharded_run(trainer)
    return trainer.accumulate_grad_batches > 1 and whole and module.automatic_optimization


def begins_window(trainer: pl.Trainer) -> bool:
    """Whether a batch is the first of those whose gradients are accumulated; to be asked at its start."""
    return trainer.fit_loop.epoch_loop.batch_idx % trainer.accumulate_grad_batches == 0


def compares_ranks(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
    """Whether independent gradients are those of the processes; by hand it is not known which ones belong together."""
    return averages_gradients(trainer) and module.automatic_optimization


def scale_before_step(trainer: pl.Trainer) -> float:
    """What brings gradients to their true size before the precision plugin has unscaled them."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else 1.0 / float(scaler.get_scale())
