"""Every solver on every operator of every kind of network, against dense matrices in float64.

The table: network x operator x backend x method x seed. The dense Hessian is that of
``torch.autograd.functional.hessian`` (closed forms for the linear models), the Gauss-Newton matrix is ``J^T H_L J``
from ``jacobian``, and P is written out below.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dynamon.curvature import GGNOperator, HessianOperator, blockwise_sharpness, top_eigenvalues
from dynamon.curvature.operators.preconditioner import preconditioned, preconditioner
from tests.models import cnn, gpt, mlp, samples

TOL, WITHIN, MAX_MATVECS, SEEDS = 1e-4, 1e-3, 200, (0, 1)
BETAS, EPS, STEPS = (0.9, 0.99), 1e-6, 5


class Frozen(nn.Module):
    """A network whose first layer does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = mlp(5, 8, 8), nn.Linear(8, 3)
        self.body[0].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh())


class Scalars(nn.Module):
    """A network with parameters of no dimension, and one that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 6, 3)
        self.gain, self.shift = nn.Parameter(torch.tensor(1.3)), nn.Parameter(torch.tensor(-0.2))
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.net(x + self.shift)


class Recurrent(nn.Module):
    """An LSTM and a head on its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Regression(nn.Module):
    """A linear model with as many outputs as ``outputs``; one is a logit."""

    def __init__(self, inputs: int, outputs: int = 1) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def data(*shape: int, classes: int = 3) -> Callable[[], list[Tensor]]:
    return lambda: samples(*shape, classes=classes, dtype=torch.float64)


def tokens() -> list[Tensor]:
    """Some of the eleven tokens never occur."""
    drawn = torch.randint(9, (4, 6), generator=torch.Generator().manual_seed(0))
    return [drawn, drawn.roll(-1, 1)]


def classify(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), labels.flatten())


def separate(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs[:, 0], labels.to(outputs.dtype))


