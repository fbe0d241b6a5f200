"""Lanton against a slow loop in float64, torch's Muon, permanently split groups, and itself."""

import copy
import io
import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import state_dict as checkpointing
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from dynamon.kernels import polar_error, polar_factor
from dynamon.layers import describe_layers
from dynamon.norms import optimizer_family
from dynamon.optim import Lanton, LayerwiseRates, steering_of
from dynamon.optim.lanton import RADII
from dynamon.rates import FixedRates, NoiseAdaptiveRates
from tests.launches import Launches, fill_gradients, gpt2
from tests.models import cnn, gpt, mlp, samples


class Everything(nn.Module):
    """Every role, and every way of holding several matrices."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 6)
        self.qkv = nn.Linear(6, 18)
        self.lstm = nn.LSTM(6, 5)
        self.experts = nn.Parameter(torch.randn(3, 4, 6))
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.back = nn.ConvTranspose1d(4, 6, 2)
        self.gain = nn.Parameter(torch.tensor(1.0))
        self.head = nn.Linear(6, 9, bias=False)


def gradients(model, steps, scale=1.0, dtype=torch.float64):
    """Gaussian gradients that do not depend on the weights, by step and name."""
    generator = torch.Generator().manual_seed(3)
    return [
        {n: torch.randn(p.shape, generator=generator, dtype=dtype) * scale for n, p in model.named_parameters()}
        for _ in range(steps)
    ]


def play(model, optimizer, given):
    """Steps with given gradients."""
    for step in given:
        for name, p in model.named_parameters():
            p.grad = step[name].to(p.dtype) if name in step else None
        optimizer.step()
    return model


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(one, other):
    return all(torch.equal(p, q) for p, q in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def oracle_lmo(name, b):
    """The direction of one layer of Everything, block by block with an SVD."""

    def polar(m):
        u, s, vh = torch.linalg.svd(m, full_matrices=False)
        assert s[-1] > 1e-3 * s.norm(p=4)  # where polar_error holds
        return -math.sqrt(m.shape[0] / m.shape[1]) * u @ vh

    if name == "embedding.weight":
        return -b.sign()
    if name == "head.weight":
        return -b.sign() / b.shape[1]
    if b.ndim < 2:
        return -b / b.square().mean().sqrt()
    blocks = {"qkv.weight": 3, "lstm.weight_ih_l0": 4, "lstm.weight_hh_l0": 4, "conv.weight": 2}.get(name, 1)
    if name == "experts":
        return torch.stack([polar(m) for m in b])
    if name == "back.weight":  # [in, out, k]
        flat = polar(b.transpose(0, 1).reshape(6, 8)) / math.sqrt(2)
        return flat.reshape(6, 4, 2).transpose(0, 1)
    window = math.prod(b.shape[2:])
    parts = [polar(part.reshape(len(part), -1)) / math.sqrt(window) for part in b.chunk(blocks)]
    return torch.cat(parts).reshape(b.shape)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("steps", [5, 8])
def test_follows_a_float64_loop_with_svds_within_the_polar_error(steps, nesterov):
    model = Everything().double()
    given, reference = gradients(model, 6), weights(model)
    roles = {layer.name: layer.role for layer in describe_layers(model)}
    lr, decay = 0.05, 0.1
    optimizer = Lanton(model, lr, 0.9, nesterov, decay, polar=partial(polar_factor, steps=steps), noise_adaptive=False)
    play(model, optimizer, given)
    average, moved = {n: torch.zeros_like(p) for n, p in reference.items()}, {}
    for step in given:
        for n, w in reference.items():
            average[n] = 0.9 * average[n] + 0.1 * step[n]
            ahead = 0.9 * average[n] + 0.1 * step[n] if nesterov else average[n]
            moved[n] = lr * RADII[roles[n]] * oracle_lmo(n, ahead)
            reference[n] = (1 - lr * decay) * w + moved[n]
    for n, p in model.named_parameters():
        # Each direction is off by at most polar_error times its length; signs and vectors only by rounding.
        error = polar_error(steps) if roles[n] in ("hidden", "conv") else 0.0
        bound = len(given) * (error + 1e-13) * float(moved[n].norm())
        assert (p - reference[n]).norm() <= bound, n
        assert float(moved[n].norm()) > 0


def newton_schulz(stack):
    """Keller Jordan's iteration in bfloat16, matrix by matrix, as torch's Muon runs it."""
    found = []
    for m in stack:
        x = m.mT.bfloat16() if m.shape[0] > m.shape[1] else m.bfloat16()
        x = x / x.norm().clamp(min=1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
        found.append(x.mT if m.shape[0] > m.shape[1] else x)
    return torch.stack(found)


@pytest.mark.parametrize("scaling", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_follows_torchs_muon(scaling, nesterov):
    def network():
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(m, n, bias=False) for m, n in ((5, 7), (7, 7), (7, 5), (5, 7))))

    one, other = network(), network()
    settings = {"lr": 0.03, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1}
    given = gradients(one, 8, dtype=torch.float32)
    play(one, torch.optim.Muon(one.parameters(), adjust_lr_fn=scaling, **settings), given)
    lanton = Lanton(other.parameters(), polar=newton_schulz, scaling=scaling, noise_adaptive=False, **settings)
    assert all(layer.role == "hidden" for layer in lanton.layers)
    play(other, lanton, given)
    before = network()
    for p, q, w in zip(one.parameters(), other.parameters(), before.parameters(), strict=True):
        assert (p - w).norm() > 0.1
        # The directions agree bitwise; adding them up rounds once or twice a step.
        assert (p - q).abs().max() <= 8 * 2 * torch.finfo(p.dtype).eps * p.abs().max()


def test_directions_have_norm_one_and_lead_downhill():
    model = Everything()
    before, given = weights(model), gradients(model, 1)
    play(model, Lanton(model, 1.0, momentum=0.0, radii=dict.fromkeys(RADII, 1.0), noise_adaptive=False), given)
    step = {n: p.detach() - before[n] for n, p in model.named_parameters()}
    assert step["embedding.weight"].abs() == pytest.approx(1.0, rel=1e-5)
    assert step["head.weight"].abs() == pytest.approx(1 / 6, rel=1e-5)
    assert step["qkv.bias"].square().mean() == pytest.approx(1.0, rel=1e-5)
    for part in step["qkv.weight"].chunk(3):
        assert torch.linalg.svdvals(part) == pytest.approx(1.0, abs=polar_error(5))
    assert all((given[0][n] * step[n]).sum() < 0 for n in step)


def test_radius_and_rates_of_groups():
    model = mlp(5, 7, 3)
    plain, twice = copy.deepcopy(model), copy.deepcopy(model)
    first, last = model[0].weight, model[2].weight
    groups = [
        {"params": [first], "lr": 0.2, "radius": 3.0, "momentum": 0.5, "weight_decay": 0.5},
        {"params": [last], "role": "head"},
        {"params": [model[0].bias, model[2].bias], "role": "hidden"},  # a vector stays a vector
    ]
    optimizer = Lanton(groups, 0.1, radii={"head": 4.0, "vector": 0.5}, noise_adaptive=False)
    assert [layer.role for layer in optimizer.layers] == ["hidden", "head", "vector", "vector"]
    given = gradients(model, 1, dtype=torch.float32)
    play(model, optimizer, given)
    play(twice, Lanton(twice.parameters(), 1.0, radii=dict.fromkeys(RADII, 1.0), noise_adaptive=False), given)
    change = {n: twice.get_parameter(n) - p for n, p in plain.named_parameters()}
    expected = {
        "0.weight": plain[0].weight * (1 - 0.2 * 0.5) + 0.2 * 3.0 * change["0.weight"],
        "2.weight": plain[2].weight - 0.1 * 4.0 * given[0]["2.weight"].sign() / 7,
        "0.bias": plain[0].bias + 0.1 * 0.5 * change["0.bias"],
        "2.bias": plain[2].bias + 0.1 * 0.5 * change["2.bias"],
    }
    for n, p in model.named_parameters():
        assert torch.allclose(p, expected[n], rtol=1e-5, atol=1e-6), n


def test_roles_without_a_model():
    shapes = {(4, 3): "hidden", (4,): "vector", (): "vector", (1, 4): "vector", (4, 3, 2): "conv"}
    shapes |= {(4, 3, 2, 2): "conv", (2, 2, 2, 2, 3): "conv", (2, 2, 2, 2, 2, 2): "hidden"}
    tensors = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = Lanton(tensors, 0.1)
    assert [layer.role for layer in optimizer.layers] == list(shapes.values())
    assert [layer.name for layer in optimizer.layers][:2] == ["parameters.0", "parameters.1"]
    experts = Lanton([{"params": [tensors[4]], "role": "hidden"}], 0.1).layers[0]
    assert experts.role == "hidden" and experts.blocks == 4
    named = Lanton(mlp(5, 7, 3).named_parameters(), 0.1)
    assert [layer.name for layer in named.layers] == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_a_model_gives_roles_and_blocks_and_leaves_frozen_parameters_out():
    model = gpt()
    model.wpe.weight.requires_grad_(False)
    optimizer = Lanton(model, 0.1)
    by_name = {layer.name: layer for layer in optimizer.layers}
    assert by_name["wte.weight"].role == "embedding" and by_name["lm_head.weight"].role == "head"
    assert by_name["blocks.0.qkv.weight"].blocks == 3 and "wpe.weight" not in by_name
    assert len(optimizer.param_groups) == 1
    changed = Lanton(model, 0.1, roles={"lm_head.*": "hidden"})
    assert {la.name: la.role for la in changed.layers}["lm_head.weight"] == "hidden"
    groups = [{"params": [model.blocks[0].qkv.weight, model.blocks[0].qkv.bias], "role": "head"}]
    first, second = Lanton(groups, 0.1, model=model).layers
    assert (first.role, first.blocks, first.name, second.role) == ("head", 3, "blocks.0.qkv.weight", "vector")
    conv = cnn()
    assert Lanton([{"params": conv.parameters(), "role": "hidden"}], 0.1, model=conv).layers[0].role == "conv"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("noise_adaptive", [False, True])
def test_a_zero_gradient_moves_nothing_and_a_missing_one_is_skipped(dtype, noise_adaptive):
    model = Everything().to(dtype)
    before = weights(model)
    optimizer = Lanton(model, 0.1, weight_decay=0.1, noise_adaptive=noise_adaptive)
    play(model, optimizer, [{}, {"head.weight": torch.zeros(9, 6), "qkv.bias": torch.zeros(18)}])
    after = weights(model)
    assert all(torch.equal(before[n], after[n]) == (n not in ("head.weight", "qkv.bias")) for n in before)
    model.load_state_dict(before, strict=False)
    optimizer = Lanton(model, 0.1, noise_adaptive=noise_adaptive)
    play(model, optimizer, [{n: torch.zeros(p.shape) for n, p in before.items()}] * 2)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert set(optimizer.ratios.values()) == {1.0}


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_steps_do_not_depend_on_the_scale_of_the_loss(scale):
    one, other = Everything(), Everything()
    play(one, Lanton(one, 0.1, noise_adaptive=False), gradients(one, 3))
    play(other, Lanton(other, 0.1, noise_adaptive=False), gradients(other, 3, scale))
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-5)


def test_a_nan_shows_in_its_layer_alone_and_leaves_the_noise():
    model = Everything()
    optimizer = Lanton(model, 0.1, rule=NoiseAdaptiveRates(warmup=0, group_by="all"), lag=0)
    given = gradients(model, 6)
    play(model, optimizer, given[:4])
    before, noise = optimizer.ratios, optimizer.rates.rule.state_dict()
    for name in ("embedding.weight", "qkv.weight", "qkv.bias"):
        bad = {n: g.clone() for n, g in given[4].items()}
        bad[name].view(-1)[0] = math.nan
        optimizer.zero_grad()
        play(model, optimizer, [bad])
        assert optimizer.ratios == before and optimizer.rates.rule.state_dict() == noise
    broken = {n for n, p in model.named_parameters() if not p.isfinite().all()}
    assert broken == {"embedding.weight", "qkv.weight", "qkv.bias"}
    play(model, optimizer, given[5:])
    assert optimizer.ratios == before  # nothing to compare with
    play(model, optimizer, given[:1])
    assert optimizer.ratios != before


@pytest.mark.parametrize("lag", [0, 1])
def test_ratios_are_those_of_the_rule_on_injected_noise(lag):
    """Noise of 1, 2 and 4 in three layers of one shape: ratios of sqrt(sigma_min / sigma), by hand."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(3)))
    rule = NoiseAdaptiveRates(alpha=0.0, warmup=0, beta2=0.9, floor=0.01)
    optimizer = Lanton(model.parameters(), 1e-3, rule=rule, lag=lag)
    generator, changes, last = torch.Generator().manual_seed(0), [], {}
    for _ in range(40):
        step = {f"{i}.weight": torch.randn(16, 16, generator=generator) * 2.0**i for i in range(3)}
        play(model, optimizer, [step])
        if last:
            changes.append([float(torch.linalg.svdvals(step[n].double() - last[n]).sum()) ** 2 for n in step])
        last = step
    used = changes[: len(changes) - lag]
    noise = np.average(used, axis=0, weights=0.9 ** np.arange(len(used))[::-1])
    expected = (noise.min() / noise) ** 0.25
    assert list(optimizer.ratios.values()) == pytest.approx(expected, rel=1e-5)
    assert expected == pytest.approx([1.0, 0.5**0.5, 0.5], rel=0.1)
    assert steering_of(optimizer).ratios == optimizer.ratios and optimizer_family(optimizer) == "spectral"


