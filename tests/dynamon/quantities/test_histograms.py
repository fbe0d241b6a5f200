"""Histograms against numpy.histogram on the same edges, and what they do with awkward tensors."""

import numpy as np
import pytest
import torch

from dynamon.quantities.histograms import _BINS, Histogram, _spread_counts, histogram_table, read_histograms


def gaussian(*shape: int, scale: float = 1.0, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


TENSORS = {
    "weights": gaussian(300, 40, scale=0.02),
    "wide range": gaussian(5000) * 10.0 ** torch.randint(-12, 3, (5000,), generator=torch.Generator().manual_seed(1)),
    "one outlier": torch.cat([gaussian(1000, scale=1e-3), torch.tensor([-3.0])]),
    "edges themselves": torch.cat([s * 2.0 ** torch.arange(-20, 5) for s in (-1, 1)]),
    "eighths": torch.linspace(-4, 4, 129),
    "half": gaussian(2000, dtype=torch.float16),
    "bfloat16": gaussian(2000, scale=1e-3, dtype=torch.bfloat16),
    "float64": gaussian(2000).double(),
    "mostly zero": torch.cat([torch.zeros(3000), gaussian(10)]),
    "zeros": torch.zeros(7, 3),
    "minus zero": torch.tensor([-0.0, 0.0]),
    "constant": torch.full((5,), -0.25),
    "ones": torch.ones(64),
    "scalar": torch.tensor(0.37),
    "denormal": torch.tensor([1e-44, -1e-42, 0.0, 1e-38]),
    "largest": torch.tensor([torch.finfo(torch.float32).max, -1.0]),
    "transposed": gaussian(20, 30).T,
}


@pytest.mark.parametrize("name", TENSORS)
def test_counts_are_those_of_numpy(name: str) -> None:
    tensor = TENSORS[name]
    (found,) = read_histograms(histogram_table([tensor]))
    values = tensor.float().numpy().astype(np.float64).ravel()
    assert (np.diff(found.edges) > 0).all()
    np.testing.assert_array_equal(found.counts, np.histogram(values, found.edges)[0])
    assert found.count == values.size and found.nonfinite == 0
    assert (found.minimum, found.maximum) == (values.min(), values.max())
    assert found.total == pytest.approx(values.sum(), rel=1e-12, abs=1e-12 * np.abs(values).sum())
    assert found.squares == pytest.approx(np.square(values).sum(), rel=1e-9)


def test_bins_are_an_eighth_of_an_octave_and_the_bulk_has_many() -> None:
    (found,) = read_histograms(histogram_table([TENSORS["one outlier"]]))
    positive = found.edges[len(found.edges) // 2 :]
    widths = np.diff(positive) / positive[:-1]
    assert widths.max() <= 0.125 + 1e-9 and widths.min() >= 1 / 15 - 1e-9
    np.testing.assert_array_equal(found.edges, -found.edges[::-1])
    assert (found.counts > 0).sum() > 60  # though the outlier is three thousand times larger than the rest


def test_what_is_not_finite_is_left_out_and_counted() -> None:
    tensor = torch.cat([gaussian(100), torch.tensor([torch.nan, torch.inf, -torch.inf])])
    found, clean, nothing, empty = read_histograms(
        histogram_table([tensor, tensor[:100], torch.tensor([torch.nan, -torch.inf]), torch.zeros(0, 3)])
    )
    np.testing.assert_array_equal(found.counts, clean.counts)
    assert (found.nonfinite, found.minimum, found.total) == (3, clean.minimum, clean.total)
    assert (nothing.count, nothing.nonfinite) == (0, 2) and np.isnan(nothing.minimum)
    assert (empty.count, empty.nonfinite) == (0, 0) and np.isnan(empty.maximum)
    assert len(nothing.buckets()[0]) == len(empty.buckets()[0]) == 0


def test_large_tensors_are_taken_in_parts(monkeypatch) -> None:
    (whole,) = read_histograms(histogram_table([TENSORS["weights"]]))
    monkeypatch.setattr("dynamon.quantities.histograms._CHUNK", 777)
    (parts,) = read_histograms(histogram_table([TENSORS["weights"]]))
    np.testing.assert_array_equal(whole.counts, parts.counts)
    assert parts.total == pytest.approx(whole.total) and parts.maximum == whole.maximum


def test_buckets_merge_gaps_and_drop_the_ends() -> None:
    found = Histogram(np.arange(9.0), np.array([0, 0, 3, 0, 0, 0, 1, 0]), 2.5, 6.5, 0, 0, 0)
    limits, counts = found.buckets()
    assert limits.tolist() == [3, 6, 7] and counts.tolist() == [3, 0, 1]


def test_all_layers_are_one_table() -> None:
    assert histogram_table(list(TENSORS.values())).shape == (len(TENSORS), 264)


@pytest.mark.parametrize("size", [1, 63, 64, 5000])
def test_counting_as_on_a_gpu(size: int) -> None:
    """In copies of the bins, so that additions to one address do not stand in a queue."""
    index = torch.randint(0, _BINS + 1, (size,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(_spread_counts(index), torch.bincount(index, minlength=_BINS + 1)[:_BINS])
