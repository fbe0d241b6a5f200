"""Gradient noise, dual norms and the ratios they call for, against a calculation written out here."""

import json
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from dynamon.layers import describe_layers
from dynamon.quantities.gradient_reader import GradientReader
from dynamon.quantities.noise import NoiseEstimator
from dynamon.rates import FixedRates, NoiseAdaptiveRates
from tests.models import cnn, gpt, mlp, samples

FAMILIES = ("sign", "euclidean", "spectral")


def dual(layer, g, family):
    """The dual norm of a gradient by family and role, with numpy."""
    if family == "sign":
        return np.abs(g).sum()
    if family == "euclidean":
        return np.linalg.norm(g)
    if layer.role in ("embedding", "head"):
        return np.abs(g).sum()
    if layer.role == "vector":
        return math.sqrt(g.size) * np.linalg.norm(g)
    window = math.prod(g.shape[2:])
    blocks = np.split(g.reshape(len(g), -1), layer.blocks)  # queries, keys and values in one
    singular = [np.linalg.svd(block, compute_uv=False) for block in blocks]
    return math.sqrt(len(blocks[0]) / g.shape[1]) / window * np.sum(singular)


def gradients(model, steps, seed=0):
    """Real gradients of a few steps of training, as a list of lists of arrays; ``.grad`` holds each in turn."""
    shape = (6, 2, 6, 6) if any(p.ndim == 4 for p in model.parameters()) else (6, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        inputs, labels = samples(*shape, seed=seed + step)
        if hasattr(model, "wte"):
            inputs = labels = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(seed + step))
        optimizer.zero_grad()
        cross_entropy(model(inputs).flatten(0, -2), labels.flatten()).backward()
        yield [p.grad.detach().clone().double().numpy() for p in model.parameters()]
        optimizer.step()


MODELS = {"mlp": lambda: mlp(5, 7, 6, 3), "cnn": cnn, "gpt": gpt}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.mark.parametrize("family", FAMILIES)
def test_readings_over_several_steps(model, family):
    reader = GradientReader(describe_layers(model), family)
    previous = None
    for step, current in enumerate(gradients(model, 4)):
        assert reader.begin(step) and not reader.begin(step)
        pending = reader.read()
        assert reader.read() is pending
        found = pending.wait()
        assert found.present.all() and found.finite and not found.nonfinite.any()
        assert found.compared.all() == (step > 0)
        for i, (layer, g) in enumerate(zip(reader.layers, current, strict=True)):
            assert found.l1[i] == pytest.approx(np.abs(g).sum(), rel=1e-5)
            assert found.l2[i] == pytest.approx(np.linalg.norm(g), rel=1e-5)
            assert found.dual[i] == pytest.approx(dual(layer, g, family), rel=1e-4)
            if previous is None:
                assert math.isnan(found.difference_dual[i]) and math.isnan(found.inner[i])
                continue
            change = g - previous[i]
            assert found.difference_l2[i] == pytest.approx(np.linalg.norm(change), rel=1e-4)
            assert found.difference_dual[i] == pytest.approx(dual(layer, change, family), rel=1e-4, abs=1e-7)
            lengths = np.linalg.norm(g) * np.linalg.norm(previous[i])
            assert found.inner[i] == pytest.approx((g * previous[i]).sum(), abs=1e-5 * lengths)
        previous = current


