"""Measure every quantity once, for a checkpoint or a notebook."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynamon.curvature import HessianOperator, top_eigenvalues
from dynamon.curvature.operators.parameters import FlatParameters
from dynamon.distributed.ranks import Ranks
from dynamon.isolation.evaluations import full_precision
from dynamon.isolation.preserve import LossFn, preserve_state, training_loss
from dynamon.isolation.samples import count_samples
from dynamon.layers import Layer, describe_layers, is_measurable
from dynamon.monitoring.activation_meter import evaluate_watched
from dynamon.monitoring.activation_reading import read_activations
from dynamon.monitoring.activation_watch import ActivationWatch
from dynamon.norms import optimizer_family
from dynamon.norms.geometry import FAMILIES
from dynamon.optim import steering_of
from dynamon.quantities.entrywise import entrywise_readings
from dynamon.quantities.gradient_reader import GradientReader
from dynamon.quantities.weights import ENTRYWISE, FIELDS, FULL_SPECTRUM, layer_spectra, weight_readings
from dynamon.spectra.convolution import layer_convolution_bounds
from dynamon.stability import has_stability_condition, stability_operator, stability_scaling


def measure(
    module: nn.Module,
    batch: Any,
    *,
    loss_fn: LossFn | None = None,
    optimizer: Optimizer | None = None,
    certify: bool = True,
    tol: float = 1e-2,
    seed: int = 0,
    roles: Mapping[str, str] | None = None,
    geometry: str | None = None,
) -> dict[str, Any]:
    """Measure gradients, weights, sharpness and activations of a module on one batch.

    The module is left unchanged, including ``.grad``, and so are all random streams. It is measured in its present
    mode; call ``module.train()`` before for what training sees.

    Args:
        module: A LightningModule (its ``training_step`` gives the loss), or any module with ``loss_fn``.
        batch: A batch on the module's device.
        loss_fn: ``loss_fn(module, batch) -> scalar``.
        optimizer: Adds the stability ratio (SGD; Adam, AdamW and RMSprop with state) at the rates in force, layerwise
            steering included, and selects the dual norms; without it they are those of Adam. Gradients and sharpness
            then cover the parameters that it holds.
        certify: Take at least 20 Hessian products, which give an upper bound.
        tol: Relative tolerance of the eigenvalue.
        seed: Seed of dropout and of the solver's start.
        roles: Roles by glob, as ``overrides`` of :func:`dynamon.layers.describe_layers`.
        geometry: ``"sign"``, ``"euclidean"`` or ``"spectral"``, which selects the dual norms; by default told from the
            optimizer (:func:`dynamon.norms.optimizer_family`).

    Returns:
        Readings under the tags of the monitors: floats for scalars, ``{layer name: float}`` for per-layer quantities.
        An eigenvalue that did not converge is under ``..._unconverged`` instead. A layer that the loss does not depend
        on has NaN for its gradient. Noise needs two gradients and is not included. Gradients of outputs are those
        of a sample's loss where the number of samples can be told from the batch, else those of the loss.

    Raises:
        TypeError: If ``module``, ``loss_fn`` or ``optimizer`` is of the wrong type.
        FloatingPointError: If the loss or its curvature is not finite.
        ValueError: If no trainable parameter can be measured, ``optimizer`` holds none of them, or the loss is not a
            differentiable scalar.

    Cost: a gradient and one gradient graph, 20 to 40 Hessian products (twice with a stability ratio), two Gram
    iterations and the singular values of every matrix, Gram iterations at some hundred frequencies for each
    convolution. Memory: up to 41 vectors of the size of the parameters when certified.

    Example:
        >>> import torch
        >>> from dynamon import measure
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> inputs = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> found = measure(model, inputs, loss_fn=lambda module, batch: module(batch).square().mean())
        >>> round(found["sharpness/hessian_max"], 4)  # of inputs.T @ inputs
        4.0
        >>> sorted(found["weight/rms"])
        ['weight']
    """
    _check_types(module, loss_fn, optimizer)
    layers = [la for la in describe_layers(module, roles) if la.parameter.requires_grad and is_measurable(la)]
    if not layers:
        raise ValueError(f"{type(module).__name__} has no trainable parameter, so there is nothing to measure.")
    trained = layers
    if optimizer is not None:
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        trained = [layer for layer in layers if id(layer.parameter) in own]
        if not trained:
            raise ValueError(f"the optimizer holds no trainable parameter of {type(module).__name__}.")
    params = [layer.parameter for layer in trained]
    with torch.inference_mode(False), torch.enable_grad(), preserve_state(module, seed), ExitStack() as stack:
        activations = _activations(module, lambda: training_loss(module, batch, loss_fn), batch, params)
        operator = HessianOperator(lambda: training_loss(module, batch, loss_fn), params)
        stack.enter_context(full_precision())  # the loss keeps the autocast that it was given
        readings: dict[str, Any] = {"sharpness/probe_loss": float(operator.loss), **activations}
        readings |= _gradients(trained, operator, _family(optimizer, geometry))
        found = top_eigenvalues(operator, tol=tol, certify=certify, seed=seed)
        readings |= found.readings("sharpness/hessian_max")
        readings |= {"sharpness/hessian_min": found.smallest, "sharpness/matvecs": float(found.matvecs)}
        if optimizer is not None and has_stability_condition(optimizer):
            rates = steering_of(optimizer)
            in_force = {} if rates is None else rates.ratios
            factors = [in_force.get(layer.name, 1.0) for layer in trained]
            scaled = stability_operator(operator, stability_scaling(optimizer, params, factors))
            ratio = top_eigenvalues(scaled, tol=tol, certify=certify, seed=seed)
            readings |= ratio.readings("sharpness/stability_ratio")
            readings["sharpness/matvecs"] += float(ratio.matvecs)
    with full_precision():
        return readings | _weights(layers)


def _check_types(module: Any, loss_fn: Any, optimizer: Any) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}.")
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of module and batch, got {type(loss_fn).__name__}.")
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}.")


def _family(optimizer: Optimizer | None, geometry: str | None) -> str:
    if optimizer is not None:
        return optimizer_family(optimizer, geometry)
    if geometry is not None and geometry not in FAMILIES:
        raise ValueError(f"geometry must be one of {', '.join(FAMILIES)}, got {geometry!r}.")
    return geometry or "sign"


def _gradients(layers: list[Layer], operator: HessianOperator, family: str) -> dict[str, Any]:
    """Read norms of the gradient that the Hessian's graph already has; ``.grad`` is replaced and restored."""
    params = [layer.parameter for layer in layers]
    kept = [p.grad for p in params]
    try:
        gradients = operator.parameters.split(operator.gradient)
        for p, g, is_there in zip(params, gradients, operator.has_gradient, strict=True):
            p.grad = g.to(p.dtype) if is_there else None
        found = GradientReader(layers, family).read().wait()
    finally:
        for p, own in zip(params, kept, strict=True):
            p.grad = own
    names = [layer.name for layer in layers]
    return {
        "gradient/norm": float((found.l2[found.present] ** 2).sum() ** 0.5),
        "gradient/norm_dual": float(found.dual[found.present].sum()),
        "gradient/nonfinite": float(found.nonfinite.sum()),
        "gradient/l2": dict(zip(names, found.l2.tolist(), strict=True)),
        "gradient/dual": dict(zip(names, found.dual.tolist(), strict=True)),
    }


