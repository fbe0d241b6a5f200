"""Logits of attention against dense float64 computations: masks, groups of heads, packed and separate projections."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynamon.quantities import attention
from dynamon.quantities.attention import (
    head_statistics,
    multihead_attention,
    scaled_dot_product,
    softmax_of_logits,
    spread,
)

DRAW = torch.Generator().manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=DRAW)


def entropies(weights: Tensor) -> Tensor:
    """Entropy of each row over that of equal weights on the keys that it sees; NaN for rows with one key or none."""
    found = torch.full(weights.shape[:-1], math.nan, dtype=torch.float64)
    for place in np.ndindex(*weights.shape[:-1]):
        own = weights[place].double()
        own = own[own > 0]
        if len(own) > 1 and not own.isnan().any():
            found[place] = -(own * own.log()).sum() / math.log(len(own))
    return found


def dense(logits: Tensor) -> tuple[list[float], list[float]]:
    """Largest logit and mean relative entropy by head, of logits ``[N, H, L, S]``, minus infinity for hidden keys."""
    logits = logits.double()
    weights = torch.softmax(logits, -1)
    share = entropies(weights)
    heads = logits.shape[1]
    return [float(logits[:, h].max()) for h in range(heads)], [float(share[:, h].nanmean()) for h in range(heads)]


def close(found: attention.HeadStatistics, logits: Tensor) -> None:
    largest, entropy = dense(logits)
    np.testing.assert_allclose(found.sums[0].numpy(), [largest[h] for h in found.heads], rtol=1e-5)
    np.testing.assert_allclose((found.sums[1] / found.sums[2]).numpy(), [entropy[h] for h in found.heads], 1e-5, 1e-7)


def causal(rows: int, keys: int) -> Tensor:
    return torch.ones(rows, keys, dtype=torch.bool).tril()


BOOL, FLOAT = torch.rand(6, 9, generator=DRAW) > 0.3, draw(3, 1, 6, 9)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 2.5},
    "bool mask": {"attn_mask": BOOL},
    "float mask": {"attn_mask": FLOAT},
    "mask of samples": {"attn_mask": torch.rand(3, 1, 1, 9, generator=DRAW) > 0.4},
    "minus infinity": {"attn_mask": torch.zeros(6, 9).masked_fill_(~BOOL, -math.inf)},
    "lowest number": {"attn_mask": torch.zeros(6, 9).masked_fill_(~BOOL, torch.finfo(torch.float32).min)},
}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_a_dense_computation(name) -> None:
    query, key, given = draw(3, 4, 6, 8), draw(3, 4, 9, 8), CASES[name]
    logits = query.double() @ key.double().transpose(-1, -2) * given.get("scale", 8**-0.5)
    mask = given.get("attn_mask")
    if given.get("is_causal"):
        logits = logits.masked_fill(~causal(6, 9), -math.inf)
    if mask is not None:
        hidden = ~mask if mask.dtype == torch.bool else mask < -1e30
        added = 0 if mask.dtype == torch.bool else mask.clamp(min=-1e30).double()
        logits = (logits + added).masked_fill(hidden, -math.inf)
    close(scaled_dot_product((query, key, key), given), logits)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("repeats", [False, True])
def test_heads_that_share_keys(groups, repeats) -> None:
    query, key = draw(2, 4, 5, 8), draw(2, groups, 5, 8)
    whole = key.repeat_interleave(4 // groups, 1)
    logits = query.double() @ whole.double().transpose(-1, -2) / math.sqrt(8)
    given = (query, whole, whole) if repeats else (query, key, key)
    close(scaled_dot_product(given, {} if repeats else {"enable_gqa": True}), logits)


@pytest.mark.parametrize("shape", [(5, 8), (3, 5, 8), (2, 3, 4, 5, 8)])
def test_any_number_of_dimensions(shape) -> None:
    query, key, mask = draw(*shape), draw(*shape), torch.rand(*shape[:-1], 5, generator=DRAW) > 0.3
    logits = (query.double() @ key.double().transpose(-1, -2) / math.sqrt(8)).masked_fill(~mask, -math.inf)
    heads = 1 if len(shape) < 4 else shape[-3]
    close(scaled_dot_product((query, key, key, mask), {}), logits.reshape(-1, heads, 5, 5))


def test_few_heads_rows_and_samples_of_many() -> None:
    query, key = draw(20, 12, 100, 8), draw(20, 12, 100, 8)
    logits = (query.double() @ key.double().transpose(-1, -2) / math.sqrt(8)).masked_fill(~causal(100, 100), -math.inf)
    found = scaled_dot_product((query, key, key), {"is_causal": True})
    rows, samples = list(range(100))[spread(100, attention.ROWS)], list(range(20))[spread(20, attention.SAMPLES)]
    assert len(found.heads) <= attention.HEADS and len(rows) <= attention.ROWS and len(samples) <= attention.SAMPLES
    assert found.heads[-1] == 11 and rows[-1] == 99
    close(found, logits[samples][:, :, rows])


def test_half_precision_is_measured_in_float32() -> None:
    query, key = draw(2, 2, 6, 64).bfloat16() * 8, draw(2, 2, 6, 64).bfloat16() * 8
    found = scaled_dot_product((query, key, key), {})
    assert found.sums.dtype == torch.float32
    close(found, query.double() @ key.double().transpose(-1, -2) / 8)


def test_rows_without_keys_and_with_one() -> None:
    mask = torch.tensor([[False, False], [True, False]])
    query = draw(1, 1, 2, 4)
    found = scaled_dot_product((query, query, query, mask), {})
    assert float(found.sums[0]) == pytest.approx(float(query[0, 0, 1] @ query[0, 0, 0]) / 2)
    assert found.sums[1:].tolist() == [[0.0], [0.0]]  # no row sees two keys
    nothing = scaled_dot_product((query, query, query, torch.zeros(2, 2, dtype=torch.bool)), {})
    assert float(nothing.sums[0]) == -math.inf


def test_what_is_not_finite_shows() -> None:
    query = draw(1, 2, 3, 4)
    query[0, 1, 2, 0] = math.nan
    found = scaled_dot_product((query, draw(1, 2, 3, 4), query), {})
    assert torch.isfinite(found.sums[:, 0]).all() and torch.isnan(found.sums[:2, 1]).all()


def test_known_entropies() -> None:
    equal, sure = torch.zeros(1, 1, 4, 6), torch.tensor([100.0, 0, 0]).expand(1, 1, 4, 3)
    for logits, expected in ((equal, 1.0), (sure, 0.0)):
        found = head_statistics(logits, [0])
        assert float(found.sums[1] / found.sums[2]) == pytest.approx(expected, abs=1e-6)


def test_a_softmax_over_keys_is_attention_and_no_other() -> None:
    logits = draw(2, 3, 5, 7)
    close(softmax_of_logits((logits, -1), {}), logits)
    close(softmax_of_logits((logits,), {"dim": 3, "dtype": torch.float32}), logits)
    for left in ((logits, 1), (logits[0], 1), (logits[0, 0], -1), (logits[None], -1)):
        assert softmax_of_logits(left, {}) is None


def test_what_was_subtracted_from_rows_is_added_or_leaves_no_largest_logit() -> None:
    logits = draw(2, 3, 5, 7)
    top = logits.amax(-1, keepdim=True)
    close(softmax_of_logits((logits - top, -1), {}, shift=top), logits)
    found = softmax_of_logits((logits - top, -1), {})
    assert found.sums[0].isnan().all() and found.sums[1:].isfinite().all()


def test_logits_of_three_dimensions_hold_the_heads_of_each_sample() -> None:
    logits = draw(6, 5, 7)
    close(softmax_of_logits((logits, -1), {}, heads=3), logits.view(2, 3, 5, 7))
    for heads in (1, 4):  # four do not divide six
        close(softmax_of_logits((logits, 2), {}, heads=heads), logits[:, None])


KINDS: dict[str, dict[str, Any]] = {
    "packed": {},
    "batch first": {"batch_first": True},
    "without bias": {"bias": False},
    "separate": {"kdim": 6, "vdim": 5},
    "more keys": {"add_bias_kv": True, "add_zero_attn": True},
}
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"attn_mask": ~causal(5, 7)},
    "of heads": {"attn_mask": torch.rand(6, 5, 7, generator=DRAW) > 0.7},
    "float": {"attn_mask": draw(5, 7)},
    "padding": {"key_padding_mask": torch.tensor([[False] * 5 + [True] * 2, [False] * 7, [True] + [False] * 6])},
    "both": {"attn_mask": ~causal(5, 7), "key_padding_mask": torch.tensor([[False] * 6 + [True]] * 3)},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", MASKS)
def test_multihead_attention(kind, masked) -> None:
    """The module's own weights tell the entropy, and its projections by hand the logits."""
    torch.manual_seed(1)
    module = nn.MultiheadAttention(8, 2, **KINDS[kind]).double()
    for p in module.parameters():
        nn.init.normal_(p)
    width = KINDS[kind].get("kdim", 8)
    query, key, value = (
        draw(3, 5, 8).double(),
        draw(3, 7, width).double(),
        draw(3, 7, KINDS[kind].get("vdim", 8)).double(),
    )
    given = [t if module.batch_first else t.transpose(0, 1) for t in (query, key, value)]
    masks = {k: v.double() if v.is_floating_point() else v for k, v in MASKS[masked].items()}
    _, weights = module(*given, **masks, average_attn_weights=False)
    found = multihead_attention(module, given, masks)
    np.testing.assert_allclose(
        (found.sums[1] / found.sums[2]).numpy(), entropies(weights.detach()).nanmean((0, 2)).numpy(), rtol=1e-9
    )
    logits = _by_hand(module, query, key)
    seen = weights.detach() > 0
    if "attn_mask" in masks and masks["attn_mask"].is_floating_point():
        logits = logits + F.pad(masks["attn_mask"], (0, logits.shape[-1] - 7))
    largest = [float(logits[:, h][seen[:, h]].max()) for h in range(2)]
    np.testing.assert_allclose(found.sums[0].numpy(), largest, rtol=1e-9)