def expected_ratios(layers, history, family, rule):
    """What the published rule makes of a list of gradients: noise, then ratios within each role."""
    noise = np.zeros(len(layers))
    for before, after in zip(history, history[1:], strict=False):
        fresh = [dual(la, b - a, family) ** 2 for la, a, b in zip(layers, before, after, strict=True)]
        noise = rule.beta2 * noise + (1 - rule.beta2) * np.array(fresh)
    updates = len(history) - 1
    noise = noise / (1 - rule.beta2**updates)
    scale = np.array([iid(la, family) if rule.normalize_shape else 1.0 for la in layers])
    relative = noise / scale**2
    ratios = np.ones(len(layers))
    for key in {group(la, family, rule.group_by) for la in layers}:
        members = [i for i, la in enumerate(layers) if group(la, family, rule.group_by) == key]
        members = [i for i in members if relative[i] > 1e-6 * np.median(relative[members])]  # dead biases
        floor = rule.alpha**2 * np.median(relative[members])
        quiet = relative[members].min()
        for i in members:
            ratios[i] = max(((floor + quiet) / (floor + relative[i])) ** 0.25, rule.floor)
    share = 1.0 if not rule.warmup else min(max(updates - rule.warmup, 0) / rule.warmup, 1.0)
    return np.sqrt(noise), ratios**share


def group(layer, family, group_by):
    by_role = (layer.role,)
    return {"all": (), "role": by_role, "role_and_shape": (*by_role, *layer.parameter.shape)}[group_by]


def iid(layer, family):
    """Dual norm of noise with entries of mean square one, to leading order."""
    shape = layer.parameter.shape
    if family == "euclidean":
        return math.sqrt(math.prod(shape))
    if family == "spectral" and layer.role in ("hidden", "conv"):
        rows, columns = shape[0] // layer.blocks, math.prod(shape[1:])
        factor = math.sqrt(rows / shape[1]) / math.prod(shape[2:])
        return layer.blocks * factor * min(rows, columns) * math.sqrt(max(rows, columns))
    return math.prod(shape)


RULES = {
    "default": {"warmup": 0},
    "published": {"alpha": 0.0, "normalize_shape": False, "floor": 1e-6, "warmup": 0},
    "all together": {"group_by": "all", "warmup": 0, "beta2": 0.5},
    "by shape": {"group_by": "role_and_shape", "warmup": 0, "beta2": 0.0},
    "high floor": {"floor": 0.8, "group_by": "all", "warmup": 0},
    "warm-up": {"warmup": 3, "group_by": "all"},
    "alpha": {"alpha": 3.0, "warmup": 0, "group_by": "all"},
}


def run(model, rule, steps, family):
    """Feed a rule the readings of some steps of training."""
    reader = GradientReader(describe_layers(model), family)
    rule.start(reader.layers, reader.norms)
    history, seen = [], []
    for step, current in enumerate(gradients(model, steps)):
        reader.begin(step)
        rule.update(reader.read().wait())
        history.append(current)
        seen.append(rule.ratios().copy())
    return reader, history, seen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("arguments", RULES.values(), ids=RULES)
def test_noise_and_ratios_are_those_of_the_formula(model, family, arguments):
    rule = NoiseAdaptiveRates(**arguments)
    reader, history, seen = run(model, rule, 6, family)
    assert (seen[0] == 1).all() and rule.updates == 5
    for step in range(1, 6):
        noise, ratios = expected_ratios(reader.layers, history[: step + 1], family, rule)
        np.testing.assert_allclose(seen[step], ratios, rtol=2e-4)
    np.testing.assert_allclose(rule.noise.values, noise, rtol=2e-4, atol=1e-7)
    assert (seen[-1] > 0).all() and (seen[-1] <= 1).all() and (rule.floor**1.0001 <= seen[-1]).all()
    target = expected_ratios(reader.layers, history, family, rule)[1]
    if rule.warmup == 0:
        assert rule.bounded() == (target <= rule.floor).sum()


def test_the_quietest_of_a_group_keeps_its_rate():
    model = mlp(5, 7, 6, 3)
    reader, _, seen = run(model, NoiseAdaptiveRates(warmup=0), 5, "sign")
    roles = np.array([layer.role for layer in reader.layers])
    for role in set(roles):
        assert seen[-1][roles == role].max() == 1
    assert (seen[-1] < 1).any()


