"""Reading runs back: event files of torch and of TensorFlow's kind, tables of CSVLogger."""

import json
import math
import time

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.scalar.metadata import create_summary_metadata
from tensorboard.util.tensor_util import make_tensor_proto
from torch.utils.tensorboard import SummaryWriter

from dynamon.runs import last_step, read_run, read_run_data
from dynamon.runs.history import History, RunData


def write(folder, points, new_style=False):
    """One event file: ``[(tag, step, value)]``."""
    with SummaryWriter(str(folder)) as writer:
        for tag, step, value in points:
            writer.add_scalar(tag, value, step, new_style=new_style)


def series(run):
    return {tag: dict(zip(s.steps.tolist(), s.values.tolist(), strict=True)) for tag, s in run.items()}


@pytest.mark.parametrize("new_style", [False, True])
def test_event_files_at_full_resolution(tmp_path, new_style):
    values = np.random.default_rng(0).normal(size=15_000).astype(np.float32)  # more than TensorBoard shows
    write(tmp_path, [("a/b", step, float(v)) for step, v in enumerate(values)], new_style)
    run = read_run(tmp_path)
    np.testing.assert_array_equal(run["a/b"].steps, np.arange(15_000))
    np.testing.assert_array_equal(run["a/b"].values, values)
    assert last_step(run) == 14_999 and run["a/b"].layers is None


