"""Tell the softmax of attention from others: it is taken of a product of two batches, and multiplies a third one."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from dynamon.quantities.attention import HeadStatistics, softmax_of_logits

_PRODUCTS = ("matmul", "rmatmul", "bmm", "baddbmm", "einsum")
_HEADS = ("num_heads", "n_heads", "num_attention_heads", "n_head", "nhead", "heads")  # usual names of their number


class AttentionTrace:
    """Follows products of batches through scaling, masks, casts, dropout and views, to a softmax and to the values.

    Products of a batch and a weight, which has two dimensions at most, do not count: probabilities of classes, routers,
    codebooks and linear attention are left out. Tensors are referred to weakly, so that none is kept.
    """

    def __init__(self) -> None:
        """Start with nothing seen."""
        self._logits: Any = WeakTensorKeyDictionary()  # and what was subtracted from their rows, or None
        self._weights: Any = WeakTensorKeyDictionary()  # of attention, if they multiply values: what is to be noted

    def softmax(self, args: Sequence[Any], kwargs: Mapping[str, Any], heads: int) -> HeadStatistics | None:
        """Measure a softmax before it is taken, for :meth:`follow`; None where it is of something else."""
        logits = args[0] if args else kwargs.get("input")
        if not isinstance(logits, Tensor) or logits not in self._logits:
            return None
        return softmax_of_logits(args, kwargs, heads, self._logits[logits])

    def follow(self, function: str, args: Iterable[Any], result: Any, note: Callable[[], None] | None = None) -> None:
        """See a call that has returned.

        Args:
            function: Its name.
            args: All its arguments.
            result: What it returned.
            note: Of a softmax that may be attention's, what is to be called once its result multiplies values.
        """
        if note is not None:
            self._weights[result] = note
        elif function in _PRODUCTS:
            operands = [tensor for tensor in _tensors(args) if tensor.ndim > 2]
            pending = [self._weights.pop(tensor) for tensor in operands if tensor in self._weights]
            for one in pending if len(operands) > 1 else ():
                one()
            if len(operands) > 1 and not pending and isinstance(result, Tensor):
                self._logits[result] = None
        elif isinstance(result, Tensor) and (len(self._logits) or len(self._weights)) and function != "softmax":
            shift = _shift(function, args)
            if shift is not None and shift[0] in self._logits:
                self._logits[result] = shift[1]
                return
            for tensor in _tensors(args):
                for known in (self._logits, self._weights):
                    if tensor in known and tensor.numel() == result.numel():
                        known[result] = known[tensor]


def _tensors(args: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among some arguments, and in lists of them."""
    for one in args:
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, list | tuple):
            yield from (entry for entry in one if isinstance(entry, Tensor))


def _shift(function: str, args: Iterable[Any]) -> tuple[Tensor, Tensor] | None:
    """Return logits and what is subtracted from each of their rows, such as its maximum: a softmax stays as it is."""
    given = list(args)[:2]
    if function != "sub" or len(given) < 2 or not all(isinstance(one, Tensor) for one in given):
        return None
    logits, rows = given
    is_by_row = logits.ndim > 2 and logits.shape[-1] > 1 and rows.shape == (*logits.shape[:-1], 1)
    return (logits, rows.detach()) if is_by_row else None


def stated_heads(module: nn.Module) -> int:
    """Return the number of heads that a module states; one where it states none."""
    stated = [getattr(module, name, None) for name in _HEADS]
    return next((one for one in stated if isinstance(one, int) and not isinstance(one, bool) and one > 0), 1)