def test_ratios_do_not_depend_on_the_scale_of_the_loss():
    def ratios(scale):
        model = mlp(5, 7, 6, 3)
        reader = GradientReader(describe_layers(model), "sign")
        rule = NoiseAdaptiveRates(warmup=0)
        rule.start(reader.layers, reader.norms)
        for step, _ in enumerate(gradients(model, 4)):
            reader.begin(step)
            rule.update(reader.read(scale).wait())
        return rule.ratios()

    np.testing.assert_allclose(ratios(1024.0), ratios(1.0), rtol=1e-5)


def test_warm_up_is_exactly_one_and_then_goes_over():
    model = mlp(5, 7, 6, 3)
    _, _, seen = run(model, NoiseAdaptiveRates(warmup=4, group_by="all"), 12, "sign")
    assert all((ratios == 1).all() for ratios in seen[:5])  # step k has k updates
    lowest = [ratios.min() for ratios in seen]
    assert lowest[5] < 1 and lowest[8] < lowest[5]


def poisoned(model, bad_steps, value=math.nan, steps=8):
    """Noise, ratios and number of updates after every step, with a bad gradient at some of them."""
    reader = GradientReader(describe_layers(model), "sign")
    rule = NoiseAdaptiveRates(warmup=0, beta2=0.5)
    rule.start(reader.layers, reader.norms)
    rows = []
    for step, _ in enumerate(gradients(model, steps)):
        kept = reader.layers[2].parameter.grad[0, 0].clone()
        if step in bad_steps:
            reader.layers[2].parameter.grad[0, 0] = value
        reader.begin(step)
        readings = reader.read().wait()
        rule.update(readings)
        reader.layers[2].parameter.grad[0, 0] = kept  # the weights go on as if nothing had happened
        rows.append((rule.noise.values.copy(), rule.ratios().copy(), rule.updates, readings))
    return rows


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_nonfinite_gradient_freezes_this_step_and_the_next(value):
    clean, rows = poisoned(mlp(5, 7, 3), {}), poisoned(mlp(5, 7, 3), {3}, value)
    assert [row[2] for row in clean] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert [row[2] for row in rows] == [0, 1, 2, 2, 2, 3, 4, 5]
    for step in (3, 4):
        np.testing.assert_array_equal(rows[step][0], rows[2][0])
        np.testing.assert_array_equal(rows[step][1], rows[2][1])
    assert rows[3][3].nonfinite.tolist() == [0, 0, 1, 0] and rows[4][3].nonfinite.sum() == 0
    assert not rows[3][3].finite and not rows[4][3].finite and rows[5][3].finite
    assert np.isfinite(rows[-1][0]).all() and np.isfinite(rows[-1][1]).all()
    # The noise is that of the clean run with two of its changes left out, at the same decay.
    changes = [row[3].difference_dual ** 2 for row in clean]
    mean, weight = 0.0, 0.0
    for step in (1, 2, 5, 6, 7):
        mean, weight = 0.5 * mean + 0.5 * changes[step], 0.5 * weight + 0.5
    np.testing.assert_allclose(rows[-1][0], np.sqrt(mean / weight), rtol=1e-5)


def test_a_run_of_bad_gradients():
    rows = poisoned(mlp(5, 7, 3), {0, 2, 3, 6})
    assert [row[2] for row in rows] == [0, 0, 0, 0, 0, 1, 1, 1]


def test_missing_gradients():
    model = mlp(5, 7, 3)
    reader = GradientReader(describe_layers(model), "sign")
    rule = NoiseAdaptiveRates(warmup=0, group_by="all")
    rule.start(reader.layers, reader.norms)
    missing = {1: [0], 3: [0, 1, 2, 3], 4: [2]}
    for step, _ in enumerate(gradients(model, 7)):
        for i in missing.get(step, []):
            reader.layers[i].parameter.grad = None
        reader.begin(step)
        found = reader.read().wait()
        absent, before = set(missing.get(step, [])), set(missing.get(step - 1, []))
        assert found.present.tolist() == [i not in absent for i in range(4)]
        assert found.compared.tolist() == [step > 0 and i not in absent | before for i in range(4)]
        assert found.finite and np.isfinite(found.l2).tolist() == found.present.tolist()
        rule.update(found)
        assert np.isfinite(rule.ratios()).all()
        if step == 2:
            assert math.isnan(rule.noise.values[0]) and rule.ratios()[0] == 1
    assert np.isfinite(rule.noise.values).all()


