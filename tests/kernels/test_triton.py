"""The Triton twins against their references: on the GPU where there is one, else interpreted on the CPU.

Triton decides when it is imported whether it interprets, and the other tests may have imported it by then: without a
GPU one test runs this file again, in a process of its own.
"""

import importlib
import importlib.util
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamon.kernels import gradient_stats
from dynamon.kernels.gradient_stats_triton import triton_gradient_stats
from dynamon.kernels.gram_triton import Tiling, symmetric_gram

INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNS = INSTALLED and (INTERPRETED or torch.cuda.is_available())
DEVICE = "cpu" if INTERPRETED else "cuda"
SMALL = Tiling(side=16, depth=16, warps=1, stages=1)  # many tiles in matrices that the interpreter can do
EXACT = 2e-6  # of the product of the lengths of two columns: float32 sums of exact products
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(4, 3), (7,), (), (1, 1), (2, 3, 5), (300, 140), (1024,), (16384 + 1024,)]
OWN = ("l1", "sum_squares", "nonfinite")
CHANGE = ("difference_l1", "difference_sum_squares", "inner")

pytestmark = [  # NumPy's, on its way through the interpreter
    pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]
kernel = pytest.mark.skipif(not RUNS, reason="needs Triton and either a GPU or TRITON_INTERPRET=1")
# What a GPU does in no time, and has a smaller sibling here.
long_when_interpreted = [pytest.mark.slow] if INTERPRETED else []
EXAMPLES = 10 if INTERPRETED else 40


def interpreter_works():
    """Triton before 3.7 counts its loops in a way that NumPy 2.4 refuses."""
    import triton

    def version(module):
        return tuple(int(part) for part in module.__version__.split(".")[:2])

    return version(triton) >= (3, 7) or version(np) < (2, 4)


@pytest.mark.processes
@pytest.mark.skipif(not INSTALLED, reason="Triton is not installed")
@pytest.mark.skipif(RUNS, reason="the tests below run here already")
@pytest.mark.parametrize(
    "which", ["not slow and not processes", pytest.param("slow and not processes", marks=pytest.mark.slow)]
)
def test_all_below_under_the_interpreter(which):
    if not interpreter_works():
        pytest.skip("the interpreter of Triton before 3.7 does not go with NumPy 2.4")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which, __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


