"""Readings of parts against those of the same tensors whole, in float32, float64 and bfloat16."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dynamon.distributed.dtensor import to_local
from dynamon.distributed.ranks import Ranks
from dynamon.layers import Layer, describe_layers
from dynamon.norms import update_norm
from dynamon.quantities.gradient_reader import GradientReader
from dynamon.quantities.primal_norms import StepNorms, reduce_steps
from dynamon.quantities.readings import GradientReadings
from dynamon.quantities.updates import primal_norms
from dynamon.quantities.weights import WeightReadings, layer_spectra, weight_readings
from tests.models import gpt
from tests.processes import in_processes

pytestmark = pytest.mark.filterwarnings("ignore")
ITERATIVE = (
    "operator",
    "update",
    "ratio",
    "sigma_max",
    "sigma_lower",
    "sigma_upper",
    "stable_rank",
    "log2_spectral_condition",
)
SUMS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-6}


class Twins:
    """The layers of a small GPT, whole and in parts, with random tensors of their shapes."""

    def __init__(self, dtype: torch.dtype, size: int) -> None:
        self.mesh = init_device_mesh("cpu", (size,))
        self.generator = torch.Generator().manual_seed(0)
        self.whole = describe_layers(gpt(depth=1, tied=True).to(dtype))
        self.parted = [replace(la, parameter=torch.nn.Parameter(self.cut(la.parameter))) for la in self.whole]
        self.ranks = Ranks(torch.device("cpu"))

    def cut(self, tensor: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(tensor.detach().clone(), self.mesh, (Shard(0),))

    def near(self, scale: float) -> dict[str, torch.Tensor]:
        """Weights some steps away, the same on every process."""
        return {la.name: la.parameter.detach() + scale * self.like(la) for la in self.whole}

    def like(self, layer: Layer) -> torch.Tensor:
        own = layer.parameter
        return torch.randn(own.shape, generator=self.generator, dtype=torch.float64).to(own.dtype)

    def parts(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: to_local(self.cut(tensor)) for name, tensor in tensors.items()}

    def set_gradients(self, scale: float = 1.0, without: int = -1) -> None:
        for i, (one, other) in enumerate(zip(self.whole, self.parted, strict=True)):
            gradient = self.like(one) * scale
            one.parameter.grad = None if i == without else gradient
            other.parameter.grad = None if i == without else self.cut(gradient)


def same_readings(one: GradientReadings, other: GradientReadings, rtol: float, iterative: float) -> None:
    assert one.window == other.window
    for field in (field for field in fields(GradientReadings) if field.name != "window"):
        within = iterative if "dual" in field.name else rtol
        a, b = getattr(one, field.name).astype(float), getattr(other, field.name).astype(float)
        size = np.nanmax(np.abs(a)) if np.isfinite(a).any() else 1.0
        size = np.nanmax(one.l2) ** 2 if field.name == "inner" else size  # its terms cancel
        np.testing.assert_allclose(b, a, rtol=within, atol=within * size * 0.1, err_msg=field.name)


def follow_formulas(found: GradientReadings, gradients: list, before: list, dtype: torch.dtype) -> None:
    """What follows from sums over entries, written out in float64; of shards as of whole gradients."""
    rtol = 1e-5 if dtype == torch.bfloat16 else SUMS[dtype]
    for i, (g, p) in enumerate(zip(gradients, before, strict=True)):
        if g is None:
            assert not found.present[i] and np.isnan(found.l2[i])
            continue
        g = g.double()
        np.testing.assert_allclose([found.l1[i], found.l2[i]], [g.abs().sum(), g.norm()], rtol=rtol)
        assert found.compared[i] == (p is not None)
        if p is not None:
            change = g - p.double()
            np.testing.assert_allclose(found.difference_l2[i], change.norm(), rtol=rtol)
            np.testing.assert_allclose(found.inner[i], (g * p.double()).sum(), atol=rtol * float(g.norm() * p.norm()))


def check_gradients(twins: Twins, family: str, dtype: torch.dtype) -> None:
    one, other = GradientReader(twins.whole, family), GradientReader(twins.parted, family)
    rtol, iterative = SUMS[dtype], 1e-4 if dtype != torch.float64 else 1e-6
    twins.set_gradients(0.5)
    for reader in (one, other):
        reader.store_part(0.25, 2.0)
    with pytest.raises(ValueError, match="summed over the processes"):
        other.watch_ranks()
    before = [None] * len(twins.whole)
    for step in range(4):
        twins.set_gradients(without=3 if step == 2 else -1)
        found = []
        for reader in (one, other):
            assert reader.begin(step)
            pending = reader.read(dual=step != 1)
            found.append((reader.read() if step == 3 else pending).wait())
        same_readings(*found, rtol=rtol, iterative=iterative)
        gradients = [layer.parameter.grad for layer in twins.whole]
        for readings in found:
            follow_formulas(readings, gradients, before, dtype)
        before = gradients
    later = twins.whole[0].parameter.grad.abs().sum()
    assert float(later) > 0 and not np.isnan(found[0].difference_dual).all()
    state = other.state_dict()["previous"]
    assert all(torch.equal(g, one.state_dict()["previous"][name]) for name, g in state.items())
    fresh = GradientReader(twins.parted, family)
    fresh.load_state_dict({"previous": state})
    twins.set_gradients()
    for reader in (other, fresh):
        reader.begin("next")
    assert np.array_equal(other.read().wait().difference_dual, fresh.read().wait().difference_dual, equal_nan=True)


def check_weights(twins: Twins, dtype: torch.dtype) -> None:
    before, earlier = twins.near(0.01), twins.near(0.03)
    del before[twins.whole[2].name], earlier[twins.whole[4].name]
    alone = weight_readings(twins.whole, before, earlier)
    with twins.ranks.collective_section():
        readings = weight_readings(twins.parted, twins.parts(before), twins.parts(earlier), twins.ranks)
    for field in fields(WeightReadings):
        within = 1e-4 if field.name in ITERATIVE or dtype == torch.float32 and field.name == "rotation" else 1e-6
        torch.testing.assert_close(
            getattr(readings, field.name), getattr(alone, field.name), rtol=within, atol=1e-7, equal_nan=True,
            msg=lambda m, f=field: f"{f.name}: {m}",
        )  # fmt: skip
    known = [i for i, la in enumerate(twins.whole) if la.name in before and la.name in earlier]
    assert readings.cosine.isnan().tolist() == [i not in known for i in range(len(twins.whole))]
    names, spectra = layer_spectra(twins.whole)
    found = layer_spectra(twins.parted)
    assert found[0] == names
    for field in fields(type(spectra)):
        torch.testing.assert_close(
            getattr(found[1], field.name), getattr(spectra, field.name), rtol=1e-4, atol=1e-6, equal_nan=True
        )


def check_steps(twins: Twins, family: str) -> None:
    norms = [update_norm(layer, family) for layer in twins.whole]
    steps = [twins.like(layer) for layer in twins.whole]
    gradients = [twins.like(layer) for layer in twins.whole]
    parts = [to_local(twins.cut(step)) for step in steps]
    half = len(steps) // 2
    sets = []
    for chosen in (range(half), range(half, len(steps))):
        known = {place: parts[i] for place, i in enumerate(chosen) if i != 1}
        sets.append(StepNorms([twins.parted[i] for i in chosen], [norms[i] for i in chosen], known, twins.ranks))
    own = torch.stack([torch.linalg.vector_norm(to_local(twins.cut(gradient)).double()) for gradient in gradients])
    with twins.ranks.collective_section():
        lengths, found = reduce_steps(sets, own, twins.ranks)
    expected = primal_norms(twins.whole, norms, steps).double()
    expected[1] = torch.nan
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0, equal_nan=True)
    wholes = torch.stack([torch.linalg.vector_norm(gradient.double()) for gradient in gradients])
    torch.testing.assert_close(lengths, wholes, rtol=1e-6, atol=0)


def check(rank: int, size: int) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        twins = Twins(dtype, size)
        for family in ("sign", "euclidean", "spectral"):
            check_gradients(twins, family, dtype)
            check_steps(twins, family)
        check_weights(twins, dtype)


@pytest.mark.processes
def test_two_processes() -> None:
    in_processes(lambda rank: check(rank, 2), 2, group=True)


@pytest.mark.processes
@pytest.mark.slow
def test_four_processes() -> None:
    in_processes(lambda rank: check(rank, 4), 4, group=True)
