"""LANTON: steps of a fixed size in each layer's norm, smaller where the layer's gradient is noisy."""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynamon.distributed.dtensor import to_local, to_local_as
from dynamon.kernels import step_polar_factor
from dynamon.layers import ROLES, Layer, describe_layers
from dynamon.optim.assignment import parameters_of
from dynamon.optim.directions import GEOMETRY, SCALINGS, Item, directions, update_averages
from dynamon.optim.layerwise import LayerwiseRates
from dynamon.quantities.gradient_reader import GradientReader
from dynamon.quantities.scales import Scale
from dynamon.quantities.windows import Window
from dynamon.rates import NoiseAdaptiveRates, Rule

RADII = {"hidden": 1.0, "conv": 4.0, "embedding": 0.5, "head": 16.0, "vector": 0.125}
_OWN = "lanton"  # key of what a copy holds beside an optimizer's state and groups
_OF_CONV = ("conv", "vector")  # what the weight of a convolution can be


class Lanton(Optimizer):
    r"""One optimizer for all parameters of a model: each layer steps in its own norm, noisy layers less far.

    With G the gradient, ``lmo`` the direction of the largest decrease in the unit ball of the layer's norm
    (:mod:`dynamon.norms`), and r the ratio of its rate:

    .. math:: B \leftarrow \beta_1 B + (1 - \beta_1) G, \qquad
              W \leftarrow (1 - \eta r \lambda) W + \eta\, r\, \mathrm{radius}\; \mathrm{lmo}(B).

    =========  ==================================================================  ======
    role       ``lmo(B)``                                                          radius
    =========  ==================================================================  ======
    hidden     minus the polar factor :math:`U V^\top` times ``sqrt(out / in)``    1
    conv       the same for one patch of the input, divided by ``prod(kernel)``    4
               where ``out`` and ``in`` are channels
    embedding  ``-sign(B)``                                                        0.5
    head       ``-sign(B) / in``                                                   16
    vector     ``-B / rms(B)``                                                     0.125
    =========  ==================================================================  ======

    Tensors that hold several matrices (:meth:`dynamon.layers.Layer.matrices`: packed queries, keys and values, gates,
    experts, groups of a convolution) are handled matrix by matrix. A zero gradient gives a zero direction. With
    ``noise_adaptive=False`` all r are 1: the same optimizer without feedback, in the spirit of Muon and Scion, and
    the baseline to compare with. It can be steered by :class:`LayerwiseRates`; with ``noise_adaptive=True`` that is
    refused.

    "LANTON-style": no code of the paper is public. From it come the average, the directions, and the rule with noise
    as the change between successive gradients in the dual norm. It leaves open, and here: the size of alpha and
    beta2, whether H is corrected for its start (it is) and divided by what the shape alone gives (it is), groups of
    comparison (by role), how often H is read (every step): all in :class:`dynamon.rates.NoiseAdaptiveRates`; the radii
    and the scaling of the polar factor (``radii``, ``scaling``); how it is computed (``polar``); whether the ratio
    multiplies weight decay (it does); gradients before or after clipping (:meth:`observe`); head and embedding as
    one group with plain signs (paper), or each with its own scale (here).

    In Lightning return ``Lanton(self, lr=...)`` from ``configure_optimizers``. If gradients are clipped, let the rule
    read them before::

        def on_before_optimizer_step(self, optimizer):
            optimizer.observe()

    Args:
        params_or_model: A module: its trainable parameters, with roles from
            :func:`dynamon.layers.describe_layers`. Or what any torch optimizer takes: parameters, named parameters or
            groups; or a mapping from names to parameters. Without a module the role is the group's ``"role"`` (less
            than two dimensions is always a vector), else inferred from the shape: at most one dimension larger than
            one: vector; two dimensions: hidden; three to five: conv; more: hidden, a stack of matrices. Embeddings,
            heads and stacked experts need the name of their role.
        lr: Base learning rate: how far a layer of radius 1 moves in its norm. A tensor is read on the host.
        momentum: :math:`\beta_1`, in [0, 1).
        nesterov: Take the direction from :math:`\beta_1 B + (1 - \beta_1) G` after the average is updated.
        weight_decay: :math:`\lambda`, decoupled.
        radii: Step size by role relative to ``lr``; missing roles keep the default. Norms of different roles are not
            comparable. The defaults come from a coordinate search over small GPTs, an LSTM and CNNs of several widths
            and lengths, by factors of two (``benchmarks/radii.py``); at other sizes tune these first.
        polar: Polar factors of ``[n, out, in]``; zero matrices must not fail. By default
            :func:`dynamon.kernels.step_polar_factor`: five steps, in bfloat16 on GPUs with units for it, in float32
            elsewhere. ``polar_factor`` is float32 everywhere, ``functools.partial(polar_factor, steps=8)`` more
            accurate.
        scaling: Factor on polar factors by ``(outputs, inputs)`` of the matrix: ``"rms_to_rms"`` (as above),
            ``"original"`` or ``"match_rms_adamw"`` (as in ``torch.optim.Muon``; no division for kernels), or a
            function.
        noise_adaptive: Whether rates follow the noise.
        rule: Sets the ratios; ``NoiseAdaptiveRates()`` by default. Not shared with another optimizer.
        lag: 1: readings of a step act at the next, so that nothing waits for the device. 0: they act at once.
        model: Gives roles and names if ``params_or_model`` holds parameters or groups.
        roles: Roles by glob, as ``overrides`` of :func:`dynamon.layers.describe_layers`; needs a module.

    Groups may have their own ``lr``, ``momentum``, ``nesterov``, ``weight_decay``, ``radius`` and ``role``.

    Attributes:
        rates: The :class:`LayerwiseRates` that sets the ratios, or None.

    Raises:
        TypeError: If ``rule``, ``polar``, ``scaling`` or ``model`` is of the wrong type.
        ValueError: If an argument is out of range, a parameter is complex, or a role does not exist.

    Averages have the parameter's dtype, polar factors are returned in at least float32; bfloat16 parameters work.

    Cost of a step: the average by one foreach call; one batched call of ``polar`` for all matrices of a shape
    (:func:`dynamon.kernels.polar_factor`: 5 steps of 3 products), of which up to 2^26 entries are copied at a time;
    for GPT-2 124M fewer than 130 device calls; no host synchronisation on a GPU. Memory: one buffer per parameter. The
    noise costs what :class:`dynamon.quantities.gradient_reader.GradientReader` does: two nuclear norms per matrix and
    one stored gradient.

    Sharded parameters (FSDP2, DTensor) work: a step gathers the average of every matrix and vector, one all-gather
    each, and each process repeats the same polar factors. For the noise each gradient is gathered on one process, and
    shards are stored; the state holds whole gradients. Create the optimizer after ``fully_shard``.

    ``torch.distributed.checkpoint.state_dict.get_optimizer_state_dict`` returns averages and groups only. Save
    ``rates.state_dict()`` beside it, as one object (bytes of ``torch.save``), and load it into ``rates`` afterwards.

    Example:
        >>> import torch
        >>> from dynamon.optim import Lanton
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> optimizer = Lanton(model, lr=0.02, noise_adaptive=False)
        >>> [(layer.name, layer.role) for layer in optimizer.layers]
        [('0.weight', 'hidden'), ('0.bias', 'vector'), ('2.weight', 'head'), ('2.bias', 'vector')]
        >>> before = model[2].bias.detach().clone()
        >>> model(torch.ones(3, 4)).square().sum().backward()
        >>> optimizer.step()
        >>> round((model[2].bias - before).square().mean().sqrt().item(), 6)  # lr times the radius, in the norm "rms"
        0.0025

    References: Hao et al. (LANTON), arXiv 2510.14009; Pethick et al. (Scion), arXiv 2502.07529; Bernstein and
    Newhouse, arXiv 2409.20325; Amsel et al. (polar factors), arXiv 2505.16932.
    """

    dynamon_geometry = GEOMETRY

    def __init__(
        self,
        params_or_model: Any,
        lr: float | Tensor,
        momentum: float = 0.95,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        *,
        radii: Mapping[str, float] | None = None,
        polar: Callable[[Tensor], Tensor] = step_polar_factor,
        scaling: str | Callable[[int, int], float] = "rms_to_rms",
        noise_adaptive: bool = True,
        rule: Rule | None = None,
        lag: int = 1,
        model: nn.Module | None = None,
        roles: Mapping[str, str] | None = None,
    ) -> None:
        """Describe the parameters, and attach the rule if rates follow the noise."""
        _check_types(rule, polar, scaling, model)
        if isinstance(params_or_model, nn.Module):
            model = params_or_model
            params_or_model = [p for p in model.parameters() if p.requires_grad and p.numel()]
        elif isinstance(params_or_model, Mapping):
            params_or_model = list(params_or_model.values())
        if roles is not None and model is None:
            raise ValueError("roles are globs on the names of a module: pass it as model.")
        if rule is not None and not noise_adaptive:
            raise ValueError("a rule sets rates only with noise_adaptive=True.")
        if isinstance(scaling, str) and scaling not in SCALINGS:
            raise ValueError(f"scaling must be one of {', '.join(SCALINGS)} or a function, got {scaling!r}.")
        self.radii = {**RADII, **_checked_radii(radii or {})}
        self.polar, self.scaling = polar, scaling
        self.rates: LayerwiseRates | None = None
        self._model, self._roles = model, roles
        self._layers: dict[Tensor, tuple[int, Layer]] = {}
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "radius": None,
            "role": None,
        }
        super().__init__(params_or_model, defaults)
        if noise_adaptive:
            self.rates = _OwnRates(self, rule or NoiseAdaptiveRates(), model, lag)

    @property
    def layers(self) -> list[Layer]:
        """The layers, in the order of the groups they came with."""
        return [layer for _, layer in self._layers.values()]

    @property
    def ratios(self) -> dict[str, float]:
        """The ratio of each layer by name; 1 where rates do not follow the noise."""
        return {layer.name: 1.0 for layer in self.layers} if self.rates is None else self.rates.ratios

    def observe(self, scale: Scale = 1.0, key: Hashable = None, window: Window | None = None) -> None:
        """Read the gradients now, before they are clipped, for the step that follows.

        Args:
            scale: Factor on the gradients, if an AMP scaler has not unscaled them yet.
            key: Identifies the step, so that several callers read it once.
            window: What the gradients were accumulated over, as for :meth:`LayerwiseRates.observe`.
        """
        if self.rates is not None:
            self.rates.observe(scale, key, window=window)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, also during a run; the state of the others is kept.

        Args:
            param_group: ``params`` and, where they differ, ``lr``, ``momentum``, ``nesterov``, ``weight_decay``,
                ``radius`` and ``role``.

        Raises:
            ValueError: If a value is out of range, a parameter is complex, or a role does not exist.
        """
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
            found = self._describe(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise
        for layer in found:
            self._layers[layer.parameter] = (len(self._layers), layer)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; parameters without a gradient are not changed.

        Args:
            closure: Evaluates the loss again and returns it.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: If a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # In the order of joining, not of the groups: steering regroups, and must not change a batch.
        items = sorted(self._items(), key=lambda item: item.index)
        if items:
            self._update(items, update_averages(items))
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return state and groups, and under ``"rates"`` the rule's state and the previous gradient.

        It loads under ``torch.load(weights_only=True)``. A resumed run is bitwise equal to an uninterrupted one.
        """
        state = super().state_dict()
        if self.rates is not None:
            state["rates"] = self.rates.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state; without ``"rates"`` in it the rule keeps its own."""
        own = {key: value for key, value in state_dict.items() if key != "rates"}
        super().load_state_dict(own)
        if self.rates is not None and "rates" in state_dict:
            self.rates.load_state_dict(state_dict["rates"])

    def __getstate__(self) -> dict[str, Any]:
        """Return everything but the hooks, for copies and pickles; the rule is included."""
        own = {name: getattr(self, name) for name in ("radii", "polar", "scaling", "_model", "_roles", "layers")}
        if self.rates is not None:
            # A copy of the rule starts anew, and loads the state of this one.
            own["rates"] = copy(self.rates.rule), self.rates.lag, self.rates.apply, self.rates.state_dict()
        return {**super().__getstate__(), _OWN: own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, or only state and groups, as :meth:`load_state_dict` asks for."""
        super().__setstate__({key: value for key, value in state.items() if key != _OWN})
        if _OWN not in state:
            return
        own = dict(state[_OWN])
        layers, rates = own.pop("layers"), own.pop("rates", None)
        self.__dict__.update(own)
        self._layers = {layer.parameter: (place, layer) for place, layer in enumerate(layers)}
        self.rates = None
        if rates is not None:
            rule, lag, applies, learned = rates
            self.rates = _OwnRates(self, rule, self._model, lag)
            self.rates.apply = applies
            self.rates.load_state_dict(learned)

    def _describe(self, group: Mapping[str, Any]) -> list[Layer]:
        """Describe the parameters of a new group from the model, else by the group's role or their shapes."""
        members, role = group["params"], group["role"]
        known = {} if self._model is None else self._known(members, role)
        first = len(self._layers)
        names = group.get("param_names") or [f"parameters.{first + i}" for i in range(len(members))]
        return [
            known[parameter] if parameter in known else _plain_layer(name, parameter, role)
            for name, parameter in zip(names, members, strict=True)
            if parameter.numel()
        ]

    def _known(self, members: Sequence[Tensor], role: str | None) -> dict[Tensor, Layer]:
        """Describe the model's layers, those of a group with the group's role where it fits."""
        assert self._model is not None
        layers = describe_layers(self._model, self._roles)
        if role is not None:
            own = {id(p) for p in members if p.ndim >= 2}
            fitting = [la for la in layers if id(la.parameter) in own and (la.conv is None or role in _OF_CONV)]
            layers = describe_layers(self._model, {**(self._roles or {}), **{la.name: role for la in fitting}})
        return {layer.parameter: layer for layer in layers}

    def _items(self) -> Iterable[Item]:
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None or parameter not in self._layers:
                    continue
                place, layer = self._layers[parameter]
                if gradient.is_sparse:
                    raise RuntimeError(
                        f"Lanton needs dense gradients, and that of {layer.name} is sparse; use sparse=False."
                    )
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                own = to_local_as(gradient.detach(), parameter).to(parameter.dtype)
                yield Item(layer, place, group, to_local(parameter.detach()), own, to_local(state["momentum_buffer"]))

    def _update(self, items: Sequence[Item], averages: Sequence[Tensor]) -> None:
        steepest = directions(items, averages, self.polar, self.scaling)
        rates = [float(item.group["lr"]) for item in items]
        decayed = [(item, rate) for item, rate in zip(items, rates, strict=True) if item.group["weight_decay"]]
        if decayed:
            kept = [1 - rate * item.group["weight_decay"] for item, rate in decayed]
            torch._foreach_mul_([item.weight for item, _ in decayed], kept)
        # A factor rounded to bfloat16 would be off by up to 0.4 % for good.
        steps = [direction.to(torch.promote_types(direction.dtype, torch.float32)) for direction, _ in steepest]
        factors = [
            rate * self._radius(item) * factor for rate, item, (_, factor) in zip(rates, items, steepest, strict=True)
        ]
        torch._foreach_mul_(steps, factors)
        torch._foreach_add_([item.weight for item in items], steps)

    def _radius(self, item: Item) -> float:
        own = item.group["radius"]
        return float(self.radii[item.layer.role] if own is None else own)


