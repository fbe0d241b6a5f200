"""Define the charts of TensorBoard's Custom Scalars tab, which name tags and compute nothing."""

import re
from collections.abc import Iterable

from dynamon.quantities import Quantity, Scope

Layout = dict[str, dict[str, list[object]]]
_CATEGORIES = {
    "sharpness": "1 Stability",
    "steps": "1 Stability",
    "gradient": "2 Gradients",
    "sentinel": "2 Gradients",
    "progress": "3 Rates",
    "steering": "3 Rates",
    "guard": "2 Gradients",
    "weight": "4 Weights",
    "activation": "5 Activations",
    "monitor": "6 dynamon",
}  # by the meter that measures a quantity


def line_chart(*tags: str) -> list[object]:
    """Define a chart with one line per tag."""
    return ["Multiline", [re.escape(tag) for tag in tags]]


def band_chart(prefix: str) -> list[object]:
    """Define a chart of the median across layers, with the 10 % and 90 % quantiles as a band."""
    return ["Margin", [f"{prefix}_median", f"{prefix}_p10", f"{prefix}_p90"]]


def chart_layout(quantities: Iterable[Quantity], category: str | None = None) -> Layout:
    """Lay out the charts of quantities, as the registry names them: lines for scalars, a band for a per-layer quantity.

    Args:
        quantities: The quantities; those without a chart are left out.
        category: Their category; None for that of the meter that measures each.
    """
    found: dict[str, dict[str, list[Quantity]]] = {}
    for one in quantities:
        if one.chart:
            found.setdefault(category or _CATEGORIES[one.cadence], {}).setdefault(one.chart, []).append(one)
    return {
        name: {
            title: band_chart(own[0].tag) if own[0].scope is Scope.PER_LAYER else line_chart(*(one.tag for one in own))
            for title, own in charts.items()
        }
        for name, charts in found.items()
    }


def merge_layouts(layouts: Iterable[Layout]) -> Layout:
    """Merge layouts into one, with categories sorted by name."""
    merged: Layout = {}
    for layout in layouts:
        for category, charts in layout.items():
            merged.setdefault(category, {}).update(charts)
    return dict(sorted(merged.items()))