def train(model, optimizer, steps, closure=False):
    """Training on the same data every time."""
    for step in steps if isinstance(steps, range) else range(steps):

        def backward(step=step):
            optimizer.zero_grad()
            inputs, labels = samples(8, 2, 6, 6, seed=step)
            loss = cross_entropy(model(inputs), labels)
            loss.backward()
            return loss

        if closure:
            assert optimizer.step(backward).isfinite()
        else:
            backward()
            assert optimizer.step() is None
    return model


def steep():
    return NoiseAdaptiveRates(warmup=0, group_by="all", beta2=0.8)


def test_a_floor_of_one_is_bitwise_no_adaptation():
    one, other = cnn(), cnn()
    train(one, Lanton(one, 0.02, rule=NoiseAdaptiveRates(floor=1.0)), 6)
    train(other, Lanton(other, 0.02, noise_adaptive=False), 6)
    assert same(one, other)


@pytest.mark.parametrize("closure", [False, True], ids=["loop", "closure"])
def test_steered_from_outside_it_equals_permanently_split_groups_bit_for_bit(closure):
    steered, reference, plain = cnn(), cnn(), cnn()
    ratios = {"0.*": 0.3, "3.weight": 0.77, "*.bias": 0.5}
    optimizer = Lanton(steered, 0.02, weight_decay=0.1, noise_adaptive=False)
    found = LayerwiseRates(optimizer, FixedRates(ratios), steered).ratios
    groups = [{"params": [p], "lr": 0.02 * found[n]} for n, p in reference.named_parameters()]
    by_hand = Lanton(groups, 0.02, weight_decay=0.1, noise_adaptive=False, model=reference)
    train(steered, optimizer, 6, closure)
    assert same(steered, train(reference, by_hand, 6))
    assert not same(steered, train(plain, Lanton(plain, 0.02, weight_decay=0.1, noise_adaptive=False), 6))