@pytest.mark.processes
def test_without_triton_the_modules_import_and_say_what_is_missing():
    code = """
import sys
sys.modules["triton"] = None
import torch
from dynamon.kernels import gradient_stats_triton as triton_gradient_stats
from dynamon.kernels import gram_triton as triton_gram
assert not triton_gram.supported(torch.ones(2, 2)) and not triton_gradient_stats.supported([torch.ones(2)])
for call in (lambda: triton_gram.symmetric_gram(torch.ones(2, 2)),
             lambda: triton_gradient_stats.triton_gradient_stats([torch.ones(2)])):
    try:
        call()
    except ImportError as error:
        print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.count("needs Triton, which is not installed") == 2, result.stderr


# ---- symmetric_gram


def matrix(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def assert_gram(given, rel=EXACT, **options):
    found = symmetric_gram(given, **options)
    wide = given.double() if given.shape[-2] >= given.shape[-1] else given.double().mT
    side = min(given.shape[-2:])
    assert found.shape == (*given.shape[:-2], side, side) and found.dtype == torch.float32
    lengths = torch.linalg.vector_norm(wide, dim=-2)
    assert ((found - wide.mT @ wide).abs() <= rel * lengths[..., None] * lengths[..., None, :]).all()
    assert torch.equal(found, found.mT)


@kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (128, 128), (129, 257), (1, 5), (5, 1), (1, 1)], ids=str)
def test_gram(shape, dtype):
    assert_gram(matrix(*shape, dtype=dtype))


@kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(75, 50), (50, 75), (32, 32), (33, 65), (1, 5), (5, 1), (1, 1)], ids=str)
def test_gram_by_small_tiles(shape, dtype):
    assert_gram(matrix(*shape, dtype=dtype), tiling=SMALL)


@kernel
@settings(deadline=None, max_examples=EXAMPLES, derandomize=True)
@given(st.integers(1, 100), st.integers(1, 100), st.sampled_from(DTYPES), st.integers(0, 2**32))
def test_gram_of_any_shape(rows, columns, dtype, seed):
    assert_gram(matrix(rows, columns, dtype=dtype, seed=seed), tiling=SMALL)


@kernel
def test_every_tile_of_a_triangle_of_several_bands_is_computed():
    deep = Tiling(side=16, depth=128, warps=1, stages=1)
    assert_gram(matrix(500, 273), tiling=deep)  # 18 rows of tiles: two full bands and one that is not


@kernel
@pytest.mark.parametrize("shape", [(3, 40, 17), (2, 3, 17, 40)], ids=str)
def test_gram_of_a_batch(shape):
    assert_gram(matrix(*shape), tiling=SMALL)


@kernel
def test_gram_of_strided_matrices():
    assert_gram(matrix(60, 50).mT, tiling=SMALL)
    assert_gram(matrix(60, 50)[::2, ::3], tiling=SMALL)
    assert_gram(matrix(4, 60, 50)[::2, 5:], tiling=SMALL)
    assert_gram(matrix(20, 3, 30).transpose(0, 1), tiling=SMALL)
    assert_gram(matrix(1, 30).expand(40, 30), tiling=SMALL)


@kernel
@pytest.mark.parametrize(("precision", "rel"), [("tf32x3", EXACT), ("tf32", 2e-3)])
def test_gram_in_other_precisions(precision, rel):  # the interpreter multiplies exactly whatever it is told
    assert_gram(matrix(300, 200), rel=rel, precision=precision)


@kernel
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (0, 3, 4), (2, 0, 4)], ids=str)
def test_gram_of_nothing(shape):
    assert symmetric_gram(matrix(*shape)).shape == (*shape[:-2], min(shape[-2:]), min(shape[-2:]))


@kernel
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gram_spreads_what_is_not_finite(bad):
    given = matrix(40, 35)
    given[3, 20] = bad
    found = symmetric_gram(given, tiling=SMALL).isfinite()
    expected = (given.mT @ given).isfinite()
    assert torch.equal(found, expected) and expected.sum() == 34**2


@kernel
def test_gram_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="got torch.float64"):
        symmetric_gram(matrix(3, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"got torch.float32 \(3,\)"):
        symmetric_gram(matrix(3))
    with pytest.raises(ValueError, match="has no derivative"):
        symmetric_gram(matrix(3, 3).requires_grad_())
    with pytest.raises(ValueError, match="precision must be one of"):
        symmetric_gram(matrix(3, 3), precision="high")
    with pytest.raises(ValueError, match="strides below 2.24 together"):  # offsets within a tile have 32 bits
        symmetric_gram(matrix(2, 2).as_strided((1, 1), (2**23, 2**23)))


# ---- triton_gradient_stats


def tensors(seed, dtype=torch.float32, shapes=SHAPES):
    return [matrix(*shape, dtype=dtype, seed=seed + i) for i, shape in enumerate(shapes)]


def refreshed(stored, gradient):
    """Whether the gradient is stored to the bit; the interpreter cuts bfloat16 off where a GPU rounds to nearest."""
    rounded = gradient.to(stored.dtype)
    if INTERPRETED and stored.dtype == torch.bfloat16 != gradient.dtype:
        return torch.allclose(stored.double(), rounded.double(), rtol=2**-7, atol=0, equal_nan=True)
    return torch.allclose(stored, rounded, rtol=0, atol=0, equal_nan=True)


def assert_stats(gradients, previous, rel=2e-6):
    """The twin against the reference on float64 copies; `previous` is refreshed to the bit, gradients are left."""
    stored, copies = [p.clone() for p in previous], [g.clone() for g in gradients]
    expected = gradient_stats([g.double() for g in gradients], [p.double() for p in previous])
    found = triton_gradient_stats(gradients, stored)
    for name in (*OWN, *CHANGE[:-1]):
        field = getattr(found, name)
        assert field.shape == (len(gradients),) and field.dtype == torch.float32
        torch.testing.assert_close(field.double(), getattr(expected, name), rtol=rel, atol=1e-30, msg=name)
    lengths = torch.stack([g.double().norm() * p.double().norm() for g, p in zip(gradients, previous, strict=True)])
    assert ((found.inner - expected.inner).abs() <= rel * lengths).all()
    assert all(refreshed(p, g) for p, g in zip(stored, gradients, strict=True))
    assert all(torch.equal(g, copy) for g, copy in zip(gradients, copies, strict=True))
    alone = triton_gradient_stats(gradients)
    for name in OWN:
        torch.testing.assert_close(getattr(alone, name), getattr(found, name), rtol=rel, atol=0)
    assert all(getattr(alone, name) is None for name in CHANGE)


@kernel
@pytest.mark.parametrize(
    ("dtype", "stored"),
    [pytest.param(d, s, marks=[] if d == s else long_when_interpreted) for d in DTYPES for s in DTYPES],
    ids=str,
)
def test_stats(dtype, stored):  # those of mixed dtypes are below, in one call
    assert_stats(tensors(0, dtype), tensors(100, stored))


@kernel
@settings(deadline=None, max_examples=EXAMPLES, derandomize=True)
@given(
    st.lists(st.lists(st.integers(1, 6), max_size=3), min_size=1, max_size=5),
    st.integers(0, 2**31),
    st.integers(-12, 12),
)
def test_stats_of_any_shapes_and_scales(shapes, seed, exponent):
    scale = 10.0**exponent
    assert_stats(
        [g * scale for g in tensors(seed, shapes=shapes)], [p * scale for p in tensors(seed + 9, shapes=shapes)]
    )


@kernel
@pytest.mark.parametrize(
    "scale",
    [1e-42, 1e-22, 1e37, *(pytest.param(s, marks=long_when_interpreted) for s in (1e-30, 1e-12, 1.0, 1e15, 1e22))],
)
def test_stats_in_the_whole_range_of_float32(scale):
    gradients, previous = ([t * scale for t in tensors(seed)] for seed in (0, 100))
    expected = gradient_stats([g.double() for g in gradients], [p.double() for p in previous])
    found = triton_gradient_stats(gradients, previous, dtype=torch.float64)
    for name in (*OWN, *CHANGE[:-1]):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=0, msg=name)
    lengths = (expected.sum_squares * gradient_stats([p.double() for p in tensors(100)]).sum_squares).sqrt() * scale
    assert ((found.inner - expected.inner).abs() <= 1e-5 * lengths).all()


@kernel
def test_stats_of_mixed_dtypes():
    kinds = [DTYPES[i % 3] for i in range(len(SHAPES))]
    gradients = [g.to(kind) for g, kind in zip(tensors(0), kinds, strict=True)]
    assert_stats(gradients, [p.to(kind) for p, kind in zip(tensors(100), reversed(kinds), strict=False)])


@kernel
def test_stats_of_strided_tensors():
    channels_last = matrix(2, 3, 4, 5).to(memory_format=torch.channels_last)
    gradients = [matrix(40, 30).mT, channels_last, matrix(50, 40)[::2, 1::3], channels_last, matrix(1, 9).expand(7, 9)]
    assert_stats(gradients, [torch.zeros_like(g) + 1 for g in gradients])
    assert_stats(gradients, [torch.ones(g.shape, device=DEVICE) for g in gradients])


@kernel
def test_a_stored_gradient_with_gaps_is_filled_and_nothing_beside_it():
    gradient, room = matrix(30, 20), torch.full((60, 40), 7.0, device=DEVICE)
    triton_gradient_stats([gradient], [room[::2, ::2]])
    assert torch.equal(room[::2, ::2], gradient)
    assert (room == 7).sum() == 60 * 40 - 30 * 20


@kernel
def test_stats_of_views_into_one_buffer_that_are_not_aligned():
    buffer, sizes = matrix(5000), [1, 1023, 7, 2048, 1500]
    assert_stats(list(buffer[: sum(sizes)].split(sizes)), list(matrix(5000, seed=1)[: sum(sizes)].split(sizes)))


@kernel
def test_nonfinite_entries_are_counted_and_carried():
    gradients = tensors(0)
    gradients[1][2], gradients[1][4], gradients[4][0, 0, 0] = math.nan, math.inf, -math.inf
    gradients[5][200, 17] = math.nan
    previous = [torch.zeros_like(g) for g in gradients]
    stored = [p.bfloat16() for p in previous]
    found = triton_gradient_stats(gradients, stored)
    expected = gradient_stats([g.double() for g in gradients], [p.double() for p in previous], torch.float32)
    assert found.nonfinite.tolist() == expected.nonfinite.tolist() == [0, 2, 0, 0, 1, 1, 0, 0]
    for name in (*OWN, *CHANGE):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=0, equal_nan=True)
    assert all(refreshed(s, g) for s, g in zip(stored, gradients, strict=True))
    assert stored[1].isnan().tolist() == [False, False, True, False, False, False, False]


@kernel
def test_infinity_twice_has_no_difference():
    gradients = [torch.tensor([1.0, math.inf], device=DEVICE)]
    found = triton_gradient_stats(gradients, [g.clone() for g in gradients])
    assert found.l1.isinf().all() and found.difference_l1.isnan().all() and found.nonfinite.tolist() == [1]


@kernel
def test_what_is_not_finite_shows_in_its_own_tensor_only():
    size = 16384 + 1030  # whole chunks, and the rest of one
    gradients, stored = (matrix(6, size, seed=seed).clone() for seed in (0, 1))
    gradients[0, [5, 17000]], gradients[1, 2000] = math.nan, -math.inf
    stored[2, 3000], stored[3, 17410] = math.nan, math.inf
    gradients[4, 7], stored[4, 7] = 3e38, -3e38  # too far apart
    found = triton_gradient_stats(list(gradients), list(stored), torch.float64)
    assert found.nonfinite.tolist() == [2, 1, 0, 0, 0, 0]
    assert found.l1.isfinite().tolist() == [False, False, True, True, True, True]
    assert found.difference_l1.isfinite().tolist() == [False] * 5 + [True]


@kernel
@pytest.mark.parametrize(
    "exponents",
    [
        (-100, 60),
        (90, -100),
        *(pytest.param(e, marks=long_when_interpreted) for e in ((-100, -100), (60, -100), (90, 90), (-40, 70))),
    ],
)
def test_chunks_of_any_size_side_by_side(exponents):
    """The scale of a chunk is its own, and that of either gradient too."""
    gradient, previous = matrix(40000), matrix(40000, seed=1)
    gradient[:9000] *= 2.0 ** exponents[0]
    previous[:9000] *= 2.0 ** exponents[1]
    gradient[20000:33000] = 0
    expected = gradient_stats([gradient[:8192].double()], [previous[:8192].double()])
    found = triton_gradient_stats([gradient[:8192]], [previous[:8192].clone()], torch.float64)
    for name in (*OWN, *CHANGE[:-1]):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=2e-6, atol=0, msg=name)
    lengths = gradient[:8192].double().norm() * previous[:8192].double().norm()
    assert (found.inner - expected.inner).abs() <= 2e-6 * lengths
    whole = gradient_stats([gradient.double()], [previous.double()])
    found = triton_gradient_stats([gradient], [previous], torch.float64)
    for name in (*OWN, *CHANGE[:-1]):
        torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=2e-6, atol=0, msg=name)


@kernel
@pytest.mark.parametrize("make", [float, lambda x: torch.tensor([x], device=DEVICE)], ids=["number", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_stats_of_multiples(dtype, make):
    gradients, previous = tensors(0, dtype), tensors(100, dtype)
    expected = gradient_stats([g.double() / 64 for g in gradients], [p.double() for p in previous])
    found = triton_gradient_stats(gradients, previous, torch.float64, scale=make(1 / 64))
    for name in (*OWN, *CHANGE[:-1]):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=2e-6, atol=0, msg=name)
    assert all(torch.equal(p, g / 64) for p, g in zip(previous, gradients, strict=True))


@kernel
def test_stats_do_not_depend_on_the_default_dtype():
    gradients, previous = tensors(0), tensors(100)
    expected = triton_gradient_stats(gradients, [p.clone() for p in previous], torch.float64)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = triton_gradient_stats([g.clone() for g in gradients], previous, torch.float64)
    finally:
        torch.set_default_dtype(torch.float32)
    for name in (*OWN, *CHANGE):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


@kernel
def test_tables_that_stay_on_the_device_are_those_of_these_tensors():
    """Other addresses, other sizes at the same addresses, fewer tensors: nothing of the call before is used."""
    buffers = matrix(4, 3000), matrix(4, 3000, seed=1)
    for sizes in ([3000, 3000, 17], [17, 3000, 3000], [3000], [17, 3000, 3000], [1, 1, 1]):
        for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
            lists = [[rows[order[i]][:size] for i, size in enumerate(sizes)] for rows in buffers]
            assert_stats(*lists)


@kernel
def test_the_dispatch_takes_the_twin(monkeypatch):
    module = importlib.import_module("dynamon.kernels.gradient_stats")
    monkeypatch.setattr(module, "_may_have_triton", lambda device: True)
    monkeypatch.setattr(module, "_composed", None)
    module.warm_up(torch.device(DEVICE), [torch.float32, torch.bfloat16, torch.float64])
    gradients = tensors(0)
    previous = [torch.zeros_like(g) for g in gradients]
    found = module.gradient_stats(gradients, previous, torch.float64)
    torch.testing.assert_close(found.inner, torch.zeros_like(found.inner))
    assert all(torch.equal(p, g) for p, g in zip(previous, gradients, strict=True))
    assert module.gradient_stats(gradients).inner is None


@kernel
def test_where_it_does_not_compile_one_sentence_is_logged_and_nothing_is_lost(monkeypatch, caplog):
    module = importlib.import_module("dynamon.kernels.gradient_stats")
    twin = importlib.import_module("dynamon.kernels.gradient_stats_triton")

    class Broken:
        def __getitem__(self, grid):
            raise RuntimeError("Failed to find C compiler.\nMore of it.")

    monkeypatch.setattr(module, "_may_have_triton", lambda device: True)
    monkeypatch.setattr(twin, "tensor_stats", Broken())  # the second kernel: the first would have written by then
    monkeypatch.setattr(twin, "_runs", {})
    monkeypatch.setattr(twin, "_told", set())
    gradients, previous = tensors(0), tensors(100)
    expected = gradient_stats([g.double() for g in gradients], [p.double() for p in previous])
    for call in (lambda: module.warm_up(torch.device(DEVICE)), lambda: module.gradient_stats(gradients)):
        call()
    found = module.gradient_stats(gradients, previous, torch.float64)
    torch.testing.assert_close(found.difference_l1, expected.difference_l1, rtol=1e-5, atol=0)
    (record,) = caplog.records
    assert "RuntimeError: Failed to find C compiler." in record.getMessage() and "\n" not in record.getMessage()


@kernel
def test_stats_of_an_empty_list_are_the_reference_s():
    assert triton_gradient_stats([]).l1.shape == (0,) and triton_gradient_stats([]).inner is None
    assert triton_gradient_stats([], []).inner.shape == (0,)


@kernel
@pytest.mark.parametrize(
    ("gradients", "previous", "message"),
    [
        ([torch.ones(0)], None, "cannot take an empty tensor"),
        ([torch.ones(2)], [torch.ones(3)], "same shapes in the same order"),
        ([torch.ones(2)], [], "same shapes in the same order"),
        ([torch.ones(2, dtype=torch.float64)], None, "got torch.float64"),
        ([torch.ones(2)], [torch.ones(2, dtype=torch.int32)], "got torch.int32"),
    ],
)
def test_bad_arguments(gradients, previous, message):
    gradients = [g.to(DEVICE) for g in gradients]
    with pytest.raises(ValueError, match=message):
        triton_gradient_stats(gradients, previous and [p.to(DEVICE) for p in previous])


# ---- what the compiler makes of them, which needs no GPU

COMPILE = """
import re
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dynamon.kernels.gradient_stats_triton import _BYTES, _DOWN, _FEW, _LANES, _UP, _WARPS
from dynamon.kernels.gradient_stats_triton_kernels import chunk_stats, tensor_stats
from dynamon.kernels.gram_triton import _BAND, FULL, HALF, _lower_tiles

