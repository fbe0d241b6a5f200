"""Deliver findings on a thread of its own, so that training never waits for whoever receives them."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from dynamon.health import SEVERITIES, Finding

LONGEST = 64  # findings that may wait


@dataclass(frozen=True)
class Recipient:
    """Hold who is told of findings.

    Attributes:
        name: How messages call it.
        deliver: Tells it of one finding. It runs on the thread of this recipient.
        target: What tells this recipient from others.
        severities: Those of which it is told.
    """

    name: str
    deliver: Callable[[Finding], object]
    target: object
    severities: tuple[str, ...] = SEVERITIES


class AlertThread:
    """Calls a recipient on a daemon thread, in the order of the findings, with at most 64 of them waiting.

    Whatever the recipient raises is counted. The thread starts with the first finding, ends with :meth:`finish`,
    and does not keep the interpreter from ending.

    Args:
        recipient: Who is told.

    Attributes:
        error: What the recipient raised first: class and place. The message is left out: that of a library for HTTP
            holds the address, and with it a token.
        dropped: Findings that were not delivered, because too many were waiting or time was up.
        raised: Findings at which the recipient raised something.
    """

    def __init__(self, recipient: Recipient) -> None:
        """Start with nothing to deliver."""
        self.recipient = recipient
        self.error: str | None = None
        self.dropped = self.raised = 0
        self._queue: SimpleQueue[Finding | None] = SimpleQueue()
        self._worker: threading.Thread | None = None
        self._put = self._done = 0
        self._is_over = False

    def put(self, finding: Finding) -> None:
        """Have a finding delivered, unless its severity does not concern the recipient or too many wait."""
        if finding.severity not in self.recipient.severities:
            return
        if self._put - self._done >= LONGEST:
            self.dropped += 1
            return
        self._put += 1
        self._queue.put(finding)
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, name="dynamon alerts", daemon=True)
            self._worker.start()

    def finish(self) -> None:
        """Have the thread end when it has delivered everything."""
        if self._worker is not None:
            self._queue.put(None)

    def close(self, patience: float) -> None:
        """Wait for that; after ``patience`` seconds what is left is dropped."""
        if self._worker is None:
            return
        self._worker.join(patience)
        if self._worker.is_alive():
            self._is_over = True
            self.dropped += self._put - self._done

    def _work(self) -> None:
        while (finding := self._queue.get()) is not None and not self._is_over:
            try:
                self.recipient.deliver(finding)
            except BaseException as error:  # whatever it is, nobody else on this thread could take it
                self.raised += 1
                self.error = self.error or _describe(error)
            self._done += 1


def _describe(error: BaseException) -> str:
    frame = error.__traceback__ and error.__traceback__.tb_next  # the first one is ours
    place = f" ({Path(frame.tb_frame.f_code.co_filename).name}, line {frame.tb_lineno})" if frame else ""
    return f"{type(error).__name__}{place}"
