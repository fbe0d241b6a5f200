"""The text of the study: Python source of packages that ``constraints.txt`` pins, frozen by a hash."""

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib import metadata

import torch
from torch import Tensor

_SHORTEST = 2000  # bytes of a file; shorter ones are mostly lists of imports


@dataclass(frozen=True)
class Corpus:
    """Some packages, all pure Python, so that every platform and Python version installs the same files.

    Attributes:
        packages: Names of distributions.
        digest: SHA-256 over the name and the bytes of every file, in order.
    """

    packages: tuple[str, ...]
    digest: str

    def read(self) -> dict[str, bytes]:
        """Return the files by name, sorted.

        Raises:
            ValueError: If a package is missing or another version of it is installed.
        """
        files = {}
        for package in self.packages:
            try:
                listed = metadata.files(package) or []
            except metadata.PackageNotFoundError:
                listed = []
            for file in listed:
                if file.suffix == ".py" and "tests" not in file.parts and file.parts[0] != "..":
                    text = file.locate().read_bytes()
                    if len(text) >= _SHORTEST:
                        files[file.as_posix()] = text
        files = dict(sorted(files.items()))
        if self.digest_of(files) != self.digest:
            raise ValueError(
                f"the study trains on the source of {', '.join(self.packages)} as constraints.txt pins them, and what "
                'is installed differs: pip install -c constraints.txt -e ".[bench]".'
            )
        return files

    @staticmethod
    def digest_of(files: dict[str, bytes]) -> str:
        """Hash names and bytes."""
        found = hashlib.sha256()
        for name, text in files.items():
            found.update(f"{name}\0{len(text)}\0".encode() + text)
        return found.hexdigest()


STUDY = Corpus(
    ("lightning", "torchmetrics", "networkx"), "af361d2b29a1c910daadbfbb8f315feec201c2132432fe6512e8535e0f9a2b95"
)
RADII = Corpus(("sympy",), "4b26141e283033cff6de2c3f1d87eaa0c755e280b9dd2ecee7540e382299fc81")


@cache
def split(corpus: Corpus) -> tuple[Tensor, Tensor, Tensor]:
    """Return bytes for training, for validation in tuning and for validation in reporting, split by file.

    Of ten files one is for tuning and one for reporting.
    """
    files = list(corpus.read().values())
    parts = (
        [f for i, f in enumerate(files) if i % 10 not in (0, 5)],
        [f for i, f in enumerate(files) if i % 10 == 0],
        [f for i, f in enumerate(files) if i % 10 == 5],
    )
    training, tuning, reporting = (torch.frombuffer(bytearray(b"\n".join(p)), dtype=torch.uint8) for p in parts)
    return training, tuning, reporting
