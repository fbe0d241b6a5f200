"""Training text that every machine has: the source of the Python standard library."""

import sysconfig
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

_SKIPPED = {"site-packages", "dist-packages", "__pycache__"}
_LIMIT = 12_000_000  # bytes of training text; all of it is more than a short run can see
_VALIDATION_EVERY = 10  # every tenth file


def standard_library_text() -> tuple[Tensor, Tensor]:
    """Read the running interpreter's standard library, split into training and validation by file.

    Returns:
        Training and validation bytes, two uint8 tensors.

    Raises:
        FileNotFoundError: If the interpreter ships without its source.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [f for f in sorted(root.rglob("*.py")) if not _SKIPPED & set(f.relative_to(root).parts)]
    if len(files) < 2 * _VALIDATION_EVERY:
        raise FileNotFoundError(
            f"the demo trains on the source of the Python standard library, but {root} holds {len(files)} "
            "Python files; run it with an interpreter that ships its library as source."
        )
    validation = b"".join(f.read_bytes() for f in files[::_VALIDATION_EVERY])
    training = b"".join(f.read_bytes() for i, f in enumerate(files) if i % _VALIDATION_EVERY)
    return _tensor(training[:_LIMIT]), _tensor(validation)


def training_batches(text: Tensor, batch: int, context: int, steps: int, seed: int) -> DataLoader[Tensor]:
    """Draw ``steps`` batches of random windows of ``context + 1`` bytes, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - context - 1, (steps * batch,), generator=generator)
    return DataLoader(_Windows(text, starts, context), batch_size=batch)


def validation_batches(text: Tensor, batch: int, context: int, batches: int) -> DataLoader[Tensor]:
    """Spread windows evenly over the text."""
    starts = torch.linspace(0, len(text) - context - 2, batches * batch).long()
    return DataLoader(_Windows(text, starts, context), batch_size=batch)


class _Windows(Dataset[Tensor]):
    """Windows of a byte string as ``[context + 1]`` integers."""

    def __init__(self, text: Tensor, starts: Tensor, context: int) -> None:
        self._text, self._starts, self._context = text, starts, context

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Tensor:
        start = int(self._starts[index])
        return self._text[start : start + self._context + 1].long()


def _tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
