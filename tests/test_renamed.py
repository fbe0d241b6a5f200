"""Tags of earlier versions are read under their present names."""

import json

import numpy as np
import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.util.tensor_util import make_tensor_proto
from torch.utils.tensorboard import SummaryWriter

from dynamon.board.live import LiveFolder
from dynamon.cli import main
from dynamon.quantities import REGISTRY
from dynamon.runs import read_run, read_run_data
from dynamon.runs.history import History
from dynamon.runs.renamed import RENAMED, current_tag

LAYERS = ["blocks.0.weight", "head.weight"]
ROWS = np.array([[1.0, 0.5], [0.9, 0.25]], dtype=np.float32)


@pytest.fixture
def old_run(tmp_path):
    """A run as an earlier version wrote it: two scalars, and a table with its median and a scalar for each layer."""
    with SummaryWriter(str(tmp_path)) as writer:
        for step, row in enumerate(ROWS):
            writer.add_scalar("sharpness/products", 7.0 + step, step)
            writer.add_scalar("sharpness/left_out", 3.0, step, new_style=True)
            writer.add_scalar("gradient/norm", 1.0, step)
            writer.add_scalar("weight/memory_median", float(np.median(row)), step)
            writer.add_scalar("weight.memory/head.weight", float(row[1]), step)
            content = SummaryMetadata.PluginData(plugin_name="dynamon", content=json.dumps({"layers": LAYERS}).encode())
            value = Summary.Value(
                tag="weight/memory/layers",
                tensor=make_tensor_proto(row),
                metadata=SummaryMetadata(plugin_data=content),
            )
            writer._get_file_writer().event_writer.add_event(Event(step=step, summary=Summary(value=[value])))
    return tmp_path


def test_an_old_event_file(old_run):
    run = read_run_data(old_run)
    assert run.scalars["sharpness/matvecs"].values.tolist() == [7.0, 8.0]
    assert run.scalars["sharpness/excluded_coordinates"].values.tolist() == [3.0, 3.0]
    table = run.tables["weight/initial_fraction"]
    assert table.layers == tuple(LAYERS)
    np.testing.assert_array_equal(table.values, ROWS)
    assert set(run.tables) == {"weight/initial_fraction"}
    assert set(run.scalars) == {
        "gradient/norm",
        "sharpness/matvecs",
        "sharpness/excluded_coordinates",
        "weight/initial_fraction_median",
    }


def test_the_tab_shows_it_under_the_new_names(old_run):
    run = LiveFolder(old_run).run(".")
    news = run.updates(0, 0, read_for=60.0)
    assert news["quantities"] == ["weight/initial_fraction"] and "sharpness/matvecs" in news["scalars"]
    assert run.table("weight/initial_fraction", news["epoch"], 0)["layers"] == LAYERS


def test_the_report_opens_it(old_run, tmp_path):
    page = tmp_path / "page.html"
    assert main(["report", str(old_run), "-o", str(page)]) == 0
    text = page.read_text()
    assert "sharpness/matvecs" in text and "weight/initial_fraction" in text
    assert "weight/memory" not in text and "sharpness/products" not in text


def test_a_run_that_was_continued_by_this_version_is_one_curve(old_run):
    with SummaryWriter(str(old_run)) as writer:
        writer.add_scalar("sharpness/matvecs", 5.0, 2)
    assert read_run(old_run)["sharpness/matvecs"].values.tolist() == [7.0, 8.0, 5.0]


def test_an_old_table_of_csv_logger(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "step,spectrum.deviation/a,spectrum/deviation_median,sharpness/greedy_multiple\n0,0.5,0.5,2.0\n"
    )
    run = read_run_data(tmp_path)
    assert run.tables["spectrum/log2_spectral_condition"].values.tolist() == [[0.5]]
    assert set(run.scalars) == {"spectrum/log2_spectral_condition_median", "sharpness/best_multiple"}


def test_a_history_knows_both_names():
    history = History()
    history.add("weight/initial_fraction", 0, np.array([1.0]), ("a",))
    assert "weight/memory" in history and history["weight/memory"].layers == ("a",)
    assert list(history) == ["weight/initial_fraction"] and 3 not in history
    with pytest.raises(KeyError, match="no 'sharpness/products'"):
        history["sharpness/products"]


def test_old_names_lead_to_quantities_that_exist_and_none_is_in_use():
    assert set(RENAMED.values()) <= set(REGISTRY) and not set(RENAMED) & set(REGISTRY)


@pytest.mark.parametrize("tag", ["weight/memory_bank/size", "weight/memorystuff", "my/weight/memory", "train_loss"])
def test_other_tags_are_left_alone(tag):
    assert current_tag(tag) == tag
