"""The board as a reader sees it, in a browser, and TensorBoard to serve it."""

import math
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

import numpy as np

SHOTS = Path(__file__).parents[2] / "build" / "screenshots"  # git ignores it
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Nothing is being drawn, and in the tab nothing of a file is left to be read.
IDLE = (
    "document.querySelector('#panel')?.getAttribute('aria-busy') === 'false' && "
    "!document.querySelector('.runs [role=status]')?.textContent.startsWith('reading')"
)
VIEWS = ("stability", "layers", "progress", "rates", "health")


class Board:
    """The board in a frame of a page.

    Args:
        page: Where mouse and keyboard are.
        frame: Where the board is.
    """

    def __init__(self, page, frame) -> None:
        self.page, self.frame = page, frame

    def wait(self, selector: str):
        return self.frame.wait_for_selector(selector)

    def choose_runs(self, run: str, other: str | None = None) -> None:
        """Choose in the header of the tab."""
        for label, name in (("run", run), ("run to compare with", other or "")):
            choice = self.frame.get_by_label(label, exact=True).first
            if choice.input_value() != name:
                self.after_drawing(lambda choice=choice, name=name: choice.select_option(name))
        self.wait_until_drawn()

    def show(self, view: str) -> None:
        self.after_drawing(lambda: self.frame.click(f"#tab-{view}"))
        self.wait(f"#board[data-view={view}]")

    def choose(self, label: str, value: str) -> None:
        """Choose in a list of the view of layers."""
        self.after_drawing(lambda: self.frame.locator(".controls").get_by_label(label).select_option(value))

    def after_drawing(self, act) -> None:
        """Do something that draws the view anew, and wait until it is on the screen."""
        self.wait_until_drawn()
        marks = "performance.getEntriesByType('mark').length"
        before = self.frame.evaluate(marks)
        act()
        self.frame.wait_for_function(f"(n) => {IDLE} && {marks} > n", arg=before)

    def wait_until_drawn(self) -> None:
        self.frame.wait_for_function(f"() => {IDLE}")

    def wait_for_layers(self, count: int) -> None:
        self.frame.wait_for_function("(n) => document.querySelectorAll('button.layer').length === n", arg=count)

    def titles(self) -> list[str]:
        return self.frame.locator("figure h3").all_text_contents()

    def chart(self, title: str):
        return self.frame.locator("figure", has=self.frame.get_by_role("heading", name=title, exact=True))

    def point(self, title: str, share: float) -> tuple[int, dict[str, str]]:
        """Put the pointer at a share of a chart's width; the step, and what the legend says by label."""
        chart = self.chart(title)
        chart.scroll_into_view_if_needed()
        place = chart.locator(".plot").bounding_box()
        self.page.mouse.move(place["x"] + 64 + share * (place["width"] - 80), place["y"] + 60)
        return self.readings(title)

    def drag(self, title: str, begin: float, end: float) -> None:
        """Drag across a chart, from one share of its width to another."""
        self.point(title, begin)
        place = self.chart(title).locator(".plot").bounding_box()
        self.page.mouse.down()
        for share in (begin + (end - begin) / 2, end):
            self.page.mouse.move(place["x"] + 64 + share * (place["width"] - 80), place["y"] + 60)
        self.page.mouse.up()

    def steps(self) -> tuple[int, int] | None:
        """The steps that the header says are shown; None for the whole run."""
        found = re.match(r"steps (\d+) to (\d+)", self.frame.locator(".zoomed").text_content() or "")
        return (int(found[1]), int(found[2])) if self.frame.locator(".zoomed").is_visible() else None

    def view(self) -> str:
        return self.frame.locator("#board").get_attribute("data-view")

    def place(self) -> dict[str, str]:
        """What the address says, once what is under way is written to it."""
        self.page.wait_for_timeout(500)
        parts = [part for part in self.page.url.partition("#")[2].split("&") if "=" in part]
        return {key.removeprefix("p.dynamon."): unquote(value) for key, _, value in (p.partition("=") for p in parts)}

    def readings(self, title: str) -> tuple[int, dict[str, str]]:
        keys = [key for key in self.chart(title).locator(".key").all() if key.locator("output").count()]
        step, *lines = [(key.text_content(), key.locator("output").text_content()) for key in keys]
        return int(step[1]), {text.removesuffix(value).strip(): value for text, value in lines}

    def point_at_map(self, row: float, share: float) -> tuple[float, int, str]:
        """Put the pointer on the map, `row` in pixels from its top; the value, the step and the layer it says."""
        canvas = self.frame.locator(".maparea canvas")
        canvas.scroll_into_view_if_needed()
        place = canvas.bounding_box()
        self.page.mouse.move(place["x"] + share * place["width"], place["y"] + row)
        self.frame.wait_for_selector(".tip", state="visible")
        return self.tip()

    def tip(self) -> tuple[float, int, str]:
        tip = self.frame.locator(".tip")
        value = tip.locator("b").text_content()
        found = re.fullmatch(r" at step (\d+)(.*)", tip.text_content().removeprefix(value), re.S)
        return number(value), int(found[1]), found[2]

    def shot(self, name: str) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SHOTS / f"{name}.png")


@contextmanager
def serving(folder: Path | str, log: Path) -> Iterator[str]:
    """TensorBoard on a folder; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--logdir",
        str(folder),
    ]
    address = f"http://127.0.0.1:{port}/"
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as server:
        try:
            until = time.monotonic() + 60
            while True:
                try:
                    urllib.request.urlopen(f"{address}data/plugins_listing", timeout=10).close()
                    break
                except OSError:
                    assert server.poll() is None and time.monotonic() < until, log.read_text()
                    time.sleep(0.1)
            yield address
        finally:
            server.terminate()


def chromium(driver):
    """The Chromium of this machine without a window, or the one that `playwright install` fetched."""
    own = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    return driver.chromium.launch(executable_path=own, args=["--no-sandbox", "--disable-gpu"])


def in_tensorboard(page) -> Board:
    """The tab of a page that is on its way to it."""
    board = Board(page, page.wait_for_selector("iframe", state="attached").content_frame())
    board.wait_until_drawn()
    return board


def number(text: str) -> float:
    """A number as it is shown, without the step of its reading."""
    text = text.split(" (step")[0]
    return {"no value": math.nan, "infinite": math.inf, "-infinite": -math.inf}.get(text) or float(text)


def exact(value: float) -> float:
    """The shortest number that is the same in single precision, which a reader gets to see."""
    return float(str(np.float32(value)))


def rounded(value: float) -> float:
    """What a reader of four digits, or of three with a power of ten, gets to see."""
    if value == 0 or not math.isfinite(value):
        return value
    return float(f"{value:.2e}" if abs(value) < 1e-3 or abs(value) >= 1e5 else f"{value:.4g}")
