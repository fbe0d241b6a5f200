"""Tell what strategies do with parameters and gradients, and where dynamon cannot follow them."""

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

# What FSDP2 (ModelParallelStrategy) does with parameters can be followed, what these do cannot.
_REFUSED = {
    "FSDP": "(FSDP1) flattens parameters, so that layers cannot be told apart: nothing is measured or steered. "
    "ModelParallelStrategy with fully_shard (FSDP2) shards a model of the same size, and dynamon works there.",
    "DeepSpeed": "owns gradients and optimizer states and shows neither: nothing is measured or steered. "
    "ModelParallelStrategy with fully_shard (FSDP2) shards a model of the same size, and dynamon works there.",
}


def strategy_reason(trainer: pl.Trainer) -> str | None:
    """Return why the parameters of a run cannot be told apart, by the class of its strategy or one it derives from."""
    strategy = type(trainer.strategy)
    for cls in strategy.__mro__:
        for word, reason in _REFUSED.items():
            if word in cls.__name__:
                return f"{strategy.__name__} {reason}"
    return None


def is_distributed(trainer: pl.Trainer) -> bool:
    """Return whether several processes measure together: under DDP, FSDP2 and tensor parallelism."""
    return trainer.world_size > 1 and isinstance(trainer.strategy, DDPStrategy | ModelParallelStrategy)


def averages_gradients(trainer: pl.Trainer) -> bool:
    """Return whether each of several processes has gradients of its own before they are averaged, as under DDP."""
    return trainer.world_size > 1 and isinstance(trainer.strategy, DDPStrategy)


def sums_gradients(trainer: pl.Trainer) -> bool:
    """Return whether gradients are summed over the processes in each backward pass, and kept in parts (FSDP2)."""
    return trainer.world_size > 1 and isinstance(trainer.strategy, ModelParallelStrategy)
