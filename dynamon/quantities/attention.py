"""Logits of attention for some samples, heads and rows, computed again from queries and keys.

Call these functions with autocast off, which would compute logits in half precision.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SAMPLES, HEADS, ROWS = 8, 8, 16  # at most so many of each, evenly spread
_HIDDEN = 5e3  # logits that lie so far below the largest of their row are masked: masks add -1e4 and less
_NO_ROW = -5e8  # a row whose largest logit is lower sees nothing: masks hold -inf, -1e9 or the dtype's lowest number


class HeadStatistics(NamedTuple):
    """Hold what some heads of one call do.

    Attributes:
        heads: Which heads, H of them.
        sums: ``[3, H]``: the largest logit (minus infinity without a row), the sum over rows of the entropy relative to
            that of equal weights, and the number of these rows, which see two keys or more.
    """

    heads: list[int]
    sums: Tensor


def spread(count: int, most: int) -> slice:
    """Return a slice of at most so many of some indices, evenly spaced, the last one among them.

    Example:
        >>> from dynamon.quantities.attention import spread
        >>> list(range(10))[spread(10, 4)]
        [0, 3, 6, 9]
    """
    step = max(-(-count // most), 1)
    return slice((count - 1) % step, None, step)


def head_statistics(logits: Tensor, heads: Sequence[int]) -> HeadStatistics:
    """Reduce masked logits by head.

    Args:
        logits: ``[N, H, R, S]`` in float32 or float64: samples, heads, rows, keys.
        heads: The number of each head.

    Returns:
        The statistics, in float64 where the device has it or logits are.

    Cost: some fifteen calls. No host synchronisation.
    """
    largest = logits.amax(-1)
    is_seen = logits > (largest - _HIDDEN).unsqueeze(-1)
    keys = is_seen.sum(-1)
    valid = ~(largest <= _NO_ROW)  # NaN counts
    share = torch.special.entr(torch.softmax(logits, -1)).sum(-1) / keys.to(logits.dtype).log()
    counted = valid & ((keys > 1) | largest.isnan())
    total = torch.where(counted, share, torch.zeros_like(share)).sum((0, 2))
    top = torch.where(valid, largest, torch.full_like(largest, -math.inf)).amax((0, 2))
    return HeadStatistics(list(heads), torch.stack([top, total, counted.sum((0, 2)).to(total.dtype)]))


def scaled_dot_product(args: Sequence[Any], kwargs: Mapping[str, Any]) -> HeadStatistics | None:
    """Measure a call of ``torch.nn.functional.scaled_dot_product_attention``.

    Args:
        args: Its arguments. Queries are ``[..., H, L, E]``; without a dimension of heads they count as one head. Keys
            may have fewer heads (grouped queries).
        kwargs: Its arguments by name.

    Returns:
        The statistics; None for nested tensors and where there are no keys.

    Cost: logits of at most 8 samples, 8 heads and 16 rows in float32; their keys are copied. No host synchronisation.

    Example:
        >>> import torch
        >>> from dynamon.quantities.attention import scaled_dot_product
        >>> query = key = torch.eye(2).reshape(1, 1, 2, 2)
        >>> scaled_dot_product((query, key, key), {"is_causal": True, "scale": 1.0}).sums[0]
        tensor([1.])
    """
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    query, key, mask = given["query"].detach(), given["key"].detach(), given.get("attn_mask")
    if query.is_nested or key.is_nested or not query.numel() or not key.numel():
        return None
    with torch.no_grad():
        if mask is not None:
            mask = mask.broadcast_to(*query.shape[:-1], key.shape[-2])
        if query.ndim < 4:  # [L, E] or [N, L, E]: a head of its own
            query, key = (t.reshape(-1, 1, *t.shape[-2:]) for t in (query, key))
            mask = None if mask is None else mask.reshape(-1, 1, *mask.shape[-2:])
        if query.ndim > 4:
            key = key.broadcast_to(*query.shape[:-3], *key.shape[-3:])
            query, key = query.flatten(0, -4), key.flatten(0, -4)
            mask = None if mask is None else mask.flatten(0, -4)
        scale = given.get("scale")
        scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        return _statistics(query, key, mask, scale, bool(given.get("is_causal", False)))


def _statistics(query: Tensor, key: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> HeadStatistics:
    """Measure queries ``[N, H, L, E]`` and keys ``[N or 1, H or fewer, S, E]``; a mask is True where a key is seen."""
    samples, heads, rows = spread(len(query), SAMPLES), spread(query.shape[1], HEADS), spread(query.shape[2], ROWS)
    own = list(range(query.shape[1]))[heads]
    group = query.shape[1] // key.shape[1]
    keys = key[samples] if len(key) == len(query) else key
    keys = keys[:, heads] if group == 1 else torch.stack([keys[:, head // group] for head in own], 1)
    wide = torch.promote_types(query.dtype, torch.float32)
    queries = query[samples][:, heads][:, :, rows]
    logits = queries.to(wide) @ keys.to(wide).transpose(-1, -2) * scale
    if is_causal:
        place = torch.arange(query.shape[2], device=query.device)[rows, None]
        logits.masked_fill_(torch.arange(key.shape[2], device=query.device) > place, -math.inf)
    if mask is not None:
        seen = mask[samples][:, heads][:, :, rows]
        logits = logits.masked_fill_(~seen, -math.inf) if seen.dtype == torch.bool else logits + seen
    return head_statistics(logits, own)


def softmax_of_logits(
    args: Sequence[Any], kwargs: Mapping[str, Any], heads: int = 1, shift: Tensor | None = None
) -> HeadStatistics | None:
    """Measure a softmax over the last dimension of ``[N, H, L, S]`` or ``[N H, L, S]``, as attention by hand takes it.

    Args:
        args: Its arguments.
        kwargs: Its arguments by name.
        heads: H, for logits of three dimensions; one where it does not divide them.
        shift: What was subtracted from each row before, such as its maximum; of the shape of the logits with one key.

    Returns:
        The statistics; None where it is over something else. Where the largest logit of all rows of a head is exactly
        zero, something was subtracted that is not known, and the largest logit is NaN.
    """
    given = {**dict(zip(("input", "dim"), args, strict=False)), **kwargs}
    logits, dim = given.get("input"), given.get("dim")
    if not isinstance(logits, Tensor) or logits.ndim not in (3, 4) or not logits.numel():
        return None
    if dim not in (-1, logits.ndim - 1):
        return None
    if logits.ndim == 3:
        whole = (-1, heads if len(logits) % heads == 0 else 1)
        logits, shift = logits.unflatten(0, whole), None if shift is None else shift.reshape(len(logits), -1, 1)
        shift = None if shift is None else shift.unflatten(0, whole)
    samples, chosen, rows = spread(len(logits), SAMPLES), spread(logits.shape[1], HEADS), spread(logits.shape[2], ROWS)
    with torch.no_grad():
        wide = logits.detach()[samples][:, chosen][:, :, rows]
        wide = wide.to(torch.promote_types(wide.dtype, torch.float32))
        if shift is not None:
            wide = wide + shift.reshape(*logits.shape[:-1], 1)[samples][:, chosen][:, :, rows].to(wide.dtype)
        found = head_statistics(wide, list(range(logits.shape[1]))[chosen])
        if shift is None:
            found.sums[0].masked_fill_((wide.amax(-1) == 0).all(-1).all(0), torch.nan)
        return found


def multihead_attention(module: nn.MultiheadAttention, args: Sequence[Any], kwargs: Any) -> HeadStatistics | None:
    """Measure a call of ``torch.nn.MultiheadAttention``: its projections are computed again for some samples.

    Args:
        module: The module.
        args: The arguments of its ``forward``.
        kwargs: Its arguments by name.

    Returns:
        The statistics; None for nested tensors.

    Cost: queries and keys of at most 8 samples; the rest as in :func:`scaled_dot_product`.
    """
    given = inspect.signature(nn.MultiheadAttention.forward).bind(module, *args, **kwargs).arguments
    query, key = given["query"].detach(), given["key"].detach()
    if query.is_nested or key.is_nested or not query.numel() or not key.numel():
        return None
    with torch.no_grad():
        if query.ndim == 2:
            query, key = query.unsqueeze(0), key.unsqueeze(0)
        elif not module.batch_first:
            query, key = query.transpose(0, 1), key.transpose(0, 1)
        whole = len(query), module.num_heads, query.shape[1], key.shape[1]
        samples = spread(len(query), SAMPLES)
        query, key = query[samples], key[samples]
        mask = _module_mask(given.get("attn_mask"), given.get("key_padding_mask"), whole, samples)
        query, key, more = _projected(module, query, key)
        if more and mask is not None:
            mask = F.pad(mask, (0, more))
        return _statistics(query, key, mask, query.shape[-1] ** -0.5, False)


def _module_mask(
    mask: Tensor | None, padding: Tensor | None, whole: tuple[int, int, int, int], samples: slice
) -> Tensor | None:
    """Return what a module's two masks add to the logits, ``[N, H, L, S]``; True hides a key in both."""
    batch, heads, rows, keys = whole
    found: Tensor | None = None
    if mask is not None:
        added = _added(mask)
        added = added.view(batch, heads, rows, keys) if added.ndim == 3 else added.expand(batch, heads, rows, keys)
        found = added[samples]
    if padding is not None:
        hidden = _added(padding).view(batch, 1, 1, keys).expand(batch, heads, rows, keys)[samples]
        found = hidden if found is None else found + hidden
    return found


