"""A counter of device calls, and the 148 tensors of GPT-2 124M to count them on.

What costs a GPU's host its time is the number of calls that give the device work, whatever the size of the tensors.
That number is the same on a CPU or on ``meta`` tensors, which hold no memory and compute nothing, so it can be
tested anywhere::

    from tests.launches import Launches, gpt2

    model = gpt2("meta")                       # 148 tensors, gradients with fill_gradients(model)
    with Launches() as launches:
        reader.read()
    assert launches.total <= 80, launches      # a failure prints the calls, most frequent first

    with Launches(device="meta") as launches:  # leaves out what the host computes for itself on its own tensors
        ...
    launches.calls                             # Counter: "_foreach_mul_.Scalar" -> 2, "triton chunk_stats" -> 1
    launches.waits                             # how often the host asked for a number; on meta tensors asking raises
    launches.reset()                           # between two steps

What counts: every operator that reaches the device, a foreach operator as one, and every launch of a Triton kernel,
whether it is compiled, interpreted or :func:`pretended`. What does not: views and other operators on metadata, and
allocations. A list of tensors that foreach kernels do not take at once (of several dtypes, say) counts as one and is
several.
Optimizers loop on a CPU and on ``meta`` unless they are told otherwise: ``foreach=True``.
"""

import importlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

# Neither views nor work: allocations, and questions about sizes.
_FREE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_", "is_pinned"),
    *("lift_fresh", "alias", "detach", "detach_", "_unsafe_view", "_reshape_alias", "squeeze_", "unsqueeze_"),
    *("t_", "transpose_", "as_strided_", "is_same_size", "stride", "size", "numel", "dim", "storage_offset"),
    *(
        "record_stream",
        "_local_scalar_dense",
        "unsafe_split",
        "unsafe_chunk",
        "_has_compatible_shallow_copy_type",
        "promote_types",
    ),
}
_WAITS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "unique", "_unique2", "is_nonzero"}


class Launches(TorchDispatchMode):
    """Counts the calls that give a device work while it is on.

    Args:
        device: Count only calls with a tensor of this kind of device among arguments or results; None for all.

    Attributes:
        calls: How often each operator was called, by name with overload.
        waits: How often the host asked for a number or for a size that depends on numbers.
    """

    def __init__(self, device: str | None = None) -> None:
        """Nothing counted."""
        super().__init__()
        self.device = device
        self.calls: Counter[str] = Counter()
        self.waits = 0
        self._inside = False  # of a Triton kernel, whose interpreter calls operators
        self._patches: list[Any] = []

    def __enter__(self) -> "Launches":
        """Count from here on."""
        for module, name in (
            ("triton.runtime.jit", "JITFunction"),
            ("triton.runtime.interpreter", "InterpretedFunction"),
        ):
            try:
                kind = getattr(importlib.import_module(module), name)
            except ImportError:
                continue
            patch = mock.patch.object(kind, "run", self._counted(kind.run))
            patch.start()
            self._patches.append(patch)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Stop counting."""
        super().__exit__(*error)
        while self._patches:
            self._patches.pop().stop()

    def _counted(self, run: Any) -> Any:
        def counted(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            self.add(f"triton {kernel.__name__}")
            self._inside = True
            try:
                return run(kernel, *args, **kwargs)
            finally:
                self._inside = False

        return counted

    def add(self, name: str) -> None:
        """Count one call more."""
        self.calls[name] += 1

    @property
    def total(self) -> int:
        """All calls."""
        return self.calls.total()

    def reset(self) -> None:
        """Begin at zero."""
        self.calls.clear()
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and compute."""
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if self._inside:
            return found
        counts = not func.is_view and name not in _FREE and not name.startswith("sym_")
        if (counts or name in _WAITS) and self._is_there((args, kwargs, found)):
            self.waits += name in _WAITS
            self.calls[f"{name}.{func._overloadname}"] += counts
        return found

    def _is_there(self, values: Any) -> bool:
        tensors = [value for value in tree_flatten(values)[0] if isinstance(value, Tensor)]
        return self.device is None or any(t.device.type == self.device for t in tensors)

    def __repr__(self) -> str:
        """The calls, most frequent first."""
        lines = [f"{count:6d} {name}" for name, count in self.calls.most_common() if count]
        return "\n".join([f"{self.total} calls, {self.waits} waits", *lines])


@contextmanager
def pretended(launches: Launches) -> Iterator[None]:
    """Inside, a CPU is taken for a GPU with Triton, whose kernels for gradients are counted and find ones."""

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Any:
            return self.launch

        def launch(self, *args: Any, **kwargs: Any) -> None:
            launches.add(f"triton {self.name}")
            if self.name == "tensor_stats":
                launches._inside = True
                args[2].fill_(1.0)[2].zero_()  # nothing that is not finite
                launches._inside = False

    stats, lengths, twin = (
        importlib.import_module(f"dynamon.kernels.{name}")
        for name in ("gradient_stats", "lengths", "gradient_stats_triton")
    )
    with (
        mock.patch.object(stats, "_may_have_triton", lambda device: True),
        mock.patch.object(stats, "reads_are_free", lambda device: False),
        mock.patch.object(lengths, "reads_are_free", lambda device: False),
        mock.patch("dynamon.norms.forms.reads_are_free", lambda device: False),
        mock.patch.object(twin, "can_run", lambda device: True),
        mock.patch.object(twin, "_triton_dtype", lambda dtype: dtype),
        mock.patch.object(twin, "chunk_stats", Kernel("chunk_stats")),
        mock.patch.object(twin, "tensor_stats", Kernel("tensor_stats")),
        mock.patch.object(twin, "_runs", {}),
        mock.patch.object(twin, "_plans", {}),
    ):
        yield


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.before(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.after(x))))


class GPT2(nn.Module):
    """GPT-2 124M with a tied head: 148 tensors. Takes tokens ``[batch, time]``, gives logits.

    Args:
        scale: Divides width, tokens and context, not the number of tensors; 48 makes 100,000 entries.
    """

    def __init__(self, scale: int = 1) -> None:
        """At its shapes."""
        super().__init__()
        width = 768 // scale
        self.tokens, self.places = nn.Embedding(50257 // scale, width), nn.Embedding(1024 // scale, width)
        self.blocks = nn.Sequential(*(_Block(width, heads=2) for _ in range(12)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 50257 // scale, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[batch, time, tokens]``."""
        places = torch.arange(tokens.shape[-1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.places(places))))


def gpt2(device: str = "meta", scale: int = 1, dtype: torch.dtype = torch.float32) -> GPT2:
    """The model on a device; on a CPU take ``scale=48``."""
    with torch.device(device):
        return GPT2(scale).to(dtype)


def fill_gradients(model: nn.Module, seed: int = 0) -> None:
    """Put random gradients where a backward pass would put them, into new tensors."""
    generator = None if any(p.is_meta for p in model.parameters()) else torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, dtype=p.dtype, device=p.device, generator=generator)
