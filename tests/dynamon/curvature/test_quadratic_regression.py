"""A model quadratic in its parameters, in which gradient descent is known to sharpen up to 2 / lr.

Agarwala et al., "Second-order regression models exhibit progressive sharpening to the edge of stability",
arXiv 2210.04860. Kernel and Hessian are known exactly here, without autograd.
"""

import pytest
import torch
from torch import Tensor

from dynamon.stability import stability_ratio


class QuadraticRegression:
    """Residuals z = J theta + theta Q theta / 2 - y and the loss |z|^2 / 2D, all Gaussian; theta starts at zero."""

    def __init__(self, seed: int, outputs: int = 60, parameters: int = 120) -> None:
        generator = torch.Generator().manual_seed(seed)
        options = {"generator": generator, "dtype": torch.float64}
        self.slopes = torch.randn(outputs, parameters, **options) / parameters**0.5
        curves = torch.randn(outputs, parameters, parameters, **options)
        self.curves = 2 * (curves + curves.mT) / 2**0.5 / parameters
        self.targets = 3 * torch.randn(outputs, **options)
        self.theta = torch.zeros(parameters, dtype=torch.float64, requires_grad=True)

    def residuals(self) -> Tensor:
        return self.slopes @ self.theta + 0.5 * (self.curves @ self.theta) @ self.theta - self.targets

    def loss(self) -> Tensor:
        return 0.5 * self.residuals().square().mean()

    def jacobian(self) -> Tensor:
        return self.slopes + (self.curves @ self.theta).detach()

    def kernel_top(self) -> float:
        jacobian = self.jacobian()
        return float(torch.linalg.eigvalsh(jacobian @ jacobian.mT / len(jacobian))[-1])

    def hessian_top(self) -> float:
        """Largest eigenvalue of J^T J / D + sum of z_d Q_d / D."""
        jacobian, residuals = self.jacobian(), self.residuals().detach()
        hessian = jacobian.mT @ jacobian + torch.einsum("d,dij->ij", residuals, self.curves)
        return float(torch.linalg.eigvalsh(hessian / len(jacobian))[-1])


@pytest.mark.parametrize("seed", range(4))
def test_progressive_sharpening_ends_at_the_edge(seed: int) -> None:
    model = QuadraticRegression(seed)
    rate = 2 * 0.5 / model.hessian_top()
    optimizer = torch.optim.SGD([model.theta], lr=rate)
    assert model.kernel_top() * rate / 2 < 0.25
    last_fifth = []
    for step in range(400):
        if step % 20 == 0:
            found = stability_ratio(model.loss, [model.theta], optimizer, tol=1e-4, max_matvecs=200, seed=step)
            assert found.converged and float(found.values[0]) == pytest.approx(model.hessian_top() * rate / 2, rel=1e-3)
            last_fifth += [float(found.values[0])] if step >= 320 else []
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.step()
    assert 0.95 <= float(torch.tensor(last_fifth).median()) <= 1.02