def test_its_own_noise_is_that_of_layerwise_rates_around_the_plain_one():
    one, other = cnn(), cnn()
    own = Lanton(one, 0.02, rule=steep())
    outer = Lanton(other, 0.02, noise_adaptive=False)
    rates = LayerwiseRates(outer, steep(), other)
    assert same(train(one, own, 6), train(other, outer, 6))
    assert own.ratios == rates.ratios and min(own.ratios.values()) < 1


def test_steering_a_noise_adaptive_one_again_is_refused():
    model = cnn()
    with pytest.raises(ValueError, match="this Lanton is steered already"):
        LayerwiseRates(Lanton(model, 0.02), FixedRates({}), model)


@pytest.mark.parametrize("closure", [False, True], ids=["loop", "closure"])
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("stop", [0, 1, 4])
def test_a_resumed_run_is_bitwise_the_one_that_never_stopped(lag, stop, closure):
    def start():
        model = cnn()
        return model, Lanton(model, 0.02, nesterov=True, rule=steep(), lag=lag)

    whole, optimizer = start()
    train(whole, optimizer, 8)
    going_on, other = start()
    train(going_on, other, stop)
    file = io.BytesIO()
    torch.save([going_on.state_dict(), other.state_dict()], file)
    assert same(train(going_on, other, range(stop, 8)), whole), "saving disturbed the run"
    file.seek(0)
    saved, state = torch.load(file, weights_only=True)
    resumed, third = start()
    train(resumed, third, 2)  # whatever was there is overwritten
    resumed.load_state_dict(saved)
    third.load_state_dict(state)
    assert same(train(resumed, third, range(stop, 8), closure), whole)
    assert third.ratios == optimizer.ratios and min(optimizer.ratios.values()) < 1


