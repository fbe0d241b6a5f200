"""Serve the board as a tab in TensorBoard.

TensorBoard imports this file at every start and must start in any case, so the code that reads runs is imported at the
first request.
"""

import importlib
import re
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from tensorboard.backend import http_util
from tensorboard.plugins import base_plugin
from werkzeug import Request, Response

from dynamon.board import page

_REMOTE = re.compile(r"[a-zA-Z][\w+.-]+://")
_Answer = Callable[[Any, Any], Any]  # from the runs and the arguments of the question


class DynamonPlugin(base_plugin.TBPlugin):  # type: ignore[misc]  # TensorBoard ships no types
    """Serves the board's modules and, as JSON, its requests about the runs below ``--logdir``.

    Args:
        context: TensorBoard's context.
    """

    plugin_name = "dynamon"

    def __init__(self, context: base_plugin.TBContext) -> None:
        """Defer everything to the first request."""
        self._logdir: str = context.logdir or ""
        self._lock = threading.Lock()
        self._folder: Any = None

    def get_plugin_apps(self) -> dict[str, Callable[..., Any]]:
        """Return the routes: files of the board by name, and six requests."""
        modules = {f"/{name}.js": _file(partial(page.module, name), "text/javascript") for name in page.module_names()}
        return modules | {
            "/board.css": _file(page.style_sheet, "text/css"),
            "/runs": self._answers(lambda folder, _: _listing(folder, self._logdir)),
            "/run": self._answers(lambda folder, asked: _run(folder, asked).updates(*_known(asked))),
            "/table": self._answers(lambda folder, asked: _run(folder, asked).table(asked["quantity"], *_known(asked))),
            "/health": self._answers(lambda folder, asked: _run(folder, asked).health()),
            "/progress": self._answers(lambda folder, asked: {"progress": _run(folder, asked).progress()}),
            "/rows": self._answers(lambda folder, _: {"rows": folder.rows()}),
        }

    def data_plugin_names(self) -> tuple[str, ...]:
        """Name the data that make the tab active: any scalar, or a table of layers."""
        return "scalars", "dynamon"

    def is_active(self) -> bool:
        """Return False: TensorBoard asks only if there is none of these data."""
        return False

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        """Return what TensorBoard loads into the frame of the tab."""
        return base_plugin.FrontendMetadata(es_module_path="/tab.js", tab_name="Dynamon", disable_reload=True)

    def _answers(self, answer: _Answer) -> Callable[..., Any]:
        """Answer a request of the board. Errors are answered as ``problem``, a sentence that the tab shows."""

        @Request.application
        def application(request: Request) -> Response:
            try:
                content = answer(self._runs(), request.args)
            except _Refused as reason:
                content = {"problem": str(reason)}
            except Exception as error:  # TensorBoard and the tab must keep working
                content = {"problem": f"This could not be read ({type(error).__name__}: {error})."}
            return http_util.Respond(request, content, "application/json")

        return application

    def _runs(self) -> Any:
        """Return the folder of runs, created at the first request.

        Raises:
            _Refused: If the folder cannot be read from here.
        """
        if not self._logdir:
            raise _Refused("The Dynamon tab reads the event files themselves: start TensorBoard with --logdir FOLDER.")
        if _REMOTE.match(self._logdir):
            raise _Refused(
                f"The Dynamon tab reads local event files only, and {self._logdir} is remote. Copy the run "
                "to a local folder; meanwhile the Custom Scalars tab shows its charts."
            )
        with self._lock:
            if self._folder is None:
                self._folder = importlib.import_module("dynamon.board.live").LiveFolder(self._logdir)
            return self._folder


class _Refused(Exception):
    """A request has no answer; the message is for the user."""


def _listing(folder: Any, logdir: str) -> dict[str, Any]:
    """List the runs; if there is none, count the folders that hold event files nevertheless."""
    names = folder.names()
    unread = {} if names else {"unread": folder.skipped}
    return {"runs": names, "folder": logdir, **unread}


def _run(folder: Any, asked: Any) -> Any:
    try:
        return folder.run(asked.get("run", ""))
    except KeyError:
        raise _Refused("This run no longer exists.") from None


def _known(asked: Any) -> tuple[int, int]:
    """Return epoch and count of the previous answer."""
    return asked.get("epoch", 0, type=int), asked.get("since", 0, type=int)


def _file(read: Callable[[], str], kind: str) -> Callable[..., Any]:
    @Request.application
    def application(request: Request) -> Response:
        return http_util.Respond(request, read(), kind)

    return application