def test_layers_that_never_change_keep_their_rate():
    model = mlp(5, 7, 3)
    reader = GradientReader(describe_layers(model), "sign")
    rule = NoiseAdaptiveRates(warmup=0, group_by="all", alpha=0.0)
    rule.start(reader.layers, reader.norms)
    for step, _ in enumerate(gradients(model, 3)):
        reader.layers[0].parameter.grad.fill_(1.0)
        reader.begin(step)
        rule.update(reader.read().wait())
    assert rule.noise.values[0] == 0 and rule.ratios()[0] == 1 and rule.ratios()[1:].max() == 1


def test_a_skipped_step_is_not_compared_across():
    model = mlp(5, 7, 3)
    reader = GradientReader(describe_layers(model), "sign")
    seen = []
    for step, current in enumerate(gradients(model, 6)):
        reader.begin(step)
        if step == 2:
            continue
        if step == 4:
            reader.store()
            stored = current
            continue
        found = reader.read().wait()
        seen.append(bool(found.compared.all()))
        if step == 5:
            changes = [np.abs(b - a).sum() for a, b in zip(stored, current, strict=True)]
            np.testing.assert_allclose(found.difference_dual, changes, rtol=1e-4)
    assert seen == [False, True, False, True]


def test_sparse_and_empty_readings():
    embedding = torch.nn.Embedding(6, 3, sparse=True)
    reader = GradientReader(describe_layers(embedding), "sign")
    embedding(torch.tensor([1, 1, 4])).sum().backward()
    reader.begin(0)
    assert reader.read().wait().l1.tolist() == [9]
    embedding.zero_grad()
    reader.begin(1)
    empty = reader.read().wait()
    assert not empty.present.any() and not empty.compared.any() and empty.finite


def test_gradients_still_scaled_by_an_amp_scaler():
    model = mlp(5, 7, 3)
    plain, scaled = (GradientReader(describe_layers(model), "spectral") for _ in range(2))
    for step, _ in enumerate(gradients(model, 3)):
        plain.begin(step), scaled.begin(step)
        expected = plain.read().wait()
        for p in model.parameters():
            p.grad.mul_(4096)
        found = scaled.read(scale=1 / 4096).wait()
        for p in model.parameters():
            p.grad.div_(4096)
        np.testing.assert_allclose(found.dual, expected.dual, rtol=1e-6)
        np.testing.assert_allclose(found.difference_dual, expected.difference_dual, rtol=1e-6)


def test_double_precision_is_kept():
    model = mlp(5, 7, 3).double()
    reader = GradientReader(describe_layers(model), "spectral")
    rng = np.random.default_rng(0)
    base = [rng.normal(size=p.shape) for p in model.parameters()]
    for step in range(2):
        for p, g in zip(model.parameters(), base, strict=True):
            p.grad = torch.tensor(g + 1e-9 * step)
        reader.begin(step)
        found = reader.read().wait()
    for i, layer in enumerate(reader.layers):
        change = np.full(layer.parameter.shape, 1e-9)
        assert found.difference_dual[i] == pytest.approx(dual(layer, change, "spectral"), rel=1e-4)


