"""An advice in words, with the lines to paste."""

from collections.abc import Sequence

from dynamon.rates.allocation import Advice, ratios_by_key
from dynamon.rates.groups import LayerGroup

_PAIR = ", "
_CAVEAT = (
    "              Tune the base rate again, and compare with one rate for all layers: in our study (docs, Do rates by",
    "              layer help?) such ratios gained nothing over one well-tuned rate.",
)


def name_of(group: LayerGroup) -> str:
    """Return the name under which a group is logged: its keys, from which :func:`keys_of` reads them."""
    return group.label if group.label.startswith("group ") else _PAIR.join(group.keys)


def keys_of(name: str) -> tuple[str, ...]:
    """Return the keys in a logged name."""
    return tuple(name.split(_PAIR))


def advice_lines(advice: Advice, names: Sequence[str], radii: dict[str, float]) -> list[str]:
    """Say what an advice is, how certain, and how to use it.

    Args:
        advice: The advice.
        names: The names of its groups (:func:`name_of`).
        radii: The radii of :class:`dynamon.optim.Lanton` by role, which the advice multiplies.

    Returns:
        Lines of text.
    """
    if advice.refusal is not None:
        return [f"advice        none: {advice.refusal}", "              All rates stay as they are."]
    sure = int(advice.certain.sum())
    lines = [f"advice        {advice.readings} readings; {sure} of {len(names)} ratios are certain"]
    if sure:
        lines.append(f"gain          {advice.gain - 1:+.0%} progress at the same curvature, with the ratios to take")
    lines += ["", "  ratio   95 % interval     take   group of layers"]
    rows = zip(names, advice.ratios, advice.low, advice.high, advice.certain, advice.committed, strict=True)
    for name, ratio, low, high, is_sure, taken in rows:
        mark = "" if is_sure else " (not certain)"
        lines.append(f"  {ratio:5.2f}   {low:5.2f} to {high:5.2f}   {taken:6.2g}   {name}{mark}")
    if 0 < sure < len(names):
        lines.append("  Groups that are not certain share one ratio, with which the curvature stays the same.")
    return [*lines, "", *_usage(advice, names, radii)]


def _usage(advice: Advice, names: Sequence[str], radii: dict[str, float]) -> list[str]:
    found = ratios_by_key([keys_of(name) for name in names], advice.committed)
    if not found:
        return [
            "to use it     nothing yet: no ratio differs from 1 by more than its error. More readings (readings=40),",
            "              fewer groups (group_by=) or larger batches make it surer.",
        ]
    if names[0].startswith("group "):
        changed = [f'    optimizer.param_groups[{key.split()[1]}]["lr"] *= {ratio}' for key, ratio in found.items()]
        return ["to use it     where the optimizer is made, before its schedulers.", *_CAVEAT, "", *changed]
    table = "{" + ", ".join(f'"{key}": {ratio}' for key, ratio in found.items()) + "}"
    lines = [
        "to use it     one of these.",
        *_CAVEAT,
        "",
        f"    ratios = {table}",
        "    callbacks=[LayerwiseLR(FixedRates(ratios))]                   # from dynamon.rates import FixedRates",
        "    optimizer = torch.optim.AdamW(rate_groups(model, ratios, lr))  # from dynamon.rates import rate_groups",
    ]
    if all(key.startswith("role:") for key in found):
        roles = {key.removeprefix("role:"): ratio for key, ratio in found.items()}
        shown = ", ".join(f'"{role}": {float(f"{ratio * radii[role]:.3g}")}' for role, ratio in roles.items())
        lines.append(f"    optimizer = Lanton(model, lr, radii={{{shown}}})  # where the radii were the default ones")
    return lines
