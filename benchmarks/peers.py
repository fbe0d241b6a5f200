"""The methods that ``benchmarks/sharpness.py`` compares: dynamon and its peers, each as a user would call it.

Every function makes its operator from a :class:`benchmarks.models.Problem` and returns a :class:`Reading`.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import eigsh

from benchmarks.models import Problem
from dynamon.curvature import Eigenpairs, HessianOperator, top_eigenvalues

COLD, CERTIFIED, TRACKING = "dynamon cold", "dynamon cold certified", "dynamon tracking"
PACKAGES = {"PyHessian": "pyhessian", "eigenthings": "hessian-eigenthings", "curvlinops": "curvlinops-for-pytorch"}


@dataclass
class Reading:
    """What one call of a method gave."""

    value: float
    products: int
    upper: float | None = None


def hessian_of(problem: Problem) -> HessianOperator:
    """Our operator of the loss on the probe batch."""
    return HessianOperator(problem.loss_fn, problem.params)


def reading(found: Eigenpairs) -> Reading:
    """What our solver found, as a reading."""
    return Reading(float(found.values[0]), found.matvecs, found.upper)


def dynamon(problem: Problem, seed: int, certify: bool = False) -> Reading:
    """Ours from nothing, to an error of 1 %."""
    return reading(top_eigenvalues(hessian_of(problem), tol=1e-2, certify=certify, seed=seed))


def pyhessian(problem: Problem, seed: int, tol: float = 1e-3) -> Reading:
    """Power iteration until two values agree to ``tol``."""
    from pyhessian import hessian

    torch.manual_seed(seed)
    cuda = problem.inputs.is_cuda
    try:
        with counted(sys.modules["pyhessian.hessian"], "hessian_vector_product") as count:
            operator = hessian(problem.model, problem.criterion, data=problem.probe, cuda=cuda)
            values, _ = operator.eigenvalues(top_n=1, tol=tol)
    finally:  # it leaves the model in evaluation mode, and a graph in every .grad
        problem.model.train()
        problem.model.zero_grad(set_to_none=True)
    return Reading(values[0], count[0])


def eigenthings(problem: Problem, seed: int, most: int = 20) -> Reading:
    """Lanczos of so many products; its default of 2 products is 30 to 90 % too low."""
    import hessian_eigenthings as peer

    loss = peer.supervised_loss(problem.criterion)
    with counted(peer.HessianOperator, "matvec") as count:
        operator = peer.HessianOperator(problem.model, [problem.probe], loss)
        found = peer.lanczos(operator, k=1, max_iter=most, which="LA", seed=seed)
    return Reading(float(found.eigenvalues[0]), count[0])


def curvlinops(problem: Problem, seed: int, ncv: int | None = None, tol: float = 1e-2) -> Reading:
    """ARPACK over their operator; without their check of determinism, which would cost them further products."""
    import curvlinops as peer

    start = np.random.default_rng(seed).standard_normal(sum(p.numel() for p in problem.params))
    with counted(peer.HessianLinearOperator, "__matmul__") as count:
        operator = peer.HessianLinearOperator(
            problem.model, problem.criterion, problem.params, [problem.probe], check_deterministic=False
        )
        values = eigsh(operator.to_scipy(), k=1, which="LA", tol=tol, ncv=ncv, v0=start, return_eigenvectors=False)
    return Reading(float(values[0]), count[0])


# Each peer at its usual setting, then from loose to tight: the loosest one with an error of at most 1 % is compared.
SETTINGS: dict[str, dict[str, Callable[[Problem, int], Reading]]] = {
    "PyHessian": {f"PyHessian tol={t:g}": partial(pyhessian, tol=t) for t in (0.1, 0.03, 0.01, 3e-3, 3e-4)},
    "eigenthings Lanczos 20": {f"eigenthings Lanczos {n}": partial(eigenthings, most=n) for n in (6, 8, 10, 12, 16)},
    "curvlinops eigsh": {"curvlinops eigsh tol=0.1": partial(curvlinops, tol=0.1)},
    "curvlinops eigsh ncv=8": {
        f"curvlinops eigsh ncv=8 tol={t:g}": partial(curvlinops, ncv=8, tol=t) for t in (0.1, 0.03)
    },
}
METHODS: dict[str, Callable[[Problem, int], Reading]] = {
    COLD: dynamon,
    CERTIFIED: partial(dynamon, certify=True),
    "PyHessian": pyhessian,
    "eigenthings Lanczos 20": eigenthings,
    "curvlinops eigsh": curvlinops,
    "curvlinops eigsh ncv=8": partial(curvlinops, ncv=8),
    **{name: method for settings in SETTINGS.values() for name, method in settings.items()},
}


@contextmanager
def counted(owner: Any, name: str) -> Iterator[list[int]]:
    """Count the calls of a function of a module or a class."""
    original, count = getattr(owner, name), [0]

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)
    try:
        yield count
    finally:
        setattr(owner, name, original)


def installed(names: list[str]) -> list[str]:
    """Those methods whose package is there; says so for the others."""
    kept = []
    for name in names:
        package = PACKAGES.get(name.split()[0])
        try:
            metadata.version(package or "torch")
            kept.append(name)
        except metadata.PackageNotFoundError:
            print(f'skipped: {name}, since {package} is missing: pip install -c constraints.txt -e ".[bench]".')
    return kept