def test_state_round_trip_goes_through_json_and_continues_bitwise():
    model = mlp(5, 7, 6, 3)
    whole = NoiseAdaptiveRates(warmup=2, group_by="all")
    _, _, seen = run(model, whole, 8, "sign")

    model = mlp(5, 7, 6, 3)
    first = NoiseAdaptiveRates(warmup=2, group_by="all")
    reader = GradientReader(describe_layers(model), "sign")
    first.start(reader.layers, reader.norms)
    for step, _ in enumerate(gradients(model, 8)):
        if step == 4:
            saved, stored = json.loads(json.dumps(first.state_dict())), reader.state_dict()
            reader = GradientReader(describe_layers(model), "sign")
            reader.load_state_dict(stored)
            first = NoiseAdaptiveRates(warmup=2, group_by="all")
            first.start(reader.layers, reader.norms)
            first.load_state_dict(saved)
            np.testing.assert_array_equal(first.ratios(), seen[3])
        reader.begin(step)
        first.update(reader.read().wait())
        np.testing.assert_array_equal(first.ratios(), seen[step])
    assert first.updates == whole.updates


def test_state_of_other_layers_is_left_out():
    reader, _, _ = run(mlp(5, 7, 3), NoiseAdaptiveRates(), 3, "sign")
    other = GradientReader(describe_layers(mlp(5, 6, 3)), "sign")
    other.load_state_dict({"previous": {**reader.state_dict()["previous"], "gone": torch.ones(2)}})
    assert sorted(other.layers[i].name for i in other._previous) == ["2.bias"]
    noise = NoiseEstimator(["2.bias", "new"])
    noise.load_state_dict({"2.bias": [2.0, 1.0, 0.0, 0.5, 0], "gone": [1.0, 1.0, 0.0, 1.0, 0]})
    assert noise.squared[0] == 4 and math.isnan(noise.squared[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -0.1}, "alpha must be zero or positive, got -0.1"),
        ({"alpha": math.nan}, "alpha must be"),
        ({"beta2": 1.0}, r"beta2 must lie in \[0, 1\), got 1.0"),
        ({"group_by": "norm"}, "group_by must be one of .*, got 'norm'"),
        ({"floor": 0.0}, r"floor must lie in \(0, 1\], got 0.0"),
        ({"floor": 1.5}, "floor must lie in"),
        ({"warmup": -1}, "warmup must be zero or more updates, got -1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        NoiseAdaptiveRates(**arguments)


def test_noise_estimator_refuses_a_bad_decay():
    with pytest.raises(ValueError, match=r"beta2 must lie in \[0, 1\), got 1"):
        NoiseEstimator(["w"], beta2=1)


def fixed(ratios, model):
    rule = FixedRates(ratios)
    layers = describe_layers(model)
    rule.start(layers, [])
    return dict(zip([layer.name for layer in layers], rule.ratios().tolist(), strict=True))


def test_fixed_rates_by_name_glob_and_role():
    model = gpt(tied=True)
    found = fixed({"blocks.0.qkv.weight": 0.5, "blocks.0.*": 0.25, "role:embedding": 2.0}, model)
    assert found["blocks.0.qkv.weight"] == 0.5 and found["blocks.0.proj.weight"] == 0.25
    assert found["wte.weight"] == found["wpe.weight"] == 2.0 and found["blocks.1.qkv.weight"] == 1.0
    assert fixed({"lm_head.weight": 3.0}, model)["wte.weight"] == 3.0
    assert set(fixed({}, model).values()) == {1.0}


@pytest.mark.parametrize("ratio", [0.0, -1.0, math.inf, math.nan])
def test_fixed_rates_must_be_positive(ratio):
    with pytest.raises(ValueError, match="the ratio for 'a' must be positive and finite"):
        FixedRates({"a": ratio})


def test_fixed_rates_that_match_nothing():
    with pytest.raises(ValueError, match="'blok.*' matches no layer"):
        FixedRates({"*.weight": 0.5, "blok.*": 0.5}).check(describe_layers(gpt()))
    assert FixedRates({}).state_dict() == {} and not FixedRates({}).needs_gradients
