"""The board as a reader sees it."""

import math
import re
from pathlib import Path

SHOTS = Path(__file__).parents[2] / "build" / "screenshots"  # git ignores it
VIEWS = ("stability", "layers", "rates", "health")


class Board:
    """The board in a frame of a page.

    Args:
        page: Where mouse and keyboard are.
        frame: Where the board is.
    """

    def __init__(self, page, frame) -> None:
        self.page, self.frame = page, frame

    def wait(self, selector: str):
        return self.frame.wait_for_selector(selector, timeout=20_000)

    def show(self, view: str) -> None:
        self.after_drawing(lambda: self.frame.click(f"#tab-{view}"))
        self.wait(f"#board[data-view={view}]")

    def choose(self, label: str, value: str) -> None:
        """Choose in a list of the view of layers."""
        self.after_drawing(lambda: self.frame.locator(".controls").get_by_label(label).select_option(value))

    def after_drawing(self, act) -> None:
        """Do something that draws the view anew, and wait until it is on the screen."""
        idle = "document.querySelector('#panel').getAttribute('aria-busy') === 'false'"
        marks = "performance.getEntriesByType('mark').length"
        self.frame.wait_for_function(f"() => {idle}")
        before = self.frame.evaluate(marks)
        act()
        self.frame.wait_for_function(f"(n) => {idle} && {marks} > n", arg=before)

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
        return self.tip()

    def tip(self) -> tuple[float, int, str]:
        tip = self.frame.locator(".tip")
        value = tip.locator("b").text_content()
        found = re.fullmatch(r" at step (\d+)(.*)", tip.text_content().removeprefix(value), re.S)
        return number(value), int(found[1]), found[2]

    def shot(self, name: str) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SHOTS / f"{name}.png")


def number(text: str) -> float:
    return {"no value": math.nan, "infinite": math.inf, "-infinite": -math.inf}.get(text) or float(text)


def rounded(value: float) -> float:
    """What a reader of four digits, or of three with a power of ten, gets to see."""
    if value == 0 or not math.isfinite(value):
        return value
    return float(f"{value:.2e}" if abs(value) < 1e-3 or abs(value) >= 1e5 else f"{value:.4g}")