def test_of_several_event_files_the_later_one_counts(tmp_path):
    for start in range(0, 48, 4):  # more than ten files, begun within a second
        write(tmp_path, [("loss", step, float(start)) for step in range(start, start + 8)] + [("only", start, 1.0)])
    found = series(read_run(str(tmp_path)))
    assert found["loss"] == {step: float(min(step // 4 * 4, 44)) for step in range(52)}
    assert list(found["only"]) == list(range(0, 48, 4))


def test_other_summaries_are_passed_over(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_histogram("weights", np.arange(5.0), 0)
        writer.add_text("notes", "hello", 0)
        writer.add_scalar("loss", 2.0, 7)
        writer.add_scalar("loss", math.nan, 8)
    run = read_run(tmp_path)
    assert list(run) == ["loss"] and run["loss"].values[0] == 2 and math.isnan(run["loss"].values[1])


def test_the_kind_of_a_tensor_is_named_the_first_time_only(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(3):
            metadata = create_summary_metadata("", "") if step == 0 else None
            value = Summary.Value(tag="loss", tensor=make_tensor_proto(float(step)), metadata=metadata)
            writer._get_file_writer().event_writer.add_event(Event(step=step, summary=Summary(value=[value])))
    assert series(read_run(tmp_path)) == {"loss": {0: 0.0, 1: 1.0, 2: 2.0}}


def test_an_event_file_that_was_cut_off(tmp_path):
    write(tmp_path, [("loss", step, 1.0) for step in range(100)])
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    assert read_run(tmp_path)["loss"].steps.tolist() == list(range(99))
    for rest in (b"\0" * 40, b"\xff" * 40, (5).to_bytes(8, "little") + b"\xff" * 40):
        file.write_bytes(whole + rest)
        with pytest.warns(UserWarning, match=f"damaged: bytes {len(whole)} to {len(whole) + len(rest)} were skipped"):
            assert read_run(tmp_path)["loss"].steps.tolist() == list(range(100))


def test_tensorboard_reads_the_same(tmp_path):
    values = np.random.default_rng(1).normal(size=300)
    write(tmp_path, [(f"tag/{i % 3}", i, float(v)) for i, v in enumerate(values)])
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    expected = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    assert series(read_run(tmp_path)) == expected and len(expected) == 3


TABLE = """epoch,loss,step,val,note
0,2.5,0,,
0,,0,7.25,text
0,1.5,4,,
1,nan,8,inf,
1,1.25,4,,
1,3.0,
1
,,,,
"""


def test_tables_of_csv_logger(tmp_path):
    (tmp_path / "metrics.csv").write_text(TABLE)
    found = series(read_run(tmp_path))
    assert found["loss"] == {0: 2.5, 4: 1.25}  # steps go back: the later row counts, and what it makes void is gone
    assert found["val"] == {0: 7.25, 8: math.inf} and found["epoch"] == {0: 0, 4: 1}
    assert "note" not in found and "step" not in found


def test_a_table_beside_event_files_counts_first(tmp_path):
    write(tmp_path, [("loss", 0, 0.1), ("loss", 1, 0.2)])
    (tmp_path / "metrics.csv").write_text("step,loss\n0,0.1\n")
    assert series(read_run(tmp_path)) == {"loss": {0: 0.1, 1: float(np.float32(0.2))}}


def test_errors_say_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/nowhere is not a folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds neither event files nor metrics.csv\.$"):
        read_run(tmp_path)
    write(tmp_path / "logs" / "version_0", [("loss", 0, 1.0)])
    with pytest.raises(FileNotFoundError, match=r"Runs below it, the newest first: .*logs/version_0\."):
        read_run(tmp_path)
    (tmp_path / "metrics.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="metrics.csv has no column 'step'"):
        read_run(tmp_path)


def add_row(writer, quantity, step, names, values, with_names=True):
    """All layers of a quantity at one step, as the recorder writes them."""
    content = SummaryMetadata.PluginData(plugin_name="dynamon", content=json.dumps({"layers": names}).encode())
    metadata = SummaryMetadata(plugin_data=content) if with_names else None
    proto = make_tensor_proto(np.asarray(values, dtype=np.float32))
    value = Summary.Value(tag=f"{quantity}/layers", tensor=proto, metadata=metadata)
    writer._get_file_writer().event_writer.add_event(Event(step=step, summary=Summary(value=[value])))


def test_tables_of_event_files(tmp_path):
    rows = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    rows[7, 1], rows[8, 2] = np.nan, np.inf
    with SummaryWriter(str(tmp_path)) as writer:
        for step, row in enumerate(rows):
            add_row(writer, "gradient/dual", 4 * step, ["z", "a.2", "a.10"], row, with_names=step == 0)
            writer.add_scalar("gradient/dual_median", float(np.nanmedian(row)), 4 * step)
            writer.add_scalar("gradient.dual/z", float(row[0]), 4 * step)
            writer.add_scalar("val.set/z", 1.0, 4 * step)
    run = read_run_data(tmp_path)
    table = run.tables["gradient/dual"]
    assert table.layers == ("z", "a.2", "a.10") and table.values.dtype == np.float64
    np.testing.assert_array_equal(table.steps, 4 * np.arange(50))
    np.testing.assert_array_equal(table.values, rows)
    assert set(run.scalars) == {"gradient/dual_median", "val.set/z"} and run.last_step == 196
    assert set(read_run(tmp_path)) == {*run.scalars, "gradient.dual/z"}


def test_tables_of_a_resumed_run(tmp_path):
    """The later file counts, and may know other layers."""
    for start, names in ((0, ["a", "b"]), (3, ["b", "c"])):
        with SummaryWriter(str(tmp_path)) as writer:
            for step in range(start, start + 5):
                add_row(writer, "weight/rms", step, names, [start + 0.25, start + 0.5])
    table = read_run_data(tmp_path).tables["weight/rms"]
    assert table.layers == ("b", "c", "a") and table.steps.tolist() == list(range(8))
    np.testing.assert_array_equal(table.values[:3], [[0.5, np.nan, 0.25]] * 3)
    np.testing.assert_array_equal(table.values[3:], [[3.25, 3.5, np.nan]] * 5)


def test_tables_that_are_not_ours_are_passed_over(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        for content in (b"", b"{", b"[]", b'{"layers": 3}', b'{"layers": ["a"]}'):  # the last: one name, two values
            plugin = SummaryMetadata.PluginData(plugin_name="dynamon", content=content)
            metadata = SummaryMetadata(plugin_data=plugin)
            value = Summary.Value(tag="t/layers", tensor=make_tensor_proto(np.ones(2)), metadata=metadata)
            writer._get_file_writer().event_writer.add_event(Event(step=0, summary=Summary(value=[value])))
        add_row(writer, "good/one", 1, ["a"], [2.0])
    assert list(read_run_data(tmp_path).tables) == ["good/one"]


def test_single_layers_of_csv_logger_make_a_table(tmp_path):
    """Single layers make the table; a layer may lack steps; numbers in names sort as numbers."""
    (tmp_path / "metrics.csv").write_text(
        "gradient.dual/b.10,gradient.dual/b.2,gradient/dual_median,plain.tag/x,step\n"
        "1.5,2.5,2.0,7,0\n,,,7,1\n,0.1,0.1,,2\n"
    )
    run = read_run_data(tmp_path)
    table = run.tables["gradient/dual"]
    assert table.layers == ("b.2", "b.10") and table.steps.tolist() == [0, 2]
    np.testing.assert_array_equal(table.values, [[2.5, 1.5], [0.1, np.nan]])
    assert set(run.scalars) == {"gradient/dual_median", "plain.tag/x"}


def test_a_history_sorts_into_the_same_shape():
    history = History()
    history.add("gradient/dual", 3, np.array([1.0, 2.0]), ["a", "b"])
    history.add("gradient/norm", 5, 2.0)
    run = RunData.of(history, History())
    assert list(run.tables) == ["gradient/dual"] and list(run.scalars) == ["gradient/norm"] and run.last_step == 5
    assert RunData.of().last_step == -1


def test_the_time_to_read_tables_grows_with_their_length(tmp_path):
    names, row = [f"network.blocks.{i}.weight" for i in range(200)], np.arange(200.0)

    def write(rows):
        with SummaryWriter(str(tmp_path / str(rows))) as writer:
            for step in range(rows):
                for quantity in range(10):
                    add_row(writer, f"q/{quantity}", step, names, row + step)

    def seconds(rows):
        begin = time.process_time()
        tables = read_run_data(tmp_path / str(rows)).tables
        taken = time.process_time() - begin
        assert len(tables) == 10 and tables["q/9"].values.shape == (rows, 200)
        assert tables["q/9"].values[-1, 199] == 199 + rows - 1
        return taken

    write(60)
    write(240)
    # A fourth of the rows should take a fourth; were it the square, the long tables would take 16 times as much.
    assert min(seconds(240) for _ in range(2)) < 10 * max(seconds(60) for _ in range(2))


def test_a_table_with_a_step_that_is_none(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train/loss\n0,1.0\n99999999999999999999999999,2.0\n2,3.0\n")
    assert read_run_data(tmp_path).scalars["train/loss"].steps.tolist() == [0, 2]
