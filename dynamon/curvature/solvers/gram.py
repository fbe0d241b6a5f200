"""The largest eigenvalue of a Gauss-Newton matrix from the Gram matrix of its outputs."""

import torch
from torch import Tensor

from dynamon.curvature.operators.ggn import GGNOperator
from dynamon.curvature.solvers.eigenpairs import Eigenpairs, on_host
from dynamon.kernels import gram_iteration, in_double

MAX_ROWS = 4096
_STEPS = 10  # upper / lower <= rows^(2^-11) < 1.005 at 4,096 rows
_CONVEX = 1e-4  # relative size of a negative eigenvalue of the loss's Hessian that is taken for rounding


def gram_eigenpairs(operator: GGNOperator, tol: float) -> Eigenpairs:
    """Compute the largest eigenvalue with two-sided bounds; see :func:`dynamon.curvature.top_eigenvalues`.

    Raises:
        ValueError: On more than 4,096 rows, or a loss that is not convex in the outputs.
    """
    rows = operator.rows
    if rows > MAX_ROWS:
        raise ValueError(
            f"the outputs have {rows:,} rows (samples x outputs) and method 'gram' takes at most {MAX_ROWS:,}: "
            "measure on fewer samples, or use method='lanczos', which has no such limit."
        )
    root = _square_root(_loss_hessian(operator))
    gram = root @ _tangent_kernel(operator) @ root
    gram = (gram + gram.mT) / 2
    # The Jacobian's entries carry the rounding of the operator's own dtype.
    allowance = 8 * torch.finfo(operator.dtype).eps * (1 + rows**0.5)
    lower, upper = (float(bound) for bound in gram_iteration(gram, steps=_STEPS))
    lower, upper = lower * (1 - allowance), upper * (1 + allowance)
    direction = _top_vector(gram)
    vector = operator.pull(operator.split_rows((root @ direction).to(operator.dtype).to(operator.device)))
    length = torch.linalg.vector_norm(vector)
    vector = vector / length.clamp_min(torch.finfo(vector.dtype).tiny)
    product = operator @ vector
    value = float(vector @ product)
    residual = float(torch.linalg.vector_norm(product - value * vector))
    value = min(max(value, lower), upper)
    return Eigenpairs(
        values=on_host([value]),
        vectors=vector[:, None],
        residuals=on_host([residual]),
        errors=on_host([min(residual, upper - lower)]),
        lower=lower,
        upper=upper,
        smallest=float(gram.trace()) / operator.shape[0],  # the mean eigenvalue: the smallest is not above it
        matvecs=rows + 1,
        converged=upper - lower <= tol * upper and residual <= max(tol, _residual_floor(operator)) * upper,
    )


def _residual_floor(operator: GGNOperator) -> float:
    return 100 * torch.finfo(operator.dtype).eps


def _loss_hessian(operator: GGNOperator) -> Tensor:
    """Compute ``H_L`` ``[rows, rows]`` in float64, one product per column, without the network."""
    return torch.stack([_flat(operator.curve(operator.split_rows(e))) for e in _units(operator)], dim=1)


def _tangent_kernel(operator: GGNOperator) -> Tensor:
    """Compute ``J J^T`` ``[rows, rows]`` in float64: each row pulled back to the parameters and pushed out again."""
    columns = [_flat(operator.push(operator.pull(operator.split_rows(e)))) for e in _units(operator)]
    return torch.stack(columns, dim=1)


def _units(operator: GGNOperator) -> Tensor:
    return torch.eye(operator.rows, dtype=operator.dtype, device=operator.device)


def _flat(outputs: list[Tensor]) -> Tensor:
    return in_double(torch.cat([z.reshape(-1) for z in outputs]))


def _square_root(hessian: Tensor) -> Tensor:
    """Compute the symmetric root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
    if float(values[0]) < -_CONVEX * float(values[-1].clamp_min(0)):
        raise ValueError("the loss is not convex in the outputs, so method 'gram' does not apply; use 'lanczos'.")
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.mT


def _top_vector(gram: Tensor, squarings: int = 12) -> Tensor:
    """Compute a top unit vector of a positive semidefinite matrix by the squarings of Gram iteration."""
    power = gram
    for _ in range(squarings):
        power = power / torch.linalg.matrix_norm(power).clamp_min(torch.finfo(power.dtype).tiny)
        power = power @ power
    column = power[:, power.diagonal().argmax()]
    return column / torch.linalg.vector_norm(column).clamp_min(torch.finfo(power.dtype).tiny)
