"""Calls of the device that readings of gradients take, on the 148 tensors of GPT-2 124M."""

from typing import Any

import numpy as np
import pytest
import torch

from dynamon.layers import measurable_layers
from dynamon.quantities.gradient_reader import GradientReader
from dynamon.quantities.readings import PendingReadings
from tests.launches import Launches, fill_gradients, gpt2, pretended

STEPS = 4
SCALE = torch.tensor(2.0**-16)


def reader(model: torch.nn.Module, family: str, steers: bool) -> GradientReader:
    made = GradientReader(measurable_layers(model), family)
    if steers:
        made.follow_trends()
    return made


def calls(model: torch.nn.Module, made: GradientReader, launches: Launches, **arguments: Any) -> int:
    """Of the last of some readings in a row."""
    for step in range(STEPS):
        fill_gradients(model, step)
        made.begin(step)
        launches.reset()
        with launches:
            made.read(**arguments)
    assert launches.waits == 0, launches
    return launches.total


@pytest.mark.parametrize("scale", [1.0, SCALE], ids=["true", "scaled"])
@pytest.mark.parametrize(
    ("family", "steers", "most"),
    [("sign", False, 16), ("sign", True, 32), ("euclidean", False, 16), ("euclidean", True, 32)],
)
def test_with_triton(family: str, steers: bool, most: int, scale: Any) -> None:
    """A monitor's reading may take 80 calls, and steering's 60."""
    model, launches = gpt2("cpu", scale=48), Launches()
    with pretended(launches):
        made = reader(model, family, steers)
        made.warm_up()
        assert calls(model, made, launches, dual=not steers, scale=scale) <= most, launches
        assert launches.calls["triton chunk_stats"] == launches.calls["triton tensor_stats"] == 1
        assert launches.calls["_foreach_mul.Tensor"] == 0  # no copy of the gradients to their true size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("family", "steers", "most"), [("sign", False, 65), ("sign", True, 80), ("spectral", False, 400)]
)
def test_without_triton(family: str, steers: bool, most: int, dtype: torch.dtype) -> None:
    """On tensors without values, as on a device that must not be asked for any."""
    model = gpt2("meta", dtype=dtype)
    launches = Launches(device="meta")
    assert calls(model, reader(model, family, steers), launches, dual=not steers) <= most, launches


def test_spectral_duals_of_one_shape_are_one_batch() -> None:
    """Three shapes, up to transposition; gradients and their changes together."""
    model, launches = gpt2("meta"), Launches(device="meta")
    made = reader(model, "spectral", steers=False)
    with_dual = calls(model, made, launches)
    assert launches.calls["linalg_vector_norm.default"] <= 8, launches  # two for each batch
    assert calls(model, made, launches, dual=False) < with_dual - 100


def test_keeping_gradients_takes_one_call_and_no_memory_after_the_first() -> None:
    model, launches = gpt2("meta"), Launches(device="meta")
    made, before = reader(model, "sign", steers=False), []
    for step in range(3):
        fill_gradients(model, step)
        made.begin(step)
        launches.reset()
        with launches:
            made.store()
        assert launches.calls == {"_foreach_copy_.default": 1}
        kept = [id(g) for g in made._previous.values()]
        if step:
            assert kept == before
        before = kept
    made.begin(3)
    launches.reset()
    scale = SCALE.to("meta")
    with launches:
        made.store_part(0.5, scale)
    assert launches.total <= 2, launches


@pytest.mark.parametrize("dual", [True, False])
def test_a_scale_on_the_device_gives_what_a_number_gives(dual: bool) -> None:
    found = []
    for scale in (2.0**-16, SCALE, 1.0):
        model = gpt2("cpu", scale=48)
        made = reader(model, "spectral", steers=True)
        for step in range(3):
            fill_gradients(model, step)
            for p in model.parameters():
                p.grad *= 1.0 if scale == 1.0 else 2.0**16
            if step == 1:
                made.store_part(0.5, scale)
            made.begin(step)
            readings = made.read(scale, dual=dual).wait()
        found.append(
            [readings.l1, readings.l2, readings.dual, readings.difference_dual, readings.inner, readings.trend]
        )
    for rows in found[1:]:
        for one, other in zip(found[0], rows, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, equal_nan=True)


class _OnSecondGPU(torch.Tensor):
    """Rows that say they lie on a GPU that is not the current one."""

    is_cuda = True  # type: ignore[assignment]
    device = torch.device("cuda", 1)  # type: ignore[assignment]


def test_the_copy_s_event_is_recorded_where_the_copy_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Event:
        def record(self, stream: Any = None) -> None:
            seen["stream"] = stream

    def empty(*sizes: Any, pin_memory: bool = False, **arguments: Any) -> torch.Tensor:
        seen.update(arguments, pin_memory=pin_memory)
        return torch.zeros(*sizes, dtype=arguments["dtype"])

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device}")
    rows = torch.ones(10, 3).as_subclass(_OnSecondGPU)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        PendingReadings(rows, None)  # type: ignore[arg-type]
    assert seen["stream"] == "stream of cuda:1"
    assert seen["pin_memory"] and seen["device"] == "cpu"  # another default device has no pinned memory


def test_nan_in_place_of_duals_that_are_not_wanted_is_made_on_the_device() -> None:
    """Not copied there, which would wait for what is queued: once a layer under Muon."""
    model, launches = gpt2("meta"), Launches()
    calls(model, reader(model, "spectral", steers=True), launches, dual=False)
    assert launches.calls["_to_copy.default"] <= 5, launches  # of dtypes
    small = gpt2("cpu", scale=48)
    fill_gradients(small)
    made = reader(small, "spectral", steers=True)
    made.begin(0)
    dual = made.read(dual=False).wait().dual
    assert np.isnan(dual).sum() == 48
