"""A browser, a real run with readings in every view, TensorBoard on it, and the board in the tab and in the report."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger

from dynamon.callbacks import DynamicsMonitor, GradientMonitor, NoiseAdaptiveLR, SharpnessMonitor
from dynamon.cli import main
from tests.browser.board import Board, chromium, in_tensorboard, serving
from tests.helpers import Classifier, fit, mlp


def missing(reason):
    """DYNAMON_BROWSER=required, as CI sets it, makes a failure of what is otherwise a skip."""
    if os.environ.get("DYNAMON_BROWSER") == "required":
        pytest.fail(f"DYNAMON_BROWSER=required, and {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def browser():
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        missing("playwright is not installed (pip install playwright)")
    with sync_playwright() as driver:
        try:
            browser = chromium(driver)
        except Error as error:
            reason = error.message.strip().splitlines()[0]
            missing(f"no Chromium starts here (playwright install chromium, or a package): {reason}")
        with browser:
            yield browser


@pytest.fixture
def open_page(browser):
    """Open pages whose console stays without an error, and which ask nobody but `allowed` for anything."""
    problems, contexts = [], []

    def opened(address, allowed, **settings):
        context = browser.new_context(viewport={"width": 1280, "height": 900}, **settings)
        contexts.append(context)
        context.route(lambda url: not url.startswith((allowed, "data:", "blob:")), refuse)
        context.set_default_timeout(120_000)  # on a busy machine
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        return page

    def refuse(route):
        problems.append(f"asked for {route.request.url}")
        route.abort()

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture(scope="session")
def logdir(browser, tmp_path_factory) -> Path:
    """Two real runs; the second one is the longer one."""
    root = tmp_path_factory.mktemp("logs")
    for version, steps, rate in (("one", 60, 1e-2), ("two", 90, 3e-2)):
        callbacks = [DynamicsMonitor(preset="full", every_n_steps=4), NoiseAdaptiveLR()]
        logger = TensorBoardLogger(root, name="run", version=version)
        module = Classifier(mlp(), lambda parameters, rate=rate: torch.optim.AdamW(parameters, lr=rate))
        fit(module, callbacks, logger=logger, steps=steps, max_epochs=-1)
    return root


SWEEP = {"0.01": 0.01, "0.1": 0.1, "1": 1.0, "10": 10.0, "100": 100.0, "1e+30": 1e30}  # rates by the end of their name


@pytest.fixture(scope="session")
def sweep_dir(browser, tmp_path_factory) -> Path:
    """Six runs at rates of gradient descent from too small to absurd; none of them steered."""
    root = tmp_path_factory.mktemp("sweep")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what looks wrong, which it is
        for name, rate in SWEEP.items():
            callbacks = [GradientMonitor(every_n_steps=1), SharpnessMonitor(every_n_steps=4), LearningRateMonitor()]
            module = Classifier(mlp(), lambda parameters, rate=rate: torch.optim.SGD(parameters, lr=rate))
            fit(module, callbacks, logger=TensorBoardLogger(root, name="sweep", version=name), steps=60, max_epochs=-1)
    return root


@pytest.fixture(scope="session")
def tensorboard(logdir, tmp_path_factory) -> Iterator[str]:
    with serving(logdir, tmp_path_factory.mktemp("server") / "log") as address:
        yield address


@pytest.fixture
def open_tab(open_page, tensorboard):
    """The tab on a run, compared with another or with none; in the whole of TensorBoard or its frame alone, which is
    there seconds earlier.
    """

    def opened(run="run/one", other=None, address=tensorboard, whole=False, place="", **settings):
        entry = "#dynamon" if whole else "data/plugin_entry.html?name=dynamon#"
        page = open_page(f"{address}{entry}{place}", address, **settings)
        board = in_tensorboard(page) if whole else Board(page, page.main_frame)
        board.wait_until_drawn()
        if run:
            board.choose_runs(run, other)
        return board

    return opened


@pytest.fixture
def open_report(open_page, logdir, tmp_path):
    """The report of some runs, as a file."""

    def opened(run="run/one", other=None, whole=True, place="", folders=(), **settings):
        file = tmp_path / "report.html"
        folders = [str(folder) for folder in folders] or [str(logdir / name) for name in (run, other) if name]
        assert main(["report", *folders, "-o", str(file)]) == 0
        page = open_page(f"{file.as_uri()}#{place}", file.as_uri(), offline=True, **settings)
        board = Board(page, page.main_frame)
        board.wait_until_drawn()
        return board

    return opened


@pytest.fixture(params=["tab", "report"])
def open_board(request):
    """Either: what holds for the one holds for the other."""
    return request.getfixturevalue(f"open_{request.param}")
