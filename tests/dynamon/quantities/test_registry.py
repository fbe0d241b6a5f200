"""The registry of quantities: whole entries, one each, known to all that names a tag, and light to import."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import dynamon
from dynamon.board.custom_scalars import band_chart, chart_layout, line_chart
from dynamon.quantities import ALWAYS, REGISTRY, Condition, Quantity, Scope, choices, quantities_of, with_tag_table
from dynamon.quantities.registry import by_tag
from tests.models import cnn, samples

ROOT = Path(dynamon.__file__).parents[1]
SHOWN_AS = r"_(p10|median|p90)$"
# A part of a tag that code puts together, or what is no tag of a quantity but of a health rule or a probe.
NO_TAGS = r"Finding\(\s*$"


def test_it_needs_neither_torch_nor_lightning():
    code = "import sys, dynamon.quantities; print({'torch', 'lightning', 'numpy'} & set(sys.modules) or 'light')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "light\n"


def test_every_entry_is_whole():
    for tag, one in REGISTRY.items():
        assert re.fullmatch(r"[a-z]+/[a-z0-9_]+", tag) and tag == one.tag
        assert one.meaning and (one.unit or one.scope is Scope.HISTOGRAMS)
        assert one.every == 1 or "every tenth reading" in one.sentence
        assert all(condition.words for condition in Condition if condition in one.condition)
    assert ALWAYS.words == "" and (Condition.RESOLVED | Condition.POWER_LAW).words.count("where") == 2


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scale": "cubic"}, "mine/own: scale must be one of linear, log, got 'cubic'"),
        ({"cadence": "daily"}, "mine/own: cadence must be one of gradient, .*, got 'daily'"),
        ({"words": ""}, "mine/own: a per-layer quantity needs words"),
    ],
)
def test_an_entry_that_cannot_be_shown_is_refused(changes, message):
    own = Quantity("mine/own", "mine", "none", scope=Scope.PER_LAYER, words="mine")
    with pytest.raises(ValueError, match=message):
        replace(own, **changes)
    with pytest.raises(ValueError, match="mine/own has two records"):
        by_tag([own], [own])


def test_entries_are_chosen_by_meter_scope_and_choice():
    assert {one.tag for one in quantities_of("steering")} == {
        "lr/base",
        "lr/base_min",
        "lr/ratio",
        "lr/effective",
        "lr/bounded",
        "dynamon/steering_overhead",
    }
    assert [one.tag for one in quantities_of("sharpness", choice="trace")] == [
        "sharpness/trace",
        "sharpness/trace_error",
    ]
    assert [one.tag for one in quantities_of("sharpness", scope=Scope.PER_LAYER)] == ["sharpness/block"]
    assert choices("steps") == ["directional", "critical", "batch"]


def test_charts_are_lines_of_scalars_or_the_band_of_a_quantity_per_layer():
    layout = chart_layout(quantities_of("gradient"))["2 Gradients"]
    assert layout["dual norm across layers"] == band_chart("gradient/dual")
    assert layout["global norm, before and after clipping"] == line_chart("gradient/norm", "gradient/norm_clipped")
    assert chart_layout([REGISTRY["noise/dual"], REGISTRY["noise/independent"]], "Mine") == {
        "Mine": {"noise in the dual norm across layers": band_chart("noise/dual")}
    }
    for one in REGISTRY.values():  # a chart holds one quantity per layer, or scalars
        own = [other for other in quantities_of(one.cadence) if one.chart and other.chart == one.chart]
        assert len(own) <= 1 or all(other.scope is Scope.SCALAR for other in own)


def test_a_docstring_without_a_place_for_the_table_is_refused():
    class Without:
        """Nothing."""

    class With:
        """Something.

        {tags}
        """

    with pytest.raises(ValueError, match="the docstring of Without has no line {tags}"):
        with_tag_table(quantities_of("monitor"))(Without)
    lines_of = with_tag_table(quantities_of("monitor"))(With).__doc__.splitlines()
    assert lines_of[2].startswith("        =====") and "``dynamon/overhead``" in "".join(lines_of)
    assert max(map(len, lines_of)) <= 120


def named(source: str) -> set[str]:
    """Tags that stand in a source as a string of their own, those of health rules left out."""
    groups = "|".join({one.group for one in REGISTRY.values()})
    found = re.finditer(rf"""["'`]((?:{groups})/[a-z0-9_]+)["'`]""", source)
    return {match[1] for match in found if not re.search(NO_TAGS, source[: match.start()])}


@pytest.mark.parametrize("folder", ["dynamon/board", "dynamon/health", "dynamon/cli", "dynamon", "callbacks"])
def test_code_names_only_tags_of_the_registry(folder):
    rules = set(re.findall(r'Finding\(\s*"([a-z]+/[a-z_]+)"', "".join(sources("dynamon/health").values())))
    for name, source in sources(folder).items():
        unknown = {tag for tag in named(source) - rules if re.sub(SHOWN_AS, "", tag) not in REGISTRY}
        assert unknown == set(), name


def sources(folder: str) -> dict[str, str]:
    return {path.name: path.read_text() for path in (ROOT / folder).iterdir() if path.suffix in (".py", ".js")}


def test_measure_has_tags_of_the_registry():
    torch.manual_seed(0)
    model, batch = cnn(), samples(32, 2, 6, 6)
    loss_fn = lambda m, b: cross_entropy(m(b[0]), b[1])  # noqa: E731
    found = dynamon.measure(model, batch, loss_fn=loss_fn, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert set(found) <= set(REGISTRY)
    for tag, value in found.items():
        assert isinstance(value, dict) == (REGISTRY[tag].scope is Scope.PER_LAYER), tag
