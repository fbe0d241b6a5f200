"""Spikes in the tab and in the report: a mark at its step in every chart, what it was, and a list of them in health."""

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from dynamon.callbacks import DynamicsMonitor
from tests.browser.board import serving
from tests.helpers import Classifier, fit

pytestmark = pytest.mark.slow
AT = (40, 70)


class Slip(Classifier):
    """Inputs that are a thousand times too large, twice."""

    def training_step(self, batch, batch_idx):
        return super().training_step((batch[0] * (1000 if self.trainer.global_step in AT else 1), batch[1]), batch_idx)


@pytest.fixture(scope="session")
def logdir(browser, tmp_path_factory):
    """In place of the runs of other tests: one with two spikes, under two names."""
    root = tmp_path_factory.mktemp("spikes")
    for version in ("one", "two"):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        module = Slip(network, lambda p: torch.optim.SGD(p, lr=0.01))
        logger = TensorBoardLogger(root, name="run", version=version)
        with pytest.warns(UserWarning, match="is a spike"):
            monitor = DynamicsMonitor(every_n_steps=10)
            fit(module, [monitor], logger=logger, steps=100, max_epochs=-1, gradient_clip_val=0.01)
        assert monitor.history["spike/batch"].steps.tolist() == list(AT)
    return root


@pytest.fixture(scope="session")
def tensorboard(logdir, tmp_path_factory):
    """A server of its own: the one of the other tests, which may have started, shows their runs."""
    with serving(logdir, tmp_path_factory.mktemp("spikes-server") / "log") as address:
        yield address


def reds(board, title):
    """The columns of a chart's canvas that hold the colour of marks, as shares of its width."""
    return board.frame.evaluate(
        """(title) => {
          const isIt = (one) => one.querySelector("h3").textContent === title;
          const figure = [...document.querySelectorAll("figure.chart")].find(isIt);
          const canvas = figure.querySelector("canvas");
          const color = getComputedStyle(document.documentElement).getPropertyValue("--mark").trim();
          const [r, g, b] = [1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16));
          const { data, width, height } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          const left = 64 * devicePixelRatio;
          const right = width - 16 * devicePixelRatio;
          const found = [];
          for (let x = 0; x < width; x += 1) {
            let count = 0;
            for (let y = 0; y < height; y += 1) {
              const i = 4 * (y * width + x);
              count += Math.abs(data[i] - r) + Math.abs(data[i + 1] - g) + Math.abs(data[i + 2] - b) < 30 ? 1 : 0;
            }
            if (count > height / 3) found.push((x - left) / (right - left));
          }
          return found;
        }""",
        title,
    )


def test_marks_stand_at_the_steps_of_spikes(open_board, request):
    board = open_board()
    name = request.node.callspec.params["open_board"]
    for view in ("stability", "rates"):
        board.show(view)
        for title in board.titles():
            columns = reds(board, title)
            assert columns, title
            for step in AT:
                assert min(abs(share - step / 99) for share in columns) < 0.01, (title, step, columns)
            assert all(min(abs(share - step / 99) for step in AT) < 0.01 for share in columns), (title, columns)
        board.shot(f"{name}-spikes-{view}")
    board.show("layers")
    marks = board.frame.locator(".mapspikes div")
    assert marks.count() == len(AT) and marks.first.get_attribute("title").startswith("step 40, spike: gradient ")
    board.shot(f"{name}-spikes-layers")


def test_what_a_spike_was_is_said_at_the_cursor_and_in_the_list(open_board, request):
    board = open_board()
    board.show("health")
    details = board.frame.locator("details.spikes")
    assert details.locator("summary").inner_text() == "2 spikes, marked in every chart"
    details.locator("summary").click()
    assert details.locator("li").count() == 2
    details.locator("button", has_text="step 70").click()
    board.shot(f"{request.node.callspec.params['open_board']}-spikes-health")
    text = board.frame.locator("#panel").inner_text()
    assert "Step 40 is a spike: the gradient of network." in text and "Step 70 is a spike" in text
    board.show("stability")
    legend = board.frame.locator(".legend").first.inner_text()
    assert "(step 70, spike: gradient " in legend and "loss " in legend and legend.rstrip().endswith("spike")
