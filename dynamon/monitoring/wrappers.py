"""Take off what other libraries put around a model and an optimizer: DDP, torch.compile, Lightning Fabric."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer


class ModelInPrecision:
    """A Fabric model that bypasses the strategy, for evaluations beside training.

    Inputs, outputs and autocast are those of the Fabric model. DDP's reducer and the check for ``fabric.backward`` take
    no part, since they would mistake an evaluation for a step of training.

    Args:
        wrapper: What ``fabric.setup`` returned.
    """

    def __init__(self, wrapper: Any) -> None:
        """Remember it."""
        self._wrapper, self._inner = wrapper, unwrapped_model(wrapper)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model as Fabric does."""
        return self._run(self._inner, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Give an attribute of the model; methods that Fabric takes for a forward pass run in its precision."""
        found = getattr(self._inner, name)
        return partial(self._run, found) if name in self._wrapper._forward_methods and callable(found) else found

    def _run(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        precision = self._wrapper._strategy.precision
        args, kwargs = precision.convert_input((args, kwargs))
        with precision.forward_context():
            found = function(*args, **kwargs)
        return precision.convert_output(found)


def unwrapped_model(model: nn.Module) -> nn.Module:
    """Return the module inside of all wrappers, whose names its parameters have."""
    *_, inner = _layers_of(model)
    return inner


def evaluated_model(model: nn.Module) -> Any:
    """Return what loss functions are called with beside training: the module, in Fabric's precision if it has one."""
    fabric = next((each for each in _layers_of(model) if _is_fabric(each)), None)
    return unwrapped_model(model) if fabric is None else ModelInPrecision(fabric)


def averages_gradients(model: nn.Module) -> bool:
    """Return whether DDP is among the wrappers, so that it averages gradients over processes."""
    return any(isinstance(each, DistributedDataParallel) for each in _layers_of(model))


def fabric_scaler(model: nn.Module) -> Any:
    """Return the gradient scaler of Fabric's precision; None where there is none."""
    fabric: Any = next((each for each in _layers_of(model) if _is_fabric(each)), None)
    return None if fabric is None else getattr(fabric._strategy.precision, "scaler", None)


def unwrapped_optimizer(optimizer: Any) -> Optimizer:
    """Return the optimizer inside of Fabric's wrapper, whose hooks see the steps."""
    while "_optimizer" in vars(optimizer) and "_strategy" in vars(optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """Yield a model, what it wraps, and so on."""
    while True:
        yield model
        inner: Any
        if _is_fabric(model):
            inner = model._forward_module
        elif isinstance(model, DistributedDataParallel):
            inner = model.module
        else:
            inner = getattr(model, "_orig_mod", None)  # of torch.compile
        if not isinstance(inner, nn.Module):
            return
        model = inner


def _is_fabric(model: nn.Module) -> bool:
    return "_forward_module" in model._modules and hasattr(model, "_strategy")