def ptx(function, constants, aligned, types, warps, stages=3):
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=function, signature=signature, constexprs=values, attrs=attributes)
    options = dict(num_warps=warps, num_stages=stages)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

for kind, tiling, precision in (("bf16", HALF, "ieee"), ("fp32", FULL, "tf32x3"), ("fp32", FULL, "ieee")):
    constants = dict(side_stride=1, PRECISION=precision, SIDE=tiling.side, DEPTH=tiling.depth, BAND=_BAND, WIDEN=False)
    aligned = ("matrix", "out", "length", "side", "batch_stride", "length_stride")
    text = ptx(_lower_tiles, constants, aligned, dict(matrix="*" + kind, out="*fp32"), tiling.warps, tiling.stages)
    assert ("wgmma" in text) == (precision != "ieee" or kind == "bf16"), (kind, precision, "tensor cores")
    assert re.search(r"st[.]global[^ ]*[.]v4", text), "16 bytes a time"
tables = dict(table="*i64", owner="*i32", layout="*i64", scale="*fp32", partials="*fp64", out="*fp64")
for kind, compare in ((tl.float32, True), (tl.bfloat16, True), (tl.float32, False)):
    each = _BYTES * 8 // kind.primitive_bitwidth // (128 * _WARPS)
    constants = dict(GRADIENT=kind, PREVIOUS=kind, COMPARE=compare, THREADS=32 * _WARPS, EACH=each, LANES=_LANES)
    constants |= dict(UP=2.0**_UP, DOWN=2.0**-_DOWN, FEW=_FEW)
    text = ptx(chunk_stats, constants, ("table", "owner", "layout", "scale", "partials"), tables, _WARPS)
    assert len(re.findall(r"ld[.]global[^ ]*[.]v4", text)) >= 4 * (3 if compare else 1), "16 bytes a time"
    assert len(re.findall(r"st[.]global[^ ]*[.]v4", text)) == (4 if compare else 0), "16 bytes a time"
# Numbers of chunks and tensors are not compiled in: nothing is compiled anew where they divide by 16, or are 1.
assert [p.name for p in chunk_stats.params if p.do_not_specialize] == ["tensors", "chunks", "begin"]
assert [p.name for p in tensor_stats.params if p.do_not_specialize] == ["tensors", "chunks"]
ptx(tensor_stats, dict(WIDTH=1024), ("partials", "layout", "out"), tables, 4)
print("compiled")
"""


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="Triton is not installed")
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux only")
def test_both_compile_for_hopper_with_tensor_cores_and_wide_accesses(tmp_path):
    # Triton reads a function's source from a file.
    script = tmp_path / "compile.py"
    script.write_text(COMPILE)
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert result.stdout == "compiled\n", result.stderr[-3000:]