def fit(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.mse_loss(outputs, F.one_hot(labels, outputs.shape[1]).to(outputs.dtype))


def logistic_hessian(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """``X^T diag(s(1-s)) X / n``, by hand."""
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    chance = torch.sigmoid(x @ torch.cat([model.linear.weight[0], model.linear.bias]).detach())
    return x.mT * (chance * (1 - chance)) @ x / len(x)


def softmax_hessian(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """The mean of ``(diag p - p p^T) x X X^T``, by hand; weights first, then biases."""
    weight, bias = model.linear.weight.detach(), model.linear.bias.detach()
    p = torch.softmax(x @ weight.mT + bias, 1)
    cores = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    full = torch.einsum("nij,na,nb->iajb", cores, x, x) / len(x)
    classes, width = full.shape[0], full.shape[1] - 1
    places = [i * (width + 1) + a for i in range(classes) for a in range(width)]
    places += [i * (width + 1) + width for i in range(classes)]
    return full.reshape(classes * (width + 1), -1)[places][:, places]


@dataclass(frozen=True)
class Network:
    """A row of the table: how to make it, what goes in, its loss, a layer and a glob for blocks."""

    make: Callable[[], nn.Module]
    data: Callable[[], list[Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    layer: str
    glob: str
    closed_form: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None


NETWORKS = {
    "logistic regression": Network(
        lambda: Regression(30), data(60, 30, classes=2), separate, "linear", "*.weight", logistic_hessian
    ),
    "softmax regression": Network(
        lambda: Regression(20, 3), data(50, 20), classify, "linear", "linear.*", softmax_hessian
    ),
    "mlp": Network(lambda: mlp(6, 16, 8, 3), data(30, 6), classify, "2", "*.weight"),
    "mlp on squares": Network(lambda: mlp(6, 12, 12, 3), data(30, 6), fit, "0", "[02].*"),
    "cnn with batchnorm": Network(cnn, data(8, 2, 6, 6), classify, "3", "*.bias"),
    "lstm": Network(Recurrent, data(12, 5, 3), classify, "lstm", "*weight*"),
    "transformer": Network(lambda: gpt(depth=1, width=4), tokens, classify, "blocks.0", "blocks.*.weight"),
    "tied embeddings": Network(lambda: gpt(depth=1, width=4, tied=True), tokens, classify, "wte", "*ln*"),
    "frozen layer": Network(Frozen, data(20, 5), classify, "head", "*.bias"),
    "parameters without dimension": Network(Scalars, data(20, 4), classify, "net", "[gs]*"),
}


class Cell(NamedTuple):
    """One run of a solver."""

    network: str
    operator: str
    backend: str
    method: str
    seed: int

    def __str__(self) -> str:
        return "-".join(map(str, self))


OPERATORS = ("hessian", "preconditioned", "layer", "glob")
BACKENDS = ("double_backward", "finite_difference")
CELLS = [
    Cell(network, operator, backend, method, seed)
    for network in NETWORKS
    for seed in SEEDS
    for operator, backend, method in [
        *((operator, backend, "lanczos") for operator in OPERATORS for backend in BACKENDS),
        *((f"ggn {operator}", "double_backward", "lanczos") for operator in OPERATORS),
        ("ggn hessian", "double_backward", "gram"),
        ("ggn hessian", "double_backward", "power"),
    ]
]  # fmt: skip


class Setting(NamedTuple):
    model: nn.Module
    params: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    inputs: Tensor
    labels: Tensor


@cache
def setting(network: str, seed: int) -> Setting:
    """A network a few steps into training, so that AdamW has a state."""
    row = NETWORKS[network]
    torch.manual_seed(seed)
    model = row.make()
    torch.manual_seed(seed)
    for p in model.parameters():
        if p.ndim:  # away from what the maker's own seed chose
            p.data += 0.3 * torch.randn_like(p) / max(p.shape[-1], 1) ** 0.5
    model = model.double().train()
    inputs, labels = row.data()
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(params.values(), lr=1e-2, betas=BETAS, eps=EPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        row.loss(model(inputs), labels).backward()
        optimizer.step()
    return Setting(model, params, optimizer, inputs, labels)


def flat_function(network: str, seed: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The outputs as a function of the flat parameters, and those."""
    model, params, _, inputs, _ = setting(network, seed)
    sizes = [p.numel() for p in params.values()]

    def outputs(flat: Tensor) -> Tensor:
        pieces = zip(params.items(), flat.split(sizes), strict=True)
        return functional_call(model, {name: piece.view_as(p) for (name, p), piece in pieces}, (inputs,))

    return outputs, torch.cat([p.detach().reshape(-1) for p in params.values()])


@cache
def dense(network: str, seed: int, operator: str) -> Tensor:
    """The matrix, independent of what is tested."""
    ggn, _, operator = operator.rpartition(" ")
    if operator == "hessian":
        return dense_ggn(network, seed) if ggn else dense_hessian(network, seed)
    whole = dense(network, seed, f"{ggn} hessian".strip())
    if operator == "preconditioned":
        scale = divisor(network, seed).rsqrt().nan_to_num(0.0)
        return scale[:, None] * whole * scale
    places = torch.cat([torch.full((p.numel(),), i) for i, p in enumerate(setting(network, seed).params.values())])
    kept = torch.isin(places, torch.tensor(block_places(network, seed, operator)))
    return whole[kept][:, kept]


def dense_hessian(network: str, seed: int) -> Tensor:
    outputs, flat = flat_function(network, seed)
    row, state = NETWORKS[network], setting(network, seed)
    if row.closed_form is not None:
        return row.closed_form(state.model, state.inputs, state.labels)
    with sdpa_kernel(SDPBackend.MATH):
        found = torch.autograd.functional.hessian(lambda flat: row.loss(outputs(flat), state.labels), flat)
    return (found + found.mT) / 2


def dense_ggn(network: str, seed: int) -> Tensor:
    outputs, flat = flat_function(network, seed)
    row, labels = NETWORKS[network], setting(network, seed).labels
    with sdpa_kernel(SDPBackend.MATH):
        at = outputs(flat)
        jacobian = torch.autograd.functional.jacobian(outputs, flat).reshape(at.numel(), -1)
    core = torch.autograd.functional.hessian(lambda z: row.loss(z.view_as(at), labels), at.reshape(-1))
    return jacobian.mT @ core @ jacobian


def divisor(network: str, seed: int) -> Tensor:
    """AdamW's P, by hand; NaN for parameters that never saw a gradient."""
    state = setting(network, seed)
    pieces = []
    for p in state.params.values():
        moment = state.optimizer.state[p].get("exp_avg_sq", torch.zeros_like(p)).reshape(-1)
        pieces.append(
            torch.where(
                moment > 0, ((moment / (1 - BETAS[1] ** STEPS)).sqrt() + EPS) * (1 - BETAS[0] ** STEPS), torch.nan
            )
        )
    return torch.cat(pieces)


def block_places(network: str, seed: int, operator: str) -> list[int]:
    """Which parameters belong to the block, found without globs of the library."""
    names = list(setting(network, seed).params)
    if operator == "layer":
        layer = NETWORKS[network].layer
        return [i for i, name in enumerate(names) if name.startswith(f"{layer}.")]
    tests: dict[str, Callable[[str], bool]] = {
        "*.weight": lambda name: name.endswith(".weight"),
        "*.bias": lambda name: name.endswith(".bias"),
        "*weight*": lambda name: "weight" in name,
        "*ln*": lambda name: "ln" in name,
        "linear.*": lambda name: name.startswith("linear."),
        "[02].*": lambda name: name.startswith(("0.", "2.")),
        "[gs]*": lambda name: name[0] in "gs",
        "blocks.*.weight": lambda name: name.startswith("blocks.") and name.endswith(".weight"),
    }
    return [i for i, name in enumerate(names) if tests[NETWORKS[network].glob](name)]


def base_operator(cell: Cell) -> HessianOperator | GGNOperator:
    state, row = setting(cell.network, cell.seed), NETWORKS[cell.network]
    if cell.operator.startswith("ggn"):
        return GGNOperator(lambda: state.model(state.inputs), lambda z: row.loss(z, state.labels), state.params)
    return HessianOperator(
        lambda: row.loss(state.model(state.inputs), state.labels), state.params, backend=cell.backend
    )


def chosen_block(cell: Cell) -> str | list[Tensor]:
    """A layer is chosen by its tensors, a glob by itself."""
    if cell.operator.endswith("glob"):
        return NETWORKS[cell.network].glob
    params = list(setting(cell.network, cell.seed).params.values())
    return [params[i] for i in block_places(cell.network, cell.seed, "layer")]


def make_operator(cell: Cell) -> Any:
    state, base = setting(cell.network, cell.seed), base_operator(cell)
    if cell.operator.endswith("hessian"):
        return base
    if cell.operator.endswith("preconditioned"):
        return preconditioned(base, preconditioner(state.optimizer, list(state.params.values())))
    return base.block(chosen_block(cell))


@cache
def solve(cell: Cell) -> Any:
    most = 3000 if cell.method == "power" else MAX_MATVECS  # a comparison, which may take its time
    return top_eigenvalues(make_operator(cell), method=cell.method, tol=TOL, max_matvecs=most, seed=cell.seed)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_converged_value_is_the_top_eigenvalue(cell):
    matrix = dense(cell.network, cell.seed, cell.operator)
    spectrum = torch.linalg.eigvalsh(matrix)
    truth, scale, found = float(spectrum[-1]), float(spectrum.abs().max()), solve(cell)
    assert found.vectors.shape[0] == len(matrix)
    assert found.backend == cell.backend
    noise = 1e-5 * scale if cell.backend == "finite_difference" else 1e-10 * scale
    assert found.lower <= truth + noise
    if found.upper is not None:
        assert found.upper >= truth - noise
    assert found.smallest >= float(spectrum[0]) - noise
    x = found.vectors[:, 0]
    assert float((matrix @ x - found.values[0] * x).norm()) <= float(found.residuals[0]) + 10 * noise
    if found.converged:
        assert abs(float(found.values[0]) - truth) <= WITHIN * abs(truth)


def test_nearly_all_cells_converge():
    counts, failed, products = Counter(), [], Counter()
    for cell in CELLS:
        found = solve(cell)
        kind = (cell.operator, cell.backend, cell.method)
        counts[kind] += 1
        products[kind] += found.matvecs
        if not found.converged:
            failed.append(cell)
    for kind, count in counts.items():
        stuck = [cell for cell in failed if (cell.operator, cell.backend, cell.method) == kind]
        print(f"{' / '.join(kind):50} {count - len(stuck)} of {count}, {products[kind] / count:.0f} products a run")
    print(f"converged: {len(CELLS) - len(failed)} of {len(CELLS)}; not: {', '.join(map(str, failed)) or 'none'}")
    assert len(failed) <= 0.05 * len(CELLS), failed


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("kind", ["hessian", "ggn hessian"])
def test_all_blocks_at_once(network, kind):
    """Each block's eigenvalue, and the largest of them not above that of the whole."""
    cell = Cell(network, kind, "double_backward", "lanczos", 0)
    prefix = "ggn " if kind.startswith("ggn") else ""
    blocks = {name: chosen_block(cell._replace(operator=f"{prefix}{name}")) for name in ("layer", "glob")}
    found = blockwise_sharpness(base_operator(cell), blocks, tol=TOL, max_matvecs=MAX_MATVECS)
    assert list(found) == ["layer", "glob"]
    whole = float(torch.linalg.eigvalsh(dense(network, 0, kind))[-1])
    for name, pairs in found.items():
        truth = float(torch.linalg.eigvalsh(dense(network, 0, f"{prefix}{name}"))[-1])
        assert pairs.converged and float(pairs.values[0]) == pytest.approx(truth, rel=WITHIN)
        assert pairs.lower <= truth * (1 + 1e-12) and pairs.lower <= whole * (1 + 1e-12)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_preconditioner_is_what_adamw_divides_by(network):
    state = setting(network, 0)
    found = preconditioner(state.optimizer, list(state.params.values()))
    torch.testing.assert_close(found, divisor(network, 0), rtol=1e-12, atol=0, equal_nan=True)
    if network == "transformer":
        assert int(found.isnan().sum()) == 4 * (11 - len(state.inputs.unique())) > 0  # tokens that never occur
    if network == "parameters without dimension":
        assert int(found.isnan().sum()) == 2  # the idle parameter


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("backend", ["double_backward", "finite_difference"])
def test_single_precision(network, backend):
    """The same networks as users train them. What converges at 1 % is within 1 %, and double backward always does."""
    row, state = NETWORKS[network], setting(network, 0)
    model = row.make()
    model.load_state_dict({name: value.float() for name, value in state.model.state_dict().items()})
    model.train()
    inputs = state.inputs.float() if state.inputs.is_floating_point() else state.inputs
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    operator = HessianOperator(lambda: row.loss(model(inputs), state.labels), params, backend=backend)
    found = top_eigenvalues(operator, tol=1e-2, max_matvecs=MAX_MATVECS)
    truth = float(torch.linalg.eigvalsh(dense(network, 0, "hessian"))[-1])
    assert found.vectors.dtype == torch.float32
    assert found.converged or backend == "finite_difference"
    if found.converged:
        assert float(found.values[0]) == pytest.approx(truth, rel=1e-2)
