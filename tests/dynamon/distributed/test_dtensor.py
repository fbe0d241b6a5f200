"""Parts of tensors on meshes of several kinds: what is counted, gathered and put together."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from dynamon.distributed.dtensor import (
    Gathering,
    gather,
    gather_for_checkpoint,
    gather_rounds,
    has_whole_rows,
    holders,
    shard_like,
    to_local,
)
from dynamon.distributed.ranks import OthersFailedError, Ranks
from dynamon.distributed.reduction import PartialStats, ShardReduction
from dynamon.distributed.work_sharing import share_work
from dynamon.quantities.histograms import histogram_table, read_histograms, reduce_tables
from tests.processes import in_processes

pytestmark = pytest.mark.filterwarnings("ignore")

LAYOUTS: dict[str, tuple[Callable[[int], tuple[int, ...]], tuple[Any, ...]]] = {
    "rows": (lambda n: (n,), (Shard(0),)),
    "columns": (lambda n: (n,), (Shard(1),)),
    "copies": (lambda n: (n,), (Replicate(),)),
    "copies of rows": (lambda n: (2, n // 2), (Replicate(), Shard(0))),
    "rows, then columns": (lambda n: (2, n // 2), (Shard(0), Shard(1))),
    "columns, in copies": (lambda n: (2, n // 2), (Shard(1), Replicate())),
}


def tensors() -> list[torch.Tensor]:
    """As many rows as processes, fewer, more, and no multiple."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 6), (1, 3), (7, 5), (9, 2))]


def check_layouts(size: int) -> None:
    ranks = Ranks(torch.device("cpu"))
    for name, (shape, placements) in LAYOUTS.items():
        mesh = init_device_mesh("cpu", shape(size))
        wholes = tensors()
        likes = [distribute_tensor(tensor, mesh, placements) for tensor in wholes]
        likes.append(torch.nn.Parameter(wholes[0]))  # a plain one, which every process holds
        wholes = [*wholes, wholes[0]]
        parts = [to_local(like.detach()) for like in likes]
        for one, like, part in zip(wholes, likes, parts, strict=True):
            assert torch.equal(gather(part, like).detach(), one), name
            assert torch.equal(shard_like(one, like), part)
        check_saved(ranks, likes, parts, wholes)
        check_reduction(ranks, likes, parts, wholes)
        check_gathering(ranks, likes, parts, wholes)
        rows = [has_whole_rows(like) for like in likes]
        assert rows == [all("1" not in str(place) for place in placements)] * 4 + [True], name


def check_saved(ranks: Ranks, likes: list, parts: list[torch.Tensor], wholes: list[torch.Tensor]) -> None:
    names = list(map(str, range(len(parts))))
    for everywhere in (True, False):
        found = gather_for_checkpoint(
            dict(zip(names, parts, strict=True)), dict(zip(names, likes, strict=True)), everywhere
        )
        assert list(found) == (names if everywhere or ranks.rank == 0 else names[-1:])  # the last one is plain
        assert all(torch.equal(tensor, wholes[int(name)]) for name, tensor in found.items())


def check_reduction(ranks: Ranks, likes: list, parts: list[torch.Tensor], wholes: list[torch.Tensor]) -> None:
    measured = [part if part.numel() else part.new_zeros(1) for part in parts]
    stats = PartialStats(
        sums=torch.tensor([[part.abs().sum(), part.numel()] for part in parts], dtype=torch.float64).T,
        lengths=torch.stack([torch.linalg.vector_norm(part) for part in measured])[None],
        maxima=torch.stack([part.abs().amax() for part in measured])[None],
        known=torch.tensor([[i != 1 or ranks.rank > 0 for i in range(len(parts))], [True] * len(parts)]),
        owned=torch.tensor([ranks.rank + 1.0 if rank == ranks.rank else 0.0 for rank in range(ranks.size)]),
    )
    totals = ShardReduction(likes, ranks, sums=2, lengths=1, maxima=1, known=2, owned=ranks.size)
    sizes = torch.tensor([float(one.numel()) for one in wholes], dtype=torch.float64)
    for total in (totals.reduce_or_nan(lambda: stats), totals.reduce(stats)):
        sums = torch.stack([torch.stack([one.abs().sum() for one in wholes]), sizes])
        torch.testing.assert_close(total.sums, sums, rtol=1e-14, atol=0)
        lengths = torch.stack([torch.linalg.vector_norm(one) for one in wholes])
        torch.testing.assert_close(total.lengths[0], lengths, rtol=1e-14, atol=0)
        assert torch.equal(total.maxima[0], torch.stack([one.abs().amax() for one in wholes]))
        assert total.known.tolist() == [[i != 1 for i in range(len(parts))], [True] * len(parts)]
        assert total.owned.tolist() == [rank + 1.0 for rank in range(ranks.size)]
    alone = ShardReduction(wholes, holders(wholes, ranks), sums=2)
    assert alone.reduce(stats) is stats and alone.reduce_or_nan(lambda: stats) is stats


