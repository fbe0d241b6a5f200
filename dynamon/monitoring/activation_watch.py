"""Watch one evaluation of a loss: hooks on outputs and their gradients, and calls of functions inside of modules."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dynamon.isolation.evaluations import full_precision
from dynamon.kernels import l2_norms
from dynamon.monitoring.activation_modules import HEADS, Passage, Watched, row_is_chosen, watched_modules
from dynamon.monitoring.attention_trace import AttentionTrace, stated_heads
from dynamon.quantities.activations import FLAT, entry_statistics, flat_part, flat_units, layer_states, measurable
from dynamon.quantities.attention import HeadStatistics, multihead_attention, scaled_dot_product

_CHANNELS_FIRST = ("Conv", "BatchNorm", "GroupNorm", "InstanceNorm")  # in names of classes with units in dimension 1
_MOST_CALLS = 16  # of a function in one call of a module that have a row each; later ones join the last
_ATTENTION = "scaled_dot_product_attention"


@dataclass
class Row:
    """Hold what is known of one output, on the device.

    Attributes:
        place: Where it belongs among all rows.
        entries: How many entries it had, in all calls.
        statistics: Of each call, see :func:`dynamon.quantities.activations.entry_statistics`.
        flat: By the number of units C, whether each was on its flat part in all calls, ``[C]``.
        graded: How many entries had a gradient.
        gradients: Euclidean norm of each gradient.
    """

    place: tuple[int, int]
    entries: int = 0
    statistics: list[Tensor] = field(default_factory=list)
    flat: dict[int, Tensor] = field(default_factory=dict)
    graded: int = 0
    gradients: list[Tensor] = field(default_factory=list)


class ActivationWatch:
    """Collects statistics of outputs and gradients in one evaluation of a loss and its backward pass.

    Everything is reduced at once where it arises, on its device: no output is kept. Hooks are there inside of
    :meth:`watching` only. A module that is called several times (shared
    weights, recurrence) has one row of all calls. Activation functions that are called as functions inside of a module
    have rows of their own, ``<module>.gelu``, and ``<module>.gelu_2`` for the second call in one pass. Outputs that a
    backward pass computes again (checkpointing) count once.

    Args:
        module: The model.
        patterns: Globs for modules; None for all.

    Attributes:
        rows: By name.
        heads: By name, statistics of each call; a column a head.
        passages: Input and output of each block.
        scale: What the loss was multiplied by before it was differentiated, 0-d; None where it was not.
    """

    def __init__(self, module: nn.Module, patterns: Sequence[str] | None = None) -> None:
        """Choose modules."""
        self._watched = watched_modules(module, patterns)
        self._modules = [one for one in module.modules() if id(one) in self._watched]
        self.rows: dict[str, Row] = {}
        self.heads: dict[str, list[HeadStatistics]] = {}
        self.places: dict[str, tuple[int, int]] = {}
        self.blocks: dict[tuple[int, int], str] = {}
        self.passages: dict[tuple[int, int], Passage] = {}
        self.scale: Tensor | None = None
        self._inside: list[_Frame] = []  # modules that are being called
        self._channels_first: dict[tuple[int, ...], bool] = {}  # by shape, as modules last gave them
        self._handles: list[Any] = []
        self._is_forward = True
        self._patterns = patterns
        self._attention = AttentionTrace()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Have hooks inside, and none afterwards."""
        with ExitStack() as stack:
            stack.callback(self._let_go)
            for module in self._modules:
                self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                # Before FSDP2's own, which gives the parameters back.
                hook = module.register_forward_hook(self._leave, with_kwargs=True, prepend=True)
                self._handles.append(hook)
            stack.enter_context(_Functions(self))
            yield

    def _let_go(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def loss(self, loss: Tensor) -> Tensor:
        """Take note of the loss: when its own gradient arrives a backward pass begins, perhaps another one."""
        if loss.requires_grad:
            self._handles.append(loss.register_hook(self._begin_backward))
        return loss

    def _begin_backward(self, gradient: Tensor) -> None:
        self._is_forward, self.scale = False, gradient.detach()
        for row in self.rows.values():
            row.graded, row.gradients = 0, []

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._is_forward:
            taken = measurable([args, kwargs])
            shape = () if taken is None else tuple(taken.shape)
            self._inside.append(_Frame(self._watched[id(module)], stated_heads(module), shape))

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        own = self._watched[id(module)]
        while self._is_forward and self._inside and self._inside.pop().own is not own:
            pass  # a call that raised an exception, which the module has caught
        if self._inside:
            self._inside[-1].latest = own.place
        value = measurable(output)
        if value is None:
            return
        if self._is_forward:
            self._note_layout(module, value)
        if own.is_measured:
            self._see(own.name, (own.place, 0), value)
            for layer, state in enumerate(layer_states(module, output)):
                self._see(f"{own.name}.layer.{layer}".lstrip("."), (own.place, 1), state)
        if not self._is_forward:
            return
        if own.stack is not None and own.is_measured and (taken := measurable([args, kwargs])) is not None:
            self.passages[own.stack], self.blocks[own.stack] = Passage.of(taken, value), own.name
        if isinstance(module, nn.MultiheadAttention) and row_is_chosen(own, HEADS, self._patterns):
            self._is_forward = False  # what is called to measure is not measured
            with full_precision():
                found = multihead_attention(module, args, kwargs)
            self._is_forward = True
            self._note_heads(f"{own.name}.{HEADS}".lstrip("."), own, found)

    def _note_layout(self, module: nn.Module, value: Tensor) -> None:
        """Remember where outputs of a shape have their units: activation functions keep it."""
        if type(module).__module__ != "torch.nn.modules.activation":
            kind = type(module).__name__
            if any(True for _ in module.parameters(recurse=False)) or "Norm" in kind:
                self._channels_first[tuple(value.shape)] = any(name in kind for name in _CHANNELS_FIRST)

    def _units(self, value: Tensor) -> int:
        """Return the dimension of the units."""
        known = self._channels_first.get(tuple(value.shape), value.ndim > 3)
        return 1 if known and value.ndim > 1 else -1

    def _see(self, name: str, place: tuple[int, int], value: Tensor) -> None:
        """Sum up an output, and have its gradient summed up."""
        row = self.rows.setdefault(name, Row(place))
        if self._is_forward:
            row.entries += value.numel()
            row.statistics.append(entry_statistics(value))
        if value.requires_grad:
            self._handles.append(value.register_hook(lambda gradient: self._note_gradient(row, gradient)))

    def _note_gradient(self, row: Row, gradient: Tensor) -> None:
        if gradient.layout is torch.strided:
            row.graded += gradient.numel()
            row.gradients.append(l2_norms([gradient.detach()])[0])

    def _note_heads(self, name: str, owner: Watched, found: HeadStatistics | None) -> None:
        if found is not None:
            self.heads.setdefault(name, []).append(found)
            self.places.setdefault(name, (owner.place, 0))

    def call(self, function: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Call a function, and measure it where it is called inside of a module."""
        frame = self._inside[-1] if self._inside and self._is_forward else None
        if frame is None:
            return func(*args, **kwargs)
        note: Callable[[], None] | None = None
        if function in FLAT and row_is_chosen(frame.own, function, self._patterns):
            found = self._call_activation(frame, function, func, args, kwargs)
        else:
            if function in (_ATTENTION, "softmax"):
                note = self._heads_of_call(frame, function, args, kwargs)
            found = func(*args, **kwargs)
        if function == _ATTENTION and note is not None:
            note()
        else:
            self._attention.follow(function, [*args, *kwargs.values()], found, note)
        return found

    def _heads_of_call(self, frame: "_Frame", function: str, args: Any, kwargs: Any) -> Callable[[], None] | None:
        """Measure a call of attention, or a softmax that may be part of it, and return what notes it."""
        if frame.own.is_function and len(self._inside) > 1:  # nn.Softmax, called by attention
            frame = self._inside[-2]
        if not row_is_chosen(frame.own, HEADS, self._patterns):
            return None
        with full_precision():
            if function == _ATTENTION:
                found = scaled_dot_product(args, kwargs)
            else:
                found = self._attention.softmax(args, kwargs, frame.heads(args[0] if args else kwargs["input"]))
        if found is None:
            return None
        return lambda: self._note_heads(frame.name(HEADS), frame.own, found)

    def _call_activation(self, frame: "_Frame", function: str, func: Any, args: Any, kwargs: Any) -> Any:
        own, flat = frame.own, None
        name, place = (own.name, (own.place, 0)) if own.is_function else (frame.name(function), (frame.latest, 1))
        if (value := measurable(args[0] if args else kwargs.get("input"))) is not None:  # before it is overwritten
            more = {key: value for key, value in kwargs.items() if key != "input"}
            with torch.no_grad():
                flat = flat_units(value.detach(), flat_part(function, args[1:], more), self._units(value))
        found = func(*args, **kwargs)
        if not own.is_function and (given := measurable(found)) is not None:
            self._see(name, place, given)
        if flat is not None:
            known = self.rows.setdefault(name, Row(place)).flat
            known[len(flat)] = flat if len(flat) not in known else known[len(flat)] & flat
        return found


class _Frame:
    """Hold a module that is being called, count what it calls, and know the place of the module it called last."""

    def __init__(self, own: Watched, heads: int, taken: tuple[int, ...]) -> None:
        self.own, self.latest, self._heads, self._taken = own, own.place, heads, taken
        self._calls: Counter[str] = Counter()

    def heads(self, logits: Any) -> int:
        """Return the number of heads in the first dimension of logits: as stated where that is samples x heads."""
        samples = self._taken[:2]  # whichever comes first
        return self._heads if isinstance(logits, Tensor) and len(logits) in [self._heads * n for n in samples] else 1

    def name(self, function: str) -> str:
        """Return the name of what the module calls now: the same in each call of the module."""
        self._calls[function] += 1
        count = min(self._calls[function], _MOST_CALLS)
        return f"{self.own.name}.{function}{f'_{count}' if count > 1 else ''}".lstrip(".")


class _Functions(TorchFunctionMode):
    """Hands calls of functions to a watch."""

    def __init__(self, watch: ActivationWatch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function."""
        return self._watch.call(getattr(func, "__name__", "").strip("_"), func, args, kwargs or {})