def _added(mask: Tensor) -> Tensor:
    return (
        torch.zeros(mask.shape, device=mask.device).masked_fill_(mask, -math.inf) if mask.dtype == torch.bool else mask
    )


def _projected(module: nn.MultiheadAttention, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return queries and keys ``[N, H, L, E]`` as the module makes them, and how many keys it adds."""
    width, bias = module.embed_dim, module.in_proj_bias
    if module._qkv_same_embed_dim:
        weights = module.in_proj_weight[:width], module.in_proj_weight[width : 2 * width]
    else:
        weights = module.q_proj_weight, module.k_proj_weight
    biases = (None, None) if bias is None else (bias[:width], bias[width : 2 * width])
    wide = torch.promote_types(torch.promote_types(query.dtype, weights[0].dtype), torch.float32)
    query, key = (
        F.linear(t.to(wide), w.detach().to(wide), None if b is None else b.detach().to(wide))
        for t, w, b in zip((query, key), weights, biases, strict=True)
    )
    more = [] if module.bias_k is None else [module.bias_k.detach().to(wide).expand(len(key), 1, width)]
    more += [key.new_zeros(len(key), 1, width)] if module.add_zero_attn else []
    key = torch.cat([key, *more], 1)
    query, key = (t.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for t in (query, key))
    return query, key, len(more)
