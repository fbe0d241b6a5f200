"""Data frames and line charts of series, for a notebook. Needs pandas or matplotlib, imported when called."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from dynamon.runs.history import Series

_MOST_LINES = 10  # with more layers a chart shows quantiles over them


def series_frame(series: "Series", name: str = "value") -> Any:
    """Convert a series to a ``pandas.DataFrame``.

    Args:
        series: The series.
        name: The column of a scalar; a table has one column per layer.

    Raises:
        ImportError: Without pandas.
    """
    columns = [name] if series.layers is None else list(series.layers)
    values = series.values.reshape(len(series), len(columns))
    pandas = _pandas()
    return pandas.DataFrame(values, pandas.Index(series.steps, name="step"), columns)


def scalars_frame(scalars: "Mapping[str, Series]") -> Any:
    """Join scalars to one ``pandas.DataFrame`` over all their steps: one column per tag, NaN where it has no point.

    Args:
        scalars: Series by tag; tables are left out.

    Raises:
        ImportError: Without pandas.
    """
    pandas = _pandas()
    series = {tag: scalars[tag] for tag in scalars}
    columns = {tag: pandas.Series(one.values, one.steps) for tag, one in series.items() if one.layers is None}
    return pandas.DataFrame(columns).sort_index().rename_axis("step")


def plot_series(series: "Series", label: str = "", scale: str = "linear", axes: Any = None) -> Any:
    """Draw a series over its steps; of more than ten layers the median, with the 10 % and 90 % quantiles as a band.

    Args:
        series: The series.
        label: What the vertical axis shows.
        scale: Scale of that axis.
        axes: Matplotlib axes, or None for a figure of their own.

    Returns:
        The axes.

    Raises:
        ImportError: Without matplotlib.
    """
    axes = _new_axes() if axes is None else axes
    steps, values = series.steps, series.values
    if series.layers is None:
        axes.plot(steps, values, label=label or None)
    elif len(series.layers) <= _MOST_LINES:
        for name, column in zip(series.layers, values.T, strict=True):
            axes.plot(steps, column, label=name)
    else:
        known = np.isfinite(values).any(1)
        low, middle, high = np.nanquantile(np.where(np.isfinite(values), values, np.nan)[known], (0.1, 0.5, 0.9), 1)
        axes.plot(steps[known], middle, label=f"median of {len(series.layers)} layers")
        axes.fill_between(steps[known], low, high, alpha=0.3, linewidth=0, label="10 % to 90 %")
    if series.layers is not None:
        axes.legend(frameon=False)
    axes.set(xlabel="step", ylabel=label, yscale=scale)
    return axes


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise ImportError("to_dataframe needs pandas: pip install pandas") from error
    return pandas


def _new_axes() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plot needs matplotlib: pip install "lightning-dynamon[demo]"') from error
    return Figure(figsize=(7, 4), layout="constrained").subplots()
