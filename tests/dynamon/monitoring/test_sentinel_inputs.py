"""What the sentinel sees of a batch: sizes and spreads that are right, and which tensors it follows."""

import math

import numpy as np
import pytest
import torch

from dynamon.monitoring.levels import Levels
from dynamon.monitoring.sentinel_inputs import LEAST, MOST_TENSORS, BatchSample, InputSeries, describe, sample_batch

CPU = torch.device("cpu")
SHAPES = [(64, 3, 32, 32), (32, 10), (7,), (1, 50), (5, 1), (300, 200, 3), (4096, 2), (2, 3, 5, 7, 11), (1,)]


def rows(sample: BatchSample) -> np.ndarray:
    return torch.cat(sample.entries).double().numpy() if sample.entries else np.zeros(0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced", "expanded"])
def test_entries_are_those_of_the_tensor(shape: tuple[int, ...], layout: str) -> None:
    """Whatever its strides: rows by rows, the same features of each, at most 1024 in all, and a copy."""
    numbers = torch.arange(math.prod(shape), dtype=torch.float64).view(shape)
    if layout == "transposed":
        numbers = numbers.permute(*reversed(range(len(shape)))).contiguous().permute(*reversed(range(len(shape))))
    elif layout == "sliced":
        numbers = torch.stack([numbers, numbers], -1)[..., 0]
    elif layout == "expanded":
        numbers = numbers[:1].expand(shape)
    sample = sample_batch([numbers], CPU)
    (n, m), (entries,) = sample.shapes[0], sample.entries
    assert entries.shape == (n * m,) and n * m <= 1024 and entries.dtype == torch.float32
    table = entries.double().view(n, m)
    features = math.prod(shape[1:])
    assert len({float(v) for v in table[0]}) == m  # no feature twice
    if layout != "expanded":
        assert torch.equal(table % features, (table % features)[:1].expand(n, m)) and m >= min(features, 16)
        assert len(set((table[:, 0] // features).tolist())) == n == min(shape[0], 1024 // m)
    before = entries.clone()
    if layout != "expanded":
        numbers.zero_()
        assert torch.equal(entries, before)


def test_size_and_spreads_are_those_of_their_definition() -> None:
    generator = np.random.default_rng(0)
    for n, m in ((16, 64), (2, 3), (50, 1), (1, 9)):
        entries = generator.normal(1.0, 2.0, (n, m)) * (generator.random((n, m)) < 0.7)
        size, across, within = describe(entries)
        mean_square = np.mean(entries**2)
        assert math.isclose(size, math.sqrt(np.mean(entries[entries != 0] ** 2)), rel_tol=1e-12)
        assert math.isclose(across, math.sqrt(np.mean(entries.var(0)) / mean_square), rel_tol=1e-9, abs_tol=1e-7)
        assert math.isclose(within, math.sqrt(np.mean(entries.var(1)) / mean_square), rel_tol=1e-9, abs_tol=1e-7)
    image = generator.normal(size=(1, 64)).repeat(16, 0)
    assert describe(image)[1] < 1e-7 and describe(image)[2] > 0.9
    assert describe(image.T)[1] > 0.9 and describe(image.T)[2] < 1e-7
    assert describe(np.zeros((4, 4))) == (0.0, 0.0, 0.0)
    assert np.isnan(describe(np.array([[1.0, np.inf]]))).all() and np.isnan(describe(np.array([[np.nan]]))).all()


def test_which_tensors_are_looked_at() -> None:
    """Floating ones and integers of two dimensions; no flags, no objects, the first three."""
    pixels, tokens = torch.rand(8, 3, 9, 9), torch.randint(9, (8, 5))
    keys = lambda batch: sample_batch(batch, CPU).keys  # noqa: E731
    assert keys((pixels, torch.arange(8))) == ("0 float 4",)
    assert keys({"ids": tokens, "mask": tokens > 3, "label": torch.arange(8)}) == ("0 torch.int64 2",)
    assert keys([pixels.to_sparse(), pixels.bool(), torch.empty(0, 4), pixels.to(torch.complex64), "text", None]) == ()
    assert keys([(pixels * 255).byte(), [pixels, (pixels, pixels)]]) == ("0 torch.uint8 4", "1 float 4", "2 float 4")
    assert keys(torch.nested.nested_tensor([torch.rand(2), torch.rand(3)], layout=torch.jagged)) == ()
    assert sample_batch((pixels, torch.arange(8)), CPU).is_batch
    assert not sample_batch([torch.rand(3, 20, 30), torch.rand(3, 25, 30), torch.rand(5, 4)], CPU).is_batch
    assert sample_batch(pixels.half(), CPU).entries[0].dtype == torch.float32


def judged(batches: list) -> np.ndarray:
    """``[T, 9]``, which series of which batch are spikes."""
    series = InputSeries()
    levels = Levels(np.log(LEAST * MOST_TENSORS), np.full(series.count, float(series.count)))
    found = []
    for batch in batches:
        sample = sample_batch(batch, CPU)
        limits = levels.limits
        found.append(levels.see(series.numbers([sample], rows(sample))[0]) >= limits)
    return np.array(found)


def images(generator: torch.Generator, count: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=generator)


SIZE, ACROSS, WITHIN = range(3)
FAULTS = {
    "multiplied": (lambda x: x * 64, [SIZE]),
    "one image": (lambda x: x[:1].expand_as(x).clone(), [ACROSS]),
    "blank images": (lambda x: x[:, :1, :1, :1].expand_as(x).clone(), [WITHIN]),
    "zeros": (torch.zeros_like, [ACROSS, WITHIN]),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_an_unusual_batch_is_found(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    change, expected = FAULTS[name]
    batches = [[images(generator).to(dtype), torch.arange(32)] for _ in range(200)]
    batches[150][0] = change(batches[150][0])
    found = judged(batches)
    assert np.argwhere(found).tolist() == [[150, at] for at in expected]


@pytest.mark.parametrize("change", [lambda x: x[:1].expand_as(x), lambda x: x[0, 0].expand_as(x)])
def test_tokens_that_repeat_are_found(change) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [[torch.randint(50, (8, 33), generator=generator)[:, :-1]] for _ in range(200)]
    batches[150] = [change(batches[150][0])]
    found = judged(batches)
    assert set(np.argwhere(found)[:, 0].tolist()) == {150} and found[150, ACROSS]


def padded(generator: torch.Generator) -> torch.Tensor:
    """Token ids, or features, of which the last nine tenths may be padding; now and then of one length in a batch."""
    tokens = torch.randint(2, 1000, (16, 128), generator=generator)
    lengths = (torch.rand(16, generator=generator) * 128).long().clamp(min=4)
    if torch.rand((), generator=generator) < 0.3:
        lengths = lengths.new_full((16,), int(lengths[0]))
    return tokens * (torch.arange(128) < lengths[:, None])


USUAL = {
    "padding": padded,
    "features that are padded": lambda g: padded(g).float() / 100,
    "masks": lambda g: (padded(g) > 0).float(),
    "masks of integers": lambda g: (padded(g) > 0).long(),
    "additive masks": lambda g: (padded(g) == 0).float() * -1e9,
    "infinite masks": lambda g: torch.where(padded(g) == 0, -torch.inf, 0.0),
    "one-hot": lambda g: torch.eye(5)[torch.randint(5, (16,), generator=g)],
    "weights": lambda g: torch.ones(16),
    "one sample": lambda g: torch.randn(1, 3, 8, 8, generator=g),
    "one number": lambda g: torch.randn(1, generator=g),
    "two samples": lambda g: torch.randn(2, 3, generator=g),
    "the last batch": lambda g: images(g, int(torch.randint(1, 32, (), generator=g))),
    "sizes of any kind": lambda g: images(g) * torch.randn((), generator=g).mul(1.5).exp(),
    "heavy tails": lambda g: torch.randn(32, 20, generator=g) / torch.rand(32, 20, generator=g),
    "counts": lambda g: torch.poisson(torch.full((32, 50), 0.02), generator=g),
    "resolutions": lambda g: torch.randn(8, 3, *[int(torch.randint(8, 64, (), generator=g))] * 2, generator=g),
    "bright and dark": lambda g: images(g) * (20.0 if torch.rand((), generator=g) < 0.1 else 1.0),
    "a small spread": lambda g: 300 + torch.randn(32, 4, generator=g) * 1e-3,
}


@pytest.mark.parametrize("name", USUAL)
def test_usual_batches_are_left_alone(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    found = judged([[USUAL[name](generator)] for _ in range(3000)])
    known = 1500 if name == "bright and dark" else 0  # by then it is usual that one batch in ten is so
    assert not found[known:].any(), np.argwhere(found)[:5]


def test_batches_of_two_kinds_have_levels_of_their_own() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = lambda: [images(generator) * 255], lambda: [torch.rand(32, 10, generator=generator)]  # noqa: E731
    batches = [one() if i % 3 else other() for i in range(400)]
    batches[301] = [images(generator) * 255 * 64]
    assert set(np.argwhere(judged(batches))[:, 0].tolist()) == {301}


def test_what_is_unusual_is_described() -> None:
    generator = torch.Generator().manual_seed(0)
    series, levels = InputSeries(), Levels(np.log(LEAST * MOST_TENSORS))
    for step in range(101):
        batch = [torch.arange(8), images(generator, 8), images(generator, 8) * (64 if step == 100 else 1)]
        sample = sample_batch(batch, CPU)
        numbers = series.numbers([sample], rows(sample))[0]
        levels.see(numbers)
    told = series.describe(3, levels.rises(numbers))
    assert told["spike/input"] == 2 and 60 < told["spike/input_size"] < 68 and 0.9 < told["spike/input_spread"] < 1.1


def test_a_state_goes_on() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = [sample_batch([images(generator), torch.ones(32)], CPU) for _ in range(90)]
    whole, first, second = InputSeries(), InputSeries(), InputSeries()
    expected = [whole.numbers([one], rows(one)) for one in samples]
    for one in samples[:40]:
        first.numbers([one], rows(one))
    second.load_state_dict(first.state_dict())
    found = [second.numbers([one], rows(one)) for one in samples[40:]]
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(found, expected[40:], strict=True))
