"""Parameters as one flat vector, shared by all operators of a loss."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from dynamon.curvature.operators.vector_space import VectorSpace
from dynamon.isolation.equality import clone_tensors
from dynamon.isolation.evaluations import fresh_autocast_cache, full_precision
from dynamon.kernels.devices import reads_are_free
from dynamon.layers.complex_pairs import COMPLEX, as_real, from_real, real_dtype, real_numel
from dynamon.quantities.names import is_chosen, plain_name

_CHECKED: ContextVar[set[int] | None] = ContextVar("dynamon_checked", default=None)
_SAMPLED = 16  # tensors of which a device compares some numbers
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # NaN is itself there

Parameters = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Mapping[str, Tensor] | nn.Module


class FlatParameters:
    """Parameters in a fixed order as one flat vector of real numbers; a complex entry counts as two.

    Args:
        params: The parameters, a mapping from their names (``dict(model.named_parameters())``), or a module. Names
            allow blocks to be chosen by name.
        space: The space of the vectors; None where all entries are on this process.

    Attributes:
        tensors: The parameters.
        names: Their names, or None.
        size: Length of the flat vector.
        dtype: Dtype of the flat vector: that of the parameters, float32 at least.
        space: The space of the vectors.

    Raises:
        TypeError: On anything else than tensors.
        ValueError: On no parameters, or parameters on several devices or in several dtypes.
    """

    def __init__(self, params: Parameters, space: VectorSpace | None = None) -> None:
        """Check and store the parameters."""
        self.names, self.tensors = names_and_tensors(params)
        if not self.tensors:
            raise ValueError("params is empty: there is nothing to differentiate in.")
        if len({id(p) for p in self.tensors}) < len(self.tensors):
            raise ValueError("a parameter is in params twice; named_parameters() gives each tied one once.")
        if any(not p.is_floating_point() and p.dtype not in COMPLEX for p in self.tensors):
            raise ValueError("params must be floating point tensors, or complex64 or complex128.")
        if len({(p.device, real_dtype(p)) for p in self.tensors}) > 1:
            kinds = sorted({f"{p.dtype} on {p.device}" for p in self.tensors})
            raise ValueError(f"all parameters must share one dtype and device, got {', '.join(kinds)}.")
        self._sizes = [real_numel(p) for p in self.tensors]
        self.dtype = torch.promote_types(real_dtype(self.tensors[0]), torch.float32)
        self.size = sum(self._sizes)
        self.space = VectorSpace(self.size) if space is None else space
        self.mark_unchanged()

    def __repr__(self) -> str:
        """Return the number of tensors and of their entries, the dtype and the device."""
        dtype, device = str(self.dtype).removeprefix("torch."), self.tensors[0].device
        return f"{type(self).__name__}({len(self.tensors)} tensors, {self.size} numbers, {dtype} on {device})"

    @staticmethod
    def of(params: "Parameters | FlatParameters") -> "FlatParameters":
        """Flatten parameters unless they are flattened already."""
        return params if isinstance(params, FlatParameters) else FlatParameters(params)

    def mark_unchanged(self) -> None:
        """Store the present weights as the reference of :meth:`check_unchanged`."""
        self._versions, self._marks = [p._version for p in self.tensors], self._fingerprint()
        if (checked := _CHECKED.get()) is not None:
            checked.discard(id(self))

    def check_unchanged(self) -> None:
        """Raise RuntimeError if a parameter was written to since construction.

        Cost: one host read; inside :func:`checked_once` at the first call only.
        """
        if [p._version for p in self.tensors] != self._versions or self._is_written():
            raise RuntimeError(
                "a parameter changed after this operator was made; it belongs to the old weights. "
                "Make a new operator after each optimizer step."
            )

    def _is_written(self) -> bool:
        """Compare a few entries with the reference: fused optimizers write without raising the version."""
        checked = _CHECKED.get()
        if checked is not None and id(self) in checked:
            return False
        found = self._fingerprint()
        same = found.shape == self._marks.shape and (found.is_meta or torch.equal(found, self._marks))
        if checked is not None and same:
            checked.add(id(self))
        return not same

    def _fingerprint(self) -> Tensor:
        """Return the bits of a few entries per tensor, or of some tensors where each costs a device call."""
        tensors = [p for p in self.tensors if p.numel()]
        step = 1 if reads_are_free(self.tensors[0].device) else max(1, len(tensors) // _SAMPLED)
        places = [tuple(slice(None, None, max(1, n // 2)) for n in p.shape) for p in tensors[::step]]
        corners = [as_real(p.detach()[place]) for p, place in zip(tensors[::step], places, strict=True)]
        whole = _BITS[corners[0].dtype.itemsize] if corners else torch.uint8
        return torch.cat([c.reshape(-1).view(whole) for c in corners]) if corners else torch.empty(0, dtype=whole)

    def differentiate(
        self, outputs: Any, weights: Any = None, *, create_graph: bool = False, keep_graph: bool = True
    ) -> list[Tensor | None]:
        """Compute gradients of ``outputs`` in the parameters, keeping the graph; None for those without one."""
        live = [p for p in self.tensors if p.requires_grad]
        if not live:
            raise ValueError("none of the parameters requires a gradient.")
        with full_precision():
            gradients = torch.autograd.grad(
                outputs, live, weights, retain_graph=keep_graph, create_graph=create_graph, allow_unused=True
            )
        found = iter(gradients)
        return [next(found) if p.requires_grad else None for p in self.tensors]

    def split(self, vector: Tensor) -> list[Tensor]:
        """Split a flat vector ``[n]`` into the shapes of the parameters: views, except for complex ones."""
        return [from_real(piece, p) for piece, p in zip(vector.split(self._sizes), self.tensors, strict=True)]

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Join tensors into one flat vector ``[n]``, with zeros in place of missing ones."""
        return torch.cat(
            [
                as_real(torch.zeros_like(p) if t is None else t.to_dense() if t.is_sparse else t)
                .reshape(-1)
                .to(self.dtype)
                for t, p in zip(tensors, self.tensors, strict=True)
            ]
        )

    def block(self, chosen: str | Sequence[str] | Sequence[Tensor]) -> list[int]:
        """Return the positions of a block of parameters.

        Args:
            chosen: A glob, several globs (``!`` excludes), or the parameters themselves.

        Raises:
            ValueError: If nothing matches, names are not known, or a tensor is not among the parameters.
        """
        wanted = [chosen] if isinstance(chosen, str | Tensor) else list(chosen)
        globs = [w for w in wanted if isinstance(w, str)]
        if globs and self.names is None:
            raise ValueError("a block by name needs params as a mapping, say dict(model.named_parameters()).")
        places = {id(p): i for i, p in enumerate(self.tensors)}
        missing = [w for w in wanted if isinstance(w, Tensor) and id(w) not in places]
        if missing:
            raise ValueError(f"a tensor of shape {tuple(missing[0].shape)} is not among the operator's parameters.")
        found = {places[id(w)] for w in wanted if isinstance(w, Tensor)}
        found |= {i for i, name in enumerate(self.names or ()) if globs and is_chosen([name], globs)}
        if not found:
            raise ValueError(f"{wanted} matches no parameter; there are {self.names}.")
        return sorted(found)

    def subset(self, places: Sequence[int]) -> "FlatParameters":
        """Return the parameters at some positions."""
        part = copy.copy(self)  # what was found out of all of them need not be found out again
        part.names = None if self.names is None else [self.names[i] for i in places]
        part.tensors, part._sizes = [self.tensors[i] for i in places], [self._sizes[i] for i in places]
        part.size = sum(part._sizes)
        part.space = VectorSpace(part.size)
        return part

    def embed(self, vector: Tensor, places: Sequence[int]) -> Tensor:
        """Pad a block's vector with zeros to a flat vector ``[n]``."""
        pieces = dict(zip(places, vector.split([self._sizes[i] for i in places]), strict=True))
        parts = [pieces[i] if i in pieces else vector.new_zeros(size) for i, size in enumerate(self._sizes)]
        return torch.cat(parts).to(self.dtype)

    def extract(self, vector: Tensor, places: Sequence[int]) -> Tensor:
        """Return a block's part of a flat vector ``[n]``; the inverse of :meth:`embed`."""
        pieces = vector.split(self._sizes)
        return torch.cat([pieces[i] for i in places])

    @contextmanager
    def perturbed(self, step: Tensor, factor: float = 1.0) -> Iterator[None]:
        """Set the parameters to ``theta + factor * step`` inside the context; restore them bit for bit at exit.

        Their storage is replaced, not written to, so that graphs built before stay valid.
        """
        with self._restored():
            pairs = zip(self.tensors, self.split(step), strict=True)
            self._move([(p, piece) for p, piece in pairs if p.requires_grad], factor)
            with fresh_autocast_cache():
                yield

    @contextmanager
    def placed(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Set the parameters to copies of some values inside the context; restore them bit for bit at exit.

        Args:
            values: One tensor per parameter, in its shape and dtype.
        """
        with self._restored():
            for p, value in zip(self.tensors, clone_tensors([value.detach() for value in values]), strict=True):
                p.data = value
            with fresh_autocast_cache():
                yield

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Put the parameters' storage back at exit."""
        kept = [p.data for p in self.tensors]
        try:
            yield
        finally:
            for p, data in zip(self.tensors, kept, strict=True):
                p.data = data

    def _move(self, pairs: Sequence[tuple[Tensor, Tensor]], factor: float) -> None:
        """Add the steps times the factor, in few device calls where dtypes and classes of all parameters allow that."""
        if all(type(p) in (Tensor, nn.Parameter) and p.dtype == piece.dtype for p, piece in pairs) and pairs:
            moved: Sequence[Tensor] = torch._foreach_add(
                [p.data for p, _ in pairs], [piece for _, piece in pairs], alpha=factor
            )
        else:
            moved = [torch.add(p.data, piece, alpha=factor).to(p.dtype) for p, piece in pairs]
        for (p, _), data in zip(pairs, moved, strict=True):
            p.data = data

    def _hooked(self) -> list[Tensor]:
        """Return the tensors on which users register hooks."""
        return self.tensors

    @contextmanager
    def hooks_off(self) -> Iterator[None]:
        """Remove parameter hooks inside the context: clamping and logging are meant for training, not for products."""
        registries = [getattr(p, name) for p in self._hooked() for name in _HOOKS]
        hooked = [(hooks, dict(hooks)) for hooks in registries if hooks]
        for hooks, _ in hooked:
            hooks.clear()
        try:
            yield
        finally:
            for hooks, own in hooked:
                hooks.update(own)


def names_and_tensors(params: Any) -> tuple[list[str] | None, list[Tensor]]:
    """Return names and tensors of a module, named parameters, a mapping, a sequence, one tensor or flattened ones."""
    if isinstance(params, FlatParameters):
        return params.names, params.tensors
    if isinstance(params, nn.Module):
        params = params.named_parameters()
    if isinstance(params, Tensor):
        params = [params]
    if not isinstance(params, Mapping):
        if not isinstance(params, Iterable):
            raise TypeError(f"params must be tensors, a mapping from names to tensors, or a module, not {params!r}.")
        params = list(params)
        if params and all(isinstance(item, tuple) and len(item) == 2 for item in params):
            params = dict(params)
    tensors = list(params.values()) if isinstance(params, Mapping) else params
    if not all(isinstance(p, Tensor) for p in tensors):
        raise TypeError("params must be tensors, a mapping from names to tensors, or a module.")
    return [plain_name(name) for name in params] if isinstance(params, Mapping) else None, tensors


@contextmanager
def checked_once() -> Iterator[None]:
    """Check an operator's weights only once inside: nothing else writes to them meanwhile."""
    token = _CHECKED.set(set())
    try:
        yield
    finally:
        _CHECKED.reset(token)


_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
