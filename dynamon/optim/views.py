"""Regroup an optimizer's parameters by ratio for the duration of one step."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

_Bucket = tuple[float, list[Tensor]]


class GroupViews:
    """Replaces an optimizer's groups by views with scaled rates, and restores them.

    Args:
        optimizer: The owner of the ``param_groups``.
        scale_weight_decay: Whether decoupled weight decay scales with the rate; else it is divided by the ratio.

    Cost: a few dictionaries per group; where the rate is a tensor, two device calls per step.
    """

    def __init__(self, optimizer: Optimizer, scale_weight_decay: bool) -> None:
        """Leave the optimizer's own groups in place."""
        self._optimizer, self._scale_weight_decay = optimizer, scale_weight_decay
        self._original: list[dict[str, Any]] | None = None
        # The view, what was put into it, the group it stands for, and the factors on its entries.
        self._views: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, float]]] = []
        self._ratios: list[float] | None = None  # those of the buckets
        self._members: list[list[Tensor]] = []
        self._buckets: list[list[_Bucket]] = []
        self._rates: dict[tuple[int, int], Tensor] = {}  # tensor rates must stay the same objects

    @property
    def are_shown(self) -> bool:
        """Whether the optimizer sees views now."""
        return self._original is not None

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's own groups."""
        return self._original if self._original is not None else self._optimizer.param_groups

    def enter(self, ratios: NDArray[Any]) -> None:
        """Replace the groups by views with scaled rates; if all ratios are 1, do nothing.

        Args:
            ratios: The factor on the rate of each parameter ``[P]``, in the order of the groups.
        """
        if self._original is not None:
            self.leave()
        if (ratios == 1.0).all():
            return
        original = list(self._optimizer.param_groups)
        self._sort(original, ratios.tolist())
        self._scale_tensor_rates(original)
        views: list[dict[str, Any]] = []
        for place, (group, buckets) in enumerate(zip(original, self._buckets, strict=True)):
            rate, is_tensor = group["lr"], isinstance(group["lr"], Tensor)
            decay = 0.0 if self._scale_weight_decay else group.get("weight_decay")
            for at, (ratio, parameters) in enumerate(buckets):
                given, factors = {**group, "lr": self._rates[place, at] if is_tensor else rate * ratio}, {"lr": ratio}
                if decay:
                    given["weight_decay"], factors["weight_decay"] = decay / ratio, 1 / ratio
                views.append({**given, "params": list(parameters)})
                self._views.append((views[-1], given, group, factors))
        self._original = original
        # In place: an optimizer that wraps another one shares the list with it.
        self._optimizer.param_groups[:] = views

    def leave(self) -> None:
        """Put the original groups back, with what the optimizer wrote into the views."""
        if self._original is None:
            return
        for view, given, group, factors in self._views:
            for key, value in view.items():
                if value is not given.get(key) and key != "params":
                    group[key] = value / factors[key] if key in factors else value
        self._optimizer.param_groups[:] = self._original
        self._original, self._views = None, []

    def recover(self) -> None:
        """Put the original groups back after a step that raised; changes since then are the user's and are kept."""
        if self._original is None:
            return
        views = {id(view) for view, *_ in self._views}
        joined = [group for group in self._optimizer.param_groups if id(group) not in views]
        self._views = [(view, given, group, {}) for view, given, group, _ in self._views]
        self.leave()
        self._optimizer.param_groups.extend(joined)

    def _sort(self, groups: Sequence[Mapping[str, Any]], ratios: list[float]) -> None:
        """Sort the parameters of each group by ratio. Those of one ratio stay together, so that foreach stays fast."""
        members = [group["params"] for group in groups]
        known = self._members
        if ratios == self._ratios and len(members) == len(known) and all(map(are_same, members, known)):
            return
        at = iter(ratios)
        self._buckets = []
        for own in members:
            by_ratio: dict[float, list[Tensor]] = {}
            for parameter in own:
                by_ratio.setdefault(next(at), []).append(parameter)
            self._buckets.append(list(by_ratio.items()))
        self._ratios, self._members = ratios, [list(own) for own in members]

    @torch.no_grad()
    def _scale_tensor_rates(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Scale rates that are tensors (capturable, compiled), in the same tensor objects at every step."""
        keys = [
            (place, at)
            for place, (group, buckets) in enumerate(zip(groups, self._buckets, strict=True))
            if isinstance(group["lr"], Tensor)
            for at in range(len(buckets))
        ]
        if not keys:
            return
        given = [groups[place]["lr"] for place, _ in keys]
        for key, rate in zip(keys, given, strict=True):
            if key not in self._rates:
                self._rates[key] = rate.clone()
        scaled = [self._rates[key] for key in keys]
        torch._foreach_copy_(scaled, given)
        torch._foreach_mul_(scaled, [self._buckets[place][at][0] for place, at in keys])


def are_same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Return whether two lists hold the same tensors, by identity."""
    return len(one) == len(other) and all(map(operator.is_, one, other))
