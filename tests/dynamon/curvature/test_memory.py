"""What the solver's vectors take, against the vectors it really holds."""

import os
from types import SimpleNamespace

import pytest
import torch

from dynamon.curvature import (
    Diagonal,
    LinearOperator,
    directional_sharpness,
    memory,
    norm_sharpness,
    top_eigenvalues,
    trace,
)
from dynamon.curvature.memory import basis_memory, empty_cache, free_memory
from dynamon.curvature.operators.vector_space import wide_inner
from tests.peak import Peak

N = 20_000


class Basis(LinearOperator):
    """A diagonal that notes how large the storage is which its argument is a row of."""

    def __init__(self, values):
        super().__init__(len(values), values.dtype, values.device)
        self.values, self.largest = values, 0

    def _product(self, vector):
        self.largest = max(self.largest, vector.untyped_storage().nbytes())
        return self.values * vector


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("certify", [False, True])
def test_the_basis_is_as_large_as_said(dtype, k, certify):
    operator = Basis(torch.linspace(0, 1, N, dtype=dtype))
    with Peak() as peak:
        top_eigenvalues(operator, k, tol=0.3 if certify else 1e-3, certify=certify, max_matvecs=40)
    params = [torch.zeros(N - 700, dtype=dtype), torch.zeros(7, 100, dtype=dtype)]
    assert operator.largest < basis_memory(params, k, certify)
    assert 0.7 * peak.most <= basis_memory(params, k, certify) <= 1.3 * peak.most


def test_half_precision_has_a_basis_in_single():
    values = torch.linspace(0, 1, N, dtype=torch.bfloat16)
    seen = []

    class Watched(Diagonal):
        def _product(self, vector):
            assert vector.dtype == torch.bfloat16
            seen.append(1)
            return super()._product(vector)

    found = top_eigenvalues(Watched(values))
    assert seen and found.vectors.dtype == torch.float32
    assert basis_memory([values]) == basis_memory([values.float()]) == basis_memory([values.double()]) / 2


def test_parameters_add_up():
    params = [torch.zeros(3, 4), torch.zeros(()), torch.zeros(0), torch.zeros(5)]
    assert basis_memory(params) == basis_memory([torch.zeros(18)]) > 0
    assert basis_memory(params, k=3) > basis_memory(params, k=1)
    assert basis_memory(params, certify=True) >= 21 * 18 * 4


def test_a_solve_does_not_hold_much_more():
    """Beyond the basis there are a few vectors at a time, those that come back among them."""
    operator = Diagonal(torch.linspace(0, 1, N))
    with Peak() as peak:
        top_eigenvalues(operator, tol=1e-4, max_matvecs=40)
    said = basis_memory([torch.zeros(N)])
    print(f"peak {peak.most / said:.2f} of what was said")
    assert said <= peak.most <= 2 * said


def test_free_memory_of_the_host():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = free_memory(torch.device("cpu"))
    assert isinstance(free, int) and 0 < free < total
    with open("/proc/meminfo") as lines:
        known = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    assert known["MemFree"] * 0.5 <= free <= known["MemAvailable"] * 1.5


