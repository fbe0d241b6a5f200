"""Layers dealt out over two processes give what one process finds."""

from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynamon.distributed.ranks import Ranks
from dynamon.distributed.work_sharing import assign_by_cost, share_work
from dynamon.layers import describe_layers
from dynamon.quantities.weights import layer_spectra
from tests.models import gpt, mlp
from tests.processes import in_processes


@given(st.lists(st.floats(0, 1e9), max_size=30), st.integers(1, 8))
def test_every_item_is_taken_once_and_the_work_is_even(costs, processes) -> None:
    parts = assign_by_cost(costs, processes)
    assert sorted(i for part in parts for i in part) == list(range(len(costs))) and len(parts) == processes
    if costs:
        load = [sum(costs[i] for i in part) for part in parts]
        assert max(load) <= sum(costs) / processes + max(costs) + 1e-6 * sum(costs)


def work(rank: int) -> dict:
    found, ranks = {}, Ranks(torch.device("cpu"))
    for name, model in (("gpt", gpt().double()), ("one", mlp(3, 4)), ("odd", gpt(depth=1))):
        with ranks.collective_section():
            names, spectra = layer_spectra(describe_layers(model), ranks=ranks)
        found[name] = {"names": names, **{f.name: getattr(spectra, f.name) for f in fields(spectra)}}
    asked, items = [], [[torch.tensor(float(i))] for i in range(4)]

    def count(chosen, wholes):
        asked.extend(chosen)
        return torch.stack([tensors[0] for tensors in wholes]).expand(2, -1)

    with ranks.collective_section():
        table = ranks.sum(share_work(count, items, [own for (own,) in items], [5.0, 1.0, 1.0, 1.0], 2, ranks))
    failed = None
    try:
        with ranks.collective_section():
            ranks.sum(share_work(fail_on_first, items[:2], [own for (own,) in items[:2]], [1.0, 1.0], 1, ranks))
    except Exception as error:
        failed = str(error)
    return {"found": found, "asked": asked, "table": table, "failed": failed}


def fail_on_first(items: list[int], wholes: list) -> torch.Tensor:
    if items == [0]:
        raise ValueError("no such item")
    return torch.zeros(1, len(items))


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore")
def test_two_processes() -> None:
    ranks = in_processes(work, 2, group=True)
    for name, model in (("gpt", gpt().double()), ("one", mlp(3, 4)), ("odd", gpt(depth=1))):
        names, alone = layer_spectra(describe_layers(model))
        for rank in ranks:
            assert rank["found"][name]["names"] == names
            for field in fields(alone):
                torch.testing.assert_close(
                    rank["found"][name][field.name], getattr(alone, field.name), equal_nan=True, rtol=1e-6, atol=0
                )
    assert ranks[0]["asked"] == [0] and ranks[1]["asked"] == [1, 2, 3]
    for rank in ranks:
        assert rank["table"].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert ranks[0]["failed"] == "no such item"
    assert ranks[1]["failed"] == "on 1 of 2 processes, first on rank 0: no such item"