def _activations(
    module: nn.Module, loss_fn: Callable[[], Tensor], batch: Any, params: Sequence[Tensor]
) -> dict[str, Any]:
    """Evaluate the loss once more, and read what modules return."""
    watch, device = ActivationWatch(module), params[0].device
    evaluate_watched(watch, loss_fn, FlatParameters.of(params))
    tables = read_activations(watch, Ranks(device, alone=True), device, count_samples(batch) or 1)
    return {tag: _known(list(names), torch.from_numpy(values)) for tag, (values, names) in tables.items()}


def _weights(layers: list[Layer]) -> dict[str, Any]:
    found = weight_readings(layers)
    names = [layer.name for layer in layers]
    fields = {tag: field for tag, field in FIELDS.items() if not tag.startswith("update/")}  # no step was taken
    known = {tag: _known(names, getattr(found, field)) for tag, field in fields.items()}
    rows = entrywise_readings(layers, ENTRYWISE)
    known |= {one.tag: _known(names, row) for one, row in zip(ENTRYWISE, rows, strict=True)}
    return known | _spectra(layers) | _convolutions(layers)


def _spectra(layers: list[Layer]) -> dict[str, Any]:
    """Measure what needs all singular values, in float64."""
    names, spectra = layer_spectra(layers, exact=True)
    if spectra is None:
        return {}
    return {f"spectrum/{q}": _known(names, getattr(spectra, q)) for q in FULL_SPECTRUM}


def _convolutions(layers: list[Layer]) -> dict[str, Any]:
    """Bound the norms of convolutions as maps of inputs of any size."""
    names, bounds = layer_convolution_bounds(layers)
    sides = zip(("lower", "upper"), bounds, strict=True)
    return {f"spectrum/convolution_{side}": _known(names, values) for side, values in sides} if names else {}


def _known(names: list[str], values: Tensor) -> dict[str, float]:
    """Map names to values, without layers that have no such reading."""
    return {n: v for n, v in zip(names, values.tolist(), strict=True) if v == v}
