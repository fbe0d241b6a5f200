"""Say at the start which layers are not measured."""

from collections.abc import Sequence

from torch.nn.parameter import is_lazy

from dynamon.layers import Layer, is_measurable, known_layers, select
from dynamon.monitoring.arguments import BadArgumentError
from dynamon.monitoring.messages import rank_zero_info, rank_zero_warn
from dynamon.monitoring.run_context import RunContext
from dynamon.monitoring.stated import say_roles
from dynamon.quantities.names import plain_name

_MEASURED = "Weights are measured in floating point of sixteen bits or more, and in complex64 and complex128."


def say_layers(run: RunContext, monitor: str, patterns: Sequence[str] | None) -> bool:
    """Say what is left out; return whether anything can be measured, now or when lazy layers have a shape.

    Args:
        run: The run.
        monitor: Who speaks.
        patterns: The globs for layers that were asked for.

    Raises:
        BadArgumentError: Where they match no layer.
    """
    lazy = [plain_name(name) for name, p in run.module.named_parameters() if is_lazy(p)]
    every = known_layers(run.module, run.stated.roles)
    say_roles(run.module, run.stated.roles)
    if not run.layers and not lazy:
        chosen = select(every, patterns)
        if not chosen:
            name = type(run.module).__name__
            raise BadArgumentError(f"layers={list(patterns or ())} matches no layer of {name}.")
        rank_zero_warn(f"{monitor} is off: {_dtypes(chosen)} cannot be measured. {_MEASURED}")
        return False
    if lazy:
        rank_zero_info(
            f"{monitor} leaves out {len(lazy)} layers without a shape so far, first {lazy[0]}. Lazy modules join with "
            "their first batch."
        )
    _say_left_out(every, monitor)
    return True


def _say_left_out(every: Sequence[Layer], monitor: str) -> None:
    """Say which layers no reading is of, and what share of training whole-model readings then cover."""
    layers = [layer for layer in every if not is_measurable(layer)]
    if not layers:
        return
    trained = sum(layer.size for layer in every if layer.parameter.requires_grad)
    missed = sum(layer.size for layer in layers if layer.parameter.requires_grad)
    covered = f" Whole-model readings are of {1 - missed / trained:.1%} of the trained parameters." if missed else ""
    rank_zero_info(
        f"{monitor} leaves out {len(layers)} layers in {_dtypes(layers)}, first {layers[0].name}. {_MEASURED}{covered}"
    )


def _dtypes(layers: Sequence[Layer]) -> str:
    return ", ".join(sorted({str(layer.parameter.dtype).removeprefix("torch.") for layer in layers}))