def _by_hand(module: nn.MultiheadAttention, query: Tensor, key: Tensor) -> Tensor:
    separate = module.in_proj_weight is None
    weight_q, weight_k = (
        (module.q_proj_weight, module.k_proj_weight)
        if separate
        else (module.in_proj_weight[:8], module.in_proj_weight[8:16])
    )
    bias = torch.zeros(16) if module.in_proj_bias is None else module.in_proj_bias[:16]
    logits = torch.zeros(3, 2, 5, 7 + 2 * (module.bias_k is not None), dtype=torch.float64)
    for n in range(3):
        queries = query[n] @ weight_q.T + bias[:8]
        keys = [weight_k @ one + bias[8:] for one in key[n]]
        if module.bias_k is not None:
            keys += [module.bias_k[0, 0], torch.zeros(8)]
        for h, i, j in np.ndindex(2, 5, logits.shape[-1]):
            part = slice(4 * h, 4 * h + 4)
            logits[n, h, i, j] = (queries[i, part] * keys[j][part]).sum() / 2
    return logits.detach()


def test_multihead_attention_without_samples() -> None:
    module = nn.MultiheadAttention(8, 2)
    x = draw(5, 8)
    alone, batched = multihead_attention(module, (x, x, x), {}), multihead_attention(module, [x.unsqueeze(1)] * 3, {})
    assert torch.equal(alone.sums, batched.sums)