def check_gathering(ranks: Ranks, likes: list, parts: list[torch.Tensor], wholes: list[torch.Tensor]) -> None:
    owners = [i % ranks.size for i in range(len(likes))]
    found = Gathering(likes, owners, [part.dtype for part in parts], ranks).run(parts)
    for tensor, owner, one in zip(found, owners, wholes, strict=True):
        assert (tensor is None) == (owner != ranks.rank)
        assert tensor is None or torch.equal(tensor, one)

    def measure(chosen: list[int], given: list[list[torch.Tensor]]) -> torch.Tensor:
        return torch.stack([torch.stack([one.sum(), two.sum()]) for one, two in given], 1)

    with ranks.collective_section():
        table = share_work(measure, [[part, 2 * part] for part in parts], likes, [1.0] * len(likes), 2, ranks)
        taken = (table[0] != 0).sum()
        assert 0 < taken < len(likes)  # each process has a share of them
        ranks.sum(table)
    sums = torch.stack([one.sum() for one in wholes])
    torch.testing.assert_close(table, torch.stack([sums, 2 * sums]), rtol=1e-13, atol=1e-13)


def check_failures(ranks: Ranks) -> None:
    mesh = init_device_mesh("cpu", (ranks.size,))
    like = distribute_tensor(tensors()[2], mesh, (Shard(0),))
    totals = ShardReduction([like], ranks, sums=1)

    def find() -> Any:
        if ranks.rank == 1:
            raise ValueError("no")
        return PartialStats(sums=torch.zeros(1, 1))

    if ranks.rank == 1:
        with pytest.raises(ValueError, match="no"):
            totals.reduce_or_nan(find)
    else:
        assert totals.reduce_or_nan(find).sums.isnan().all()

    def measure(chosen: list[int], given: list[list[torch.Tensor]]) -> torch.Tensor:
        raise ValueError("not either")

    with (
        pytest.raises(ValueError if ranks.rank == 0 else OthersFailedError, match="not either"),
        ranks.collective_section(),
    ):
        ranks.sum(share_work(measure, [[to_local(like)]], [like], [1.0], 1, ranks))


def check_histograms(ranks: Ranks) -> None:
    """Parts of very different scales, with what is not finite in one of them and nothing finite in another."""
    mesh = init_device_mesh("cpu", (ranks.size,))
    wide = torch.cat([torch.randn(8, 3) * 1e-3, torch.randn(8, 3) * 1e6, torch.zeros(1, 3)])
    wide[0, 0], wide[-1] = torch.inf, torch.nan
    wholes = [wide, torch.full((4, 1), torch.nan), torch.randn(1, 50)]
    for tensor in wholes:
        torch.distributed.broadcast(tensor, 0)
    likes = [distribute_tensor(tensor, mesh, (Shard(0),)) for tensor in wholes]
    with ranks.collective_section():
        table = reduce_tables(histogram_table([to_local(like) for like in likes]), likes, ranks)
    for one, other in zip(read_histograms(table), read_histograms(histogram_table(wholes)), strict=True):
        assert one.counts.tolist() == other.counts.tolist() and one.nonfinite == other.nonfinite
        if one.count:
            assert (one.edges == other.edges).all() and one.minimum == other.minimum and one.maximum == other.maximum
            assert one.total == pytest.approx(other.total, rel=1e-6, abs=1e-6)
            assert one.squares == pytest.approx(other.squares, rel=1e-6)


def check_all(rank: int, size: int) -> None:
    check_layouts(size)
    ranks = Ranks(torch.device("cpu"))
    check_failures(ranks)
    check_histograms(ranks)


@pytest.mark.processes
def test_two_processes() -> None:
    in_processes(lambda rank: check_all(rank, 2), 2, group=True)


@pytest.mark.processes
@pytest.mark.slow
def test_four_processes() -> None:
    in_processes(lambda rank: check_all(rank, 4), 4, group=True)


def test_large_tensors_go_a_few_at_a_time() -> None:
    sizes = [2**23, 2**23, 2**23, 2**26, 1]
    assert list(gather_rounds([[0, 1, 2], [3, 4]], sizes)) == [[[0, 1], [3]], [[2], [4]]]
    assert list(gather_rounds([[], []], sizes)) == []
