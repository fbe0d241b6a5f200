"""Decide whether products with a Hessian can be trusted."""

from torch import Tensor

from dynamon.curvature import LinearOperator

NOISY = 0.1  # relative error of a product from which on nothing is shown


def why_not(operator: LinearOperator, error: float) -> str | None:
    """Return why nothing is shown of products with an error that the operator gave; None where they can be trusted."""
    if error <= NOISY:
        return None
    doubt, reason = getattr(operator, "doubt", None), getattr(operator, "reason", None)
    after = "" if reason is None else f", and {reason.removesuffix('.')}"
    return doubt or f"finite differences at two step sizes differ by {error:.0%}, so nothing is read off them{after}."


def why_never(operator: LinearOperator, vector: Tensor) -> str | None:
    """Return why products can never be shown; None where they can be trusted, or may be another time.

    That is so where a function of unknown curvature takes part in half precision, or differences of gradients have to
    be taken there.
    """
    if getattr(operator, "doubt", None) is None and not getattr(operator, "is_coarse", False):
        return None
    return why_not(operator, operator.product_error(vector))


def require_trust(operator: LinearOperator, vector: Tensor) -> None:
    """Raise where products are too noisy to show what rests on them: nothing else in such a number tells."""
    if (reason := why_not(operator, operator.product_error(vector))) is not None:
        raise ArithmeticError(reason)
