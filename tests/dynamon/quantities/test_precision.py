"""What dtypes lose of steps, of decay and of copies: against plain numbers in float64, rounded by hand."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from dynamon.distributed.ranks import Ranks
from dynamon.layers import describe_layers
from dynamon.optim import Lanton
from dynamon.optim.computed_steps import computed_step
from dynamon.quantities import flat_pieces, precision
from dynamon.quantities.precision import RANGES, bits_of, lost_shares, range_shares, stored_shares
from tests.launches import Launches, gpt2

ALONE = Ranks(torch.device("cpu"), alone=True)
BITS = {torch.bfloat16: (8, -126), torch.float16: (11, -14), torch.float32: (24, -126)}  # and least exponent


def rounded(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Round float64 numbers to a dtype: to nearest, ties to even."""
    spacing = spacing_of(values, dtype)
    return np.round(values / spacing) * spacing


def spacing_of(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    bits, least = BITS[dtype]
    exponents = np.maximum(np.frexp(values)[1] - 1, least)
    return 2.0 ** (exponents - (bits - 1))


class Stochastic(torch.optim.SGD):
    """Momentum SGD that rounds up or down by chance, with the right mean."""

    @torch.no_grad()
    def step(self, closure=None):
        kept = {p: p.detach().double() for group in self.param_groups for p in group["params"]}
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                exact = (kept[p] - group["lr"] * self.state[p]["momentum_buffer"].double()).numpy()
                spacing = spacing_of(kept[p].numpy(), p.dtype)
                drawn = np.floor(exact / spacing + torch.rand(p.shape, dtype=torch.float64).numpy()) * spacing
                p.copy_(torch.from_numpy(drawn))


class Kahan(torch.optim.Optimizer):
    """Plain descent that keeps what rounding takes."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                rest = state.setdefault("kahan_comp", torch.zeros_like(p, dtype=torch.float32))
                wanted = p.float() - group["lr"] * p.grad.float() + rest
                p.copy_(wanted)
                rest.copy_(wanted - p.float())


OPTIMIZERS = {
    "AdamW": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=3.0, eps=1e-4, foreach=False),
    "AdamW foreach": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=3.0, eps=1e-4, foreach=True),
    "AdamW fused": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=3.0, eps=1e-4, fused=True),
    "Adam, AMSGrad, coupled decay, upwards": lambda p, lr: torch.optim.Adam(
        p, lr=lr, eps=1e-4, weight_decay=0.1, amsgrad=True, maximize=True
    ),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "Nesterov, decay": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True, weight_decay=0.1),
    "descent, upwards": lambda p, lr: torch.optim.SGD(p, lr=lr, weight_decay=0.1, maximize=True),
}


def by_hand(optimizer: torch.optim.Optimizer, p: torch.Tensor, before: torch.Tensor) -> np.ndarray:
    """The step in float64, from the state and the gradient."""
    group, state = optimizer.param_groups[0], optimizer.state[p]
    w, g = before.double().numpy(), p.grad.double().numpy()
    if "exp_avg" in state:
        beta1, beta2 = group["betas"]
        t = float(state["step"])
        second = state.get("max_exp_avg_sq", state["exp_avg_sq"]).double().numpy()
        first = state["exp_avg"].double().numpy() / (1 - beta1**t)
        return -group["lr"] * first / (np.sqrt(second / (1 - beta2**t)) + group["eps"])
    g = (-g if group["maximize"] else g) + group["weight_decay"] * w
    if group["momentum"]:
        buffer = state["momentum_buffer"].double().numpy()
        g = g + group["momentum"] * buffer if group["nesterov"] else buffer
    return -group["lr"] * g


def stepped(make, dtype: torch.dtype, lr: float, steps: int = 3, size: int = 4000, gradient=None):
    """A layer of many weights, its optimizer after some steps, and the weights before the last one."""
    generator = torch.Generator().manual_seed(0)
    module = nn.Module()
    module.weight = nn.Parameter((torch.randn(size // 40, 40, generator=generator) * 0.1).to(dtype))
    optimizer = make([module.weight], lr)
    for _ in range(steps):
        before = module.weight.detach().clone()
        drawn = torch.randn(module.weight.shape, generator=generator) if gradient is None else gradient
        module.weight.grad = (torch.zeros_like(before) + drawn).to(dtype)
        optimizer.step()
    return module, optimizer, before


def measured(module, optimizer, before, lr: float, shrink: float = 0.0, with_gradient: bool = True) -> np.ndarray:
    layers, p = describe_layers(module), module.weight
    gradient = p.grad if with_gradient else None
    step = computed_step(optimizer, optimizer.param_groups[0], p, before, gradient, lr, shrink)
    if step is None:
        return np.full(3, np.nan)
    rows = stored_shares(layers, {"weight": step}, ALONE).double().numpy()
    return lost_shares(rows, np.array([float(p.numel())]), [0], [step.keeps])[:, 0]


@pytest.mark.parametrize("lr", [1e-4, 1e-3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_shares_and_sizes_are_those_of_the_step_rounded_by_hand(name, dtype, lr):
    module, optimizer, before = stepped(OPTIMIZERS[name], dtype, lr)
    group = optimizer.param_groups[0]
    w, now, step = (
        before.double().numpy(),
        module.weight.detach().double().numpy(),
        by_hand(optimizer, module.weight, before),
    )
    decoupled = lr * group["weight_decay"] if "AdamW" in name else 0.0
    fused = bool(group.get("fused"))
    # On a CPU, foreach functions round a scalar to the dtype first.
    factor = rounded(np.array(1 - decoupled), dtype) if group["foreach"] else 1 - decoupled
    base = w if fused else rounded(w * factor, dtype)
    total = step - decoupled * w if fused else step
    lost, decay, size = measured(module, optimizer, before, lr, decoupled)
    assert lost == pytest.approx(np.mean((now == base) & (step != 0)), abs=1e-7)
    # The dtype of an optimizer's state makes steps near the limit uncertain, not more.
    assert lost == pytest.approx(np.mean(rounded(base + total, dtype) == base), abs=0.02)
    expected = np.mean((now == w) if fused else (base == w)) if decoupled else 0.0
    assert decay == pytest.approx(expected, abs=1e-7)
    ratios = np.abs(total) / (spacing_of(base, dtype) / 2)
    assert size == pytest.approx(np.exp(np.mean(np.log(ratios[(step != 0) & (base != 0)]))), rel=1e-3)


def test_float32_loses_nothing_at_usual_rates_and_all_at_a_billionth():
    for lr, least, most in ((1e-3, 0.0, 0.0), (1e-10, 0.95, 1.0)):
        lost, _, size = measured(*stepped(OPTIMIZERS["AdamW"], torch.float32, lr), lr)
        assert least <= lost <= most and (size > 1) == (lost == 0)


def test_zero_rates_and_zero_steps_lose_nothing():
    for name in OPTIMIZERS:
        assert measured(*stepped(OPTIMIZERS[name], torch.bfloat16, 0.0), 0.0)[0] == 0
    still = stepped(OPTIMIZERS["momentum"], torch.bfloat16, 1e-6, gradient=torch.zeros(()))
    assert measured(*still, 1e-6)[0] == 0
    half = torch.zeros(100, 40)
    half[:50] = 1.0
    assert measured(*stepped(OPTIMIZERS["momentum"], torch.bfloat16, 1e-9, gradient=half), 1e-9)[0] == 0.5


def test_unbiased_rounding_loses_nothing():
    lr = 1e-5
    module, optimizer, before = stepped(lambda p, lr: Stochastic(p, lr=lr, momentum=0.9), torch.bfloat16, lr)
    assert (module.weight.detach() == before).float().mean() > 0.7  # most entries stand still in a step
    assert measured(module, optimizer, before, lr)[0] == 0
    plain = stepped(OPTIMIZERS["momentum"], torch.bfloat16, lr)
    assert measured(*plain, lr)[0] > 0.7


def test_what_rounding_takes_and_an_optimizer_keeps_is_not_lost():
    module, optimizer, before = stepped(Kahan, torch.bfloat16, 1e-6)
    assert (module.weight.detach() == before).float().mean() > 0.9
    assert measured(module, optimizer, before, 1e-6)[0] == 0


def test_unknown_optimizers_are_judged_by_entries_that_moved():
    make = lambda p, lr: torch.optim.Adamax(p, lr=lr)  # noqa: E731
    module, optimizer, before = stepped(make, torch.bfloat16, 1e-4)
    lost, _, size = measured(module, optimizer, before, 1e-4)
    assert lost == pytest.approx(float((module.weight.detach() == before).double().mean())) and 0.2 < lost < 1
    assert np.isnan(size)
    muon = stepped(lambda p, lr: Lanton(p, lr=lr, noise_adaptive=False), torch.bfloat16, 1e-6)
    assert measured(*muon, 1e-6)[0] > 0.95 and measured(*muon, 1e-6, with_gradient=False)[0] > 0.95
    plain = stepped(lambda p, lr: torch.optim.Adagrad(p, lr=lr), torch.bfloat16, 1e-6)
    assert measured(*plain, 1e-6)[0] > 0.95
    assert np.isnan(measured(*plain, 1e-6, with_gradient=False)).all()  # nothing tells whether a step was zero


@pytest.mark.parametrize("name", ["AdamW", "AdamW fused", "momentum"])
def test_few_moves_against_the_rounding_do_not_excuse_the_rest(name):
    """A weight that somebody else moves, such as a constraint on a few entries, is not stochastic rounding."""
    module, optimizer, before = stepped(OPTIMIZERS[name], torch.bfloat16, 1e-5)
    with torch.no_grad():
        module.weight[0, :2] *= 2
    assert measured(module, optimizer, before, 1e-5)[0] > 0.7


def test_what_others_hold_still_is_not_lost_in_rounding():
    """A projection, a mask, or an optimizer that steps copies."""
    module, optimizer, before = stepped(OPTIMIZERS["AdamW"], torch.bfloat16, 1e-2)
    with torch.no_grad():
        module.weight.copy_(before)
    assert measured(module, optimizer, before, 1e-2)[0] < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_ranges_are_those_of_real_casts(dtype):
    generator = torch.Generator().manual_seed(0)
    draw = lambda spread: torch.exp(spread * torch.randn(3000, generator=generator)) * (-1) ** torch.arange(3000)  # noqa: E731
    tensors = [
        draw(1).to(dtype),
        (draw(5) * 1e-5).to(dtype),
        (draw(4) * 1e4).to(dtype),
        torch.tensor([1e-41, 0.0, 3.3e38]).to(dtype),
        torch.zeros(3, dtype=dtype),
    ]
    found = range_shares(tensors, tensors, ALONE).numpy()
    for column, x in zip(found.T, tensors, strict=True):
        there = x != 0
        for name, share in zip(RANGES, column, strict=True):
            fate, kind = name.split("_")
            copy = {
                "bf16": torch.bfloat16,
                "fp16": torch.float16,
                "e4m3": torch.float8_e4m3fn,
                "e5m2": torch.float8_e5m2,
            }[kind]
            scale = torch.finfo(copy).max / x.double().abs().max() if kind.startswith("e") else 1.0
            cast = (x.double() * scale).float().to(copy).float()
            expected = ((cast == 0) & there).double().mean() if fate == "underflow" else cast.isinf().double().mean()
            if kind.startswith("e") and not there.any():
                assert math.isnan(share)
            else:
                assert share == pytest.approx(float(expected), abs=1e-7), (name, x.dtype)
    assert (found[:, 1] > 0).sum() >= 3 and found[5, 2] > 0


def test_what_is_not_finite_is_in_no_share_and_leaves_no_scale():
    x = [torch.tensor([1.0, torch.nan]), torch.tensor([1.0, -torch.inf])]
    found = range_shares(x, x, ALONE)
    assert found[2:4].isnan().all() and (found[[0, 1, 4, 5]] == 0).all()


@pytest.mark.parametrize("name", ["AdamW", "AdamW fused", "momentum"])
@pytest.mark.parametrize(("dtype", "lr"), [(torch.float32, 2e-7), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_on_a_cpu_the_few_entries_near_the_limit_tell_all(name, dtype, lr, monkeypatch):
    """Against the way of a device, which looks at every entry; with zeros among weights and among steps."""
    module, optimizer, before = stepped(OPTIMIZERS[name], dtype, lr)
    with torch.no_grad():
        for kept in (before, module.weight):
            kept[::7, ::3] = 0.0
        for state in optimizer.state[module.weight].values():
            if isinstance(state, torch.Tensor) and state.ndim:
                state[1::7] = 0.0
    group = optimizer.param_groups[0]
    step = computed_step(optimizer, group, module.weight, before, module.weight.grad, lr, 3 * lr)
    few, layers = precision._few, describe_layers(module)
    chosen = []
    monkeypatch.setattr(precision, "_few", lambda mask: chosen.append(few(mask)) or chosen[-1])
    found = stored_shares(layers, {"weight": step}, ALONE)
    assert any(places is not None and len(places) for places in chosen)
    monkeypatch.setattr(precision, "reads_are_free", lambda device: False)
    monkeypatch.setattr(flat_pieces, "reads_are_free", lambda device: False)
    whole = stored_shares(layers, {"weight": step}, ALONE)
    torch.testing.assert_close(found[:4], whole[:4], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found[4:], whole[4:], rtol=0, atol=1e-4)  # logarithms, summed in float32


def test_layers_are_measured_together_as_they_are_alone():
    """Of many sizes, in chunks of their own and in common ones, with one rate for all and with several."""
    module = nn.ParameterList(torch.randn(size) for size in (3, 40_000, 500, 1, 200_000, 7))
    layers = describe_layers(module)
    for rates in ([1e-7] * 6, [1e-7, 1e-8, 2e-7, 1e-7, 3e-8, 0.0]):
        optimizer = torch.optim.SGD([{"params": [p], "lr": rate} for p, rate in zip(module, rates, strict=True)])
        before = [p.detach().clone() for p in module]
        for p in module:
            p.grad = torch.randn_like(p)
        optimizer.step()
        steps = {
            la.name: computed_step(optimizer, group, la.parameter, start, la.parameter.grad, group["lr"], 0.0)
            for la, group, start in zip(layers, optimizer.param_groups, before, strict=True)
        }
        together = stored_shares(layers, steps, ALONE)
        alone = torch.cat([stored_shares([la], {la.name: steps[la.name]}, ALONE) for la in layers], 1)
        torch.testing.assert_close(together[:4], alone[:4], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(together[4], alone[4], rtol=0, atol=1e-4, equal_nan=True)
        assert (together[0] > 0.01).any()
        shares = range_shares(list(module), list(module), ALONE)
        torch.testing.assert_close(shares, torch.cat([range_shares([p], [p], ALONE) for p in module], 1))


@pytest.mark.parametrize("alone", [2**14, 5])
def test_pieces_are_summed_whatever_they_are_cut_into(alone, monkeypatch):
    monkeypatch.setattr(flat_pieces, "_MOST_ON_CPU", 7)
    monkeypatch.setattr(flat_pieces, "_LEAST_ON_CPU", 7)
    monkeypatch.setattr(flat_pieces, "_ALONE_ON_CPU", alone)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.rand(size, generator=generator) for size in (1, 20, 7, 0, 3, 50)]
    numbers = torch.arange(6.0)[None]
    found = flat_pieces.sum_over_entries(
        tensors, 1, lambda chunk: [chunk.flat(tensors, torch.float32) * chunk.spread(numbers)[0]]
    )
    torch.testing.assert_close(found[0], torch.stack([i * t.double().sum() for i, t in enumerate(tensors)]))


def test_significant_bits():
    module = nn.ParameterDict(
        {"of_" + str(d)[6:]: nn.Parameter(torch.ones(2, 2, dtype=d)) for d in (*BITS, torch.float64, torch.complex64)}
    )
    assert dict(zip([la.name for la in describe_layers(module)], bits_of(describe_layers(module)), strict=True)) == {
        "of_bfloat16": 8, "of_float16": 11, "of_float32": 24, "of_float64": 53, "of_complex64": 24,
    }  # fmt: skip


def calls(scale: int, names: slice) -> int:
    model = gpt2("meta", dtype=torch.bfloat16)
    layers = describe_layers(model)[names]
    optimizer = torch.optim.AdamW([la.parameter for la in layers], lr=1e-4, foreach=True)
    for p in optimizer.param_groups[0]["params"]:
        optimizer.state[p] = {
            "step": torch.tensor(3.0),
            "exp_avg": torch.empty_like(p),
            "exp_avg_sq": torch.empty_like(p),
        }
    before = {la.name: torch.empty_like(la.parameter) for la in layers}

    def read() -> None:
        group = optimizer.param_groups[0]
        steps = {
            la.name: computed_step(optimizer, group, la.parameter, before[la.name], None, 1e-4, 1e-6) for la in layers
        }
        stored_shares(layers, steps, Ranks(torch.device("meta"), alone=True))
        likes = [la.parameter for la in layers]
        range_shares(likes, likes, Ranks(torch.device("meta"), alone=True))

    read()  # puts constants on the device
    with Launches("meta") as launches:
        read()
    assert launches.waits == 0, launches
    return launches.total


def test_device_calls_do_not_grow_with_the_number_of_layers():
    assert calls(1, slice(0, None)) <= 600  # 148 layers, 124M entries
    assert abs(calls(1, slice(2, None)) - calls(1, slice(2, 20))) <= 150  # 146 layers against 18 of the same kinds
