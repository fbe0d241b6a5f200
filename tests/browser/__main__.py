"""Pictures of the board, for the docs: ``python -m tests.browser LOGDIR [--run NAME] [--other NAME] [--out FOLDER]``.

Every view in the tab and in the report, light and dark, at 1280 x 900 pixels: ``tab-layers-dark.png`` and so on.
"""

import argparse
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from dynamon.board.live import LiveFolder
from dynamon.cli import main as dynamon
from tests.browser.board import SHOTS, VIEWS, Board, chromium, in_tensorboard, serving


def pictures(logdir: Path, run: str, other: str | None, out: Path, size: tuple[int, int] = (1280, 900)) -> list[Path]:
    """Take all pictures of a run, compared with another where one is named; their files."""
    taken = []
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver, chromium(driver) as browser:
        report, log = Path(folder) / "report.html", Path(folder) / "log"
        dynamon(["report", *(str(logdir / name) for name in (run, other) if name), "-o", str(report)])
        with serving(logdir, log) as address:
            for scheme in ("light", "dark"):
                settings = {"viewport": {"width": size[0], "height": size[1]}, "color_scheme": scheme}
                page = browser.new_page(**settings)
                page.goto(f"{address}#dynamon")
                tab = in_tensorboard(page)
                tab.choose_runs(run, other)
                page = browser.new_page(**settings)
                page.goto(report.as_uri())
                for kind, board in (("tab", tab), ("report", Board(page, page.main_frame))):
                    for view in VIEWS:
                        board.show(view)
                        taken.append(out / f"{kind}-{view}-{scheme}.png")
                        board.page.screenshot(path=taken[-1])
    return taken


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("logdir", type=Path, help="what tensorboard --logdir gets")
    parser.add_argument("--run", help="name of the run, as TensorBoard has it; the newest by default")
    parser.add_argument("--other", help="a run to compare with")
    parser.add_argument("--out", type=Path, default=SHOTS, help="where the pictures go")
    options = parser.parse_args()
    name = options.run or LiveFolder(options.logdir).names()[0]
    for path in pictures(options.logdir, name, options.other, options.out):
        print(path)