def test_free_memory_follows_what_the_system_says(monkeypatch, tmp_path):
    pages = {"SC_PHYS_PAGES": 100, "SC_PAGE_SIZE": 4096}
    nothing = tmp_path / "nothing"  # as on a Mac
    for name in ("_MEMORY", "_ENTRIES"):
        monkeypatch.setattr(memory, name, nothing)
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    assert free_memory(torch.device("cpu")) == 100 * 4096
    monkeypatch.delattr(os, "sysconf")
    assert free_memory(torch.device("cpu")) == 2**33


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_of_a_container_is_that_of_its_limit(monkeypatch, tmp_path, version):
    """The machine has 100 GiB free, the pod may take 8 and has taken 3, of which 1 is cache; the job has no limit."""
    gib = 2**30
    (tmp_path / "meminfo").write_text(f"MemTotal: {200 * gib // 1024} kB\nMemAvailable: {100 * gib // 1024} kB\n")
    entry, tree = ("0::/pod/job\n", "") if version == 2 else ("9:cpu:/\n4:memory,hugetlb:/pod/job\n", "memory")
    (tmp_path / "entries").write_text(entry)
    limit, used, cache = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    job = tmp_path / "groups" / tree / "pod" / "job"
    job.mkdir(parents=True)
    (job / limit).write_text("max\n" if version == 2 else f"{2**63 - 4096}\n")
    (job / used).write_text(f"{gib}\n")
    (job.parent / limit).write_text(f"{8 * gib}\n")
    (job.parent / used).write_text(f"{3 * gib}\n")
    (job.parent / "memory.stat").write_text(f"anon 5\n{cache} {gib}\n")
    for name, path in (("_MEMORY", "meminfo"), ("_ENTRIES", "entries"), ("_CONTROL_GROUPS", "groups")):
        monkeypatch.setattr(memory, name, tmp_path / path)
    assert free_memory(torch.device("cpu")) == 6 * gib
    (job.parent / used).write_text(f"{300 * gib}\n")
    assert free_memory(torch.device("cpu")) == 0
    (tmp_path / "entries").write_text(entry.replace("/pod/job", "/some/path/of/the/host"))  # seen from inside
    for name in (limit, used):
        (tmp_path / "groups" / tree / name).write_text(f"{(4 if name == limit else 1) * gib}\n")
    assert free_memory(torch.device("cpu")) == 3 * gib


def test_free_memory_of_a_gpu(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(device) or (123, 456))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert free_memory(torch.device("cuda:1")) == 173 and asked == [torch.device("cuda:1")]


@pytest.mark.parametrize("kind", ["xpu", "npu", "mps"])
def test_free_memory_of_other_accelerators(kind, monkeypatch):
    numbers = {"recommended_max_memory": lambda: 200, "current_allocated_memory": lambda: 77}
    asks = numbers if kind == "mps" else {"mem_get_info": lambda device: (123, 456)}
    monkeypatch.setattr(torch, kind, SimpleNamespace(**asks), raising=False)
    assert free_memory(SimpleNamespace(type=kind)) == 123


def test_caches_of_any_device(monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: emptied.append("mps"))
    for kind in ("cpu", "mps", "meta"):
        empty_cache(torch.device(kind))
    assert emptied == ["mps"]


N_WIDE = 2**18
ALONG = {
    "directional": (lambda op, v: directional_sharpness(op, v, v), 1),  # the product
    "norms": (
        lambda op, v: norm_sharpness(v, [v[: N_WIDE // 2], v[N_WIDE // 2 :]], {"a": torch.norm, "b": torch.norm}),
        0,
    ),
    "trace": (lambda op, v: trace(op, num_vectors=2), 4),  # signs, drawn in 8 bytes, and the product
}


@pytest.mark.parametrize("name", ALONG)
def test_sums_in_float64_take_no_copies_of_whole_vectors(name, monkeypatch):
    monkeypatch.setattr("dynamon.curvature.operators.vector_space._AT_A_TIME", 2**10)
    measure, vectors = ALONG[name]
    vector = torch.ones(N_WIDE)
    operator = Diagonal(vector)
    with Peak([vector]) as peak:
        measure(operator, vector)
    assert peak.most <= (vectors + 0.1) * vector.nbytes


@pytest.mark.parametrize("size", [0, 5, 1000])
def test_inner_products_in_pieces(size, monkeypatch):
    monkeypatch.setattr("dynamon.curvature.operators.vector_space._AT_A_TIME", 7)
    one, other = torch.randn(2, size, generator=torch.Generator().manual_seed(0))
    found = wide_inner(one, other)
    assert found.dtype == torch.float64 and found.item() == pytest.approx(
        (one.double() @ other.double()).item(), rel=1e-12
    )