def test_the_state_by_name():
    model = cnn()
    optimizer = Lanton(model, 0.02)
    train(model, optimizer, 3)
    state = optimizer.state_dict()
    names = {n for n, _ in model.named_parameters()}
    assert state.keys() == {"state", "param_groups", "rates"}
    assert all(entry.keys() == {"momentum_buffer"} for entry in state["state"].values())
    assert state["rates"].keys() == {"kind", "rule", "gradients"} and state["rates"]["rule"]["updates"] == 2
    assert set(state["rates"]["rule"]["noise"]) == set(state["rates"]["gradients"]["previous"]) == names
    plain = Lanton(model, 0.02, noise_adaptive=False)
    plain.load_state_dict(state)
    assert plain.state_dict().keys() == {"state", "param_groups"}
    Lanton(model, 0.02).load_state_dict(plain.state_dict())


def test_parameters_that_join_later():
    model = cnn()
    reference = cnn()
    optimizer = Lanton([{"params": model[6].parameters()}], 0.02, rule=steep(), model=model)
    train(model, optimizer, 4)
    averages = copy.deepcopy(optimizer.rates.rule.noise.state_dict())
    reference.load_state_dict(model.state_dict())
    optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.5})
    train(model, optimizer, range(4, 5))
    assert {la.name: la.role for la in optimizer.layers}["0.weight"] == "conv" and len(optimizer.ratios) == 4
    assert not torch.equal(model[0].weight, reference[0].weight) and torch.equal(model[3].weight, reference[3].weight)
    assert all(value[1] > averages[name][1] for name, value in optimizer.rates.rule.noise.state_dict().items()
               if name in averages)  # fmt: skip
    train(model, optimizer, range(5, 8))
    assert optimizer.rates.rule.noise.state_dict()["0.weight"][1] > 0