class _OwnRates(LayerwiseRates):
    """Lets a :class:`Lanton` steer itself: the layers are those that the optimizer knows."""

    optimizer: Lanton

    def __init__(self, optimizer: Lanton, rule: Rule, model: nn.Module | None, lag: int) -> None:
        super().__init__(
            optimizer, rule, _Listed(optimizer.layers) if model is None else model, lag=lag, max_groups=None
        )

    def _attach(self) -> None:
        self._held, self._lazy = parameters_of(self.optimizer), []
        if not self._checked:
            self.rule.check(describe_layers(self.model))
            self._checked = True
        self.layers = self.optimizer.layers
        self.reader = GradientReader(self.layers, self._family)
        self._start_rule()


class _Listed(nn.Module):
    """Lists layers that came without a module, for a rule that checks names."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self._named = [(layer.name, layer.parameter) for layer in layers]

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        return iter(self._named)


def _plain_layer(name: str, parameter: Tensor, role: str | None) -> Layer:
    """Describe a parameter by its shape, and by its role if that is given."""
    dims = parameter.ndim
    if role is None:
        flat = dims < 2 or sum(side > 1 for side in parameter.shape) <= 1
        role = "vector" if flat else "conv" if 3 <= dims <= 5 else "hidden"
    role = role if dims >= 2 else "vector"
    stacked = dims > 2 and role not in ("conv", "vector")
    blocks = math.prod(parameter.shape[:-2]) if stacked else 1
    return Layer(name, role, parameter, rows_are_tokens=role == "embedding", blocks=blocks)


def _check_types(rule: Any, polar: Any, scaling: Any, model: Any) -> None:
    if rule is not None and not isinstance(rule, Rule):
        raise TypeError(f"rule must be a dynamon.rates.Rule, got {type(rule).__name__}.")
    if not callable(polar):
        raise TypeError(f"polar must be a function of matrices, got {type(polar).__name__}.")
    if not isinstance(scaling, str) and not callable(scaling):
        raise TypeError(f"scaling must be a name or a function, got {type(scaling).__name__}.")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")


def _checked_radii(radii: Mapping[str, float]) -> Mapping[str, float]:
    for role, radius in radii.items():
        if role not in ROLES:
            raise ValueError(f"unknown role {role!r} in radii; choose from {', '.join(ROLES)}.")
        if not 0 < radius < math.inf:
            raise ValueError(f"the radius of {role!r} must be positive and finite, got {radius}.")
    return radii


def _check_group(group: Mapping[str, Any]) -> None:
    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise ValueError(f"lr as a tensor must have one entry, got {tuple(group['lr'].shape)}.")
    for name in ("lr", "weight_decay"):
        if not 0 <= float(group[name]) < math.inf:
            raise ValueError(f"{name} must be zero or positive, got {group[name]}.")
    if not 0 <= group["momentum"] < 1:
        raise ValueError(f"momentum must lie in [0, 1), got {group['momentum']}.")
    if group["radius"] is not None and not 0 < group["radius"] < math.inf:
        raise ValueError(f"radius must be positive and finite, got {group['radius']}.")
    if group["role"] is not None and group["role"] not in ROLES:
        raise ValueError(f"unknown role {group['role']!r}; choose one of {', '.join(ROLES)}.")
    if any(not p.is_floating_point() for p in group["params"]):
        raise ValueError("Lanton takes real floating parameters only; give complex ones as torch.view_as_real.")