def test_observing_before_clipping_reads_unclipped_gradients():
    model, plain = cnn(), cnn()
    optimizer, other = Lanton(model, 0.02, rule=steep()), Lanton(plain, 0.02, rule=steep())
    generator = torch.Generator().manual_seed(0)
    for key in range(6):
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        optimizer.observe(key=key)
        optimizer.observe(key=key)
        nn.utils.clip_grad_norm_(model.parameters(), 10.0**-key)
        optimizer.step()
        other.step()
    assert optimizer.ratios == other.ratios and optimizer.rates.rule.updates == 4


def test_bfloat16_parameters_move_as_far_as_those_in_float32():
    one, other = Everything(), Everything().bfloat16()
    start = weights(other)
    play(one, Lanton(one, 1.0, 0.0, noise_adaptive=False), gradients(one, 1))
    play(other, Lanton(other, 1.0, 0.0), gradients(other, 1))
    for n, p in other.named_parameters():
        assert p.dtype == torch.bfloat16
        # The gradient, the step and the sum are each rounded to eight bits.
        expected = one.get_parameter(n)
        assert (p - expected).norm() <= 0.02 * (expected.norm() + (expected - start[n].float()).norm()), n


def test_refusals():
    model = mlp(5, 7, 3)
    for arguments, message in (
        ({"lr": -1.0}, "lr must be zero or positive, got -1.0"),
        ({"lr": torch.ones(2)}, "lr as a tensor must have one entry"),
        ({"lr": 0.1, "momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1.0"),
        ({"lr": 0.1, "weight_decay": -1}, "weight_decay must be zero or positive"),
        ({"lr": 0.1, "radii": {"hiden": 1.0}}, "unknown role 'hiden' in radii"),
        ({"lr": 0.1, "radii": {"hidden": 0.0}}, "radius of 'hidden' must be positive"),
        ({"lr": 0.1, "scaling": "muon"}, "scaling must be one of rms_to_rms, original, match_rms_adamw"),
        ({"lr": 0.1, "lag": 2}, "lag must be 0 or 1"),
        ({"lr": 0.1, "noise_adaptive": False, "rule": FixedRates({})}, "only with noise_adaptive=True"),
    ):
        with pytest.raises(ValueError, match=message):
            Lanton(model, **arguments)
    for group, message in (
        ({"role": "bias"}, "unknown role 'bias'"),
        ({"radius": -1.0}, "radius must be positive and finite, got -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            Lanton([{"params": model.parameters(), **group}], 0.1)
    with pytest.raises(ValueError, match="pass it as model"):
        Lanton(model.parameters(), 0.1, roles={"*": "hidden"})
    with pytest.raises(ValueError, match="real floating parameters only"):
        Lanton([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))], 0.1)
    optimizer = Lanton(model[0].parameters(), 0.1)
    with pytest.raises(ValueError, match="momentum"):
        optimizer.add_param_group({"params": model[2].parameters(), "momentum": 2.0})
    assert len(optimizer.param_groups) == 1 and len(optimizer.layers) == 2
    sparse = nn.Embedding(4, 3, sparse=True)
    sparse(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="weight is sparse; use sparse=False"):
        Lanton(sparse, 0.1, noise_adaptive=False).step()


@pytest.mark.parametrize("noise_adaptive", [True, False])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_bitwise_and_apart(duplicate, noise_adaptive):
    model = cnn()
    optimizer = Lanton(model, 0.02, noise_adaptive=noise_adaptive, rule=steep() if noise_adaptive else None)
    train(model, optimizer, 4)
    other, twin = duplicate((model, optimizer))
    assert all(p is q for p, q in zip(other.parameters(), twin.param_groups[0]["params"], strict=True))
    before = {name: p.clone() for name, p in other.named_parameters()}
    train(model, optimizer, range(4, 8))
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())  # nothing is shared
    train(other, twin, range(4, 8))
    for name, p in model.named_parameters():
        assert torch.equal(p, other.get_parameter(name)) and not torch.equal(p, before[name])
    assert twin.ratios == optimizer.ratios and [la.role for la in twin.layers] == [la.role for la in optimizer.layers]
    assert steering_of(twin) is twin.rates is not optimizer.rates or not noise_adaptive


def test_a_rule_with_names_works_without_a_module():
    model = mlp(5, 7, 3)
    optimizer = Lanton(model.named_parameters(), 0.1, rule=FixedRates({"0.*": 0.5, "role:vector": 0.25}))
    assert optimizer.ratios == {"0.weight": 0.5, "0.bias": 0.5, "2.weight": 1.0, "2.bias": 0.25}
    with pytest.raises(ValueError, match="matches no layer"):
        Lanton(model.named_parameters(), 0.1, rule=FixedRates({"nope": 0.5}))


def test_a_tensor_rate_and_a_schedule_of_the_momentum():
    one, other = Everything(), Everything()
    rate = torch.tensor(0.02)
    tensor, number = Lanton(one, rate, rule=steep()), Lanton(other, 0.02, rule=steep())
    for step in gradients(one, 4):
        play(one, tensor, [step])
        play(other, number, [step])
        rate.mul_(0.5)  # as a capturable schedule does
        number.param_groups[0]["lr"] *= 0.5
        tensor.param_groups[0]["momentum"] = number.param_groups[0]["momentum"] = 0.8
    assert tensor.param_groups[0]["lr"] is rate and tensor.ratios == number.ratios
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)  # the rate itself is rounded to float32


def test_a_model_in_bfloat16_trains():
    model = gpt().bfloat16()
    optimizer = Lanton(model, 0.02, rule=steep())
    tokens = torch.randint(11, (8, 6), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = cross_entropy(model(tokens)[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("shape", [(4, 40, 40), (3, 64, 16), (3, 16, 64)])
def test_polar_factors_in_bfloat16_are_close_to_an_svd(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(matrices.double(), full_matrices=False)
    found = polar_factor(matrices, 6, dtype=torch.bfloat16)
    assert found.dtype == torch.float32
    # Only what is left of singular values below the reach of the iteration adds to the rounding.
    small = (s < 0.02 * s.norm(p=4, dim=-1, keepdim=True)).sum()
    assert (found - u @ vh).norm() <= (0.05 * s.numel() ** 0.5) + float(small)
    assert torch.linalg.svdvals(found).amax() < 1.05
    assert not polar_factor(torch.zeros(2, 3, 3), dtype=torch.bfloat16).any()
    with pytest.raises(ValueError, match="dtype must be floating point"):
        polar_factor(matrices, dtype=torch.int32)


class Asked(TorchDispatchMode):
    """Notes every operation that would make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "item", "masked_select", "unique"):
            self.waits.append(name)
        return function(*args, **(kwargs or {}))


def test_a_step_never_asks_for_a_value():
    model = Everything()
    optimizer = Lanton(model, 0.1, nesterov=True, weight_decay=0.1, noise_adaptive=False)
    play(model, optimizer, gradients(model, 1))
    with Asked() as asked:
        optimizer.step()
    assert not asked.waits


def test_matrices_of_one_shape_are_one_call():
    shapes = []

    def counting(stack):
        shapes.append(tuple(stack.shape))
        return polar_factor(stack)

    model = gpt()  # two blocks of width 8: packed and projection, up, down
    play(model, Lanton(model, 0.1, polar=counting, noise_adaptive=False), gradients(model, 1))
    assert sorted(shapes) == [(2, 8, 16), (2, 16, 8), (8, 8, 8)]


def test_other_memory_formats():
    one, other = cnn(), cnn().to(memory_format=torch.channels_last)
    given = gradients(one, 3)
    play(one, Lanton(one, 0.1, rule=steep()), given)
    play(other, Lanton(other, 0.1, rule=steep()), given)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)


def test_a_step_of_gpt2_takes_few_device_calls(monkeypatch):
    """And its products are in bfloat16 where that pays."""
    monkeypatch.setattr("dynamon.kernels.polar.half_pays", lambda device: True)
    model = gpt2("meta")
    fill_gradients(model)
    optimizer = Lanton(model, 0.01, noise_adaptive=False)
    optimizer.step()
    with Launches("meta") as launches:
        optimizer.step()
    assert launches.total <= 130 and launches.waits == 0, launches
    assert launches.calls["bmm.default"] + launches.calls["baddbmm.default"] == 3 * (1 + 5 * 3)  # three shapes


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("noise_adaptive", [False, True])
def test_a_distributed_checkpoint_resumes_bitwise(tmp_path, noise_adaptive, flatten):
    """The recipe of the docstring: averages and groups by torch's functions, the state of the rates as bytes."""
    options = checkpointing.StateDictOptions(flatten_optimizer_state_dict=flatten)

    def made():
        model = cnn()
        return model, Lanton(model, 0.02, noise_adaptive=noise_adaptive, rule=steep() if noise_adaptive else None)

    def rates_of(optimizer):
        held = io.BytesIO()
        torch.save({} if optimizer.rates is None else optimizer.rates.state_dict(), held)
        return held

    model, optimizer = made()
    train(model, optimizer, 4)
    model_state, state = checkpointing.get_state_dict(model, optimizer, options=options)
    checkpoint.save({"model": model_state, "optimizer": state, "rates": rates_of(optimizer)}, checkpoint_id=tmp_path)
    train(model, optimizer, range(4, 8))

    again, resumed = made()
    model_state, state = checkpointing.get_state_dict(again, resumed, options=options)
    loaded = {"model": model_state, "optimizer": state, "rates": io.BytesIO()}
    checkpoint.load(loaded, checkpoint_id=tmp_path)
    checkpointing.set_state_dict(
        again, resumed, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"], options=options
    )
    if noise_adaptive:
        loaded["rates"].seek(0)
        resumed.rates.load_state_dict(torch.load(loaded["rates"], weights_only=True))
    train(again, resumed, range(4, 8))
    assert same(model, again) and resumed.ratios == optimizer.ratios


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rule": "noise"}, "rule must be a dynamon.rates.Rule, got str"),
        ({"polar": 5}, "polar must be a function of matrices, got int"),
        ({"scaling": 0.2}, "scaling must be a name or a function, got float"),
        ({"model": "mlp"}, "model must be a torch.nn.Module, got str"),
    ],
)
def test_wrong_types_are_named(given, message):
    with pytest.raises(TypeError, match=message):
        Lanton(mlp(3, 4, 2).parameters(), 0.1, **given)
