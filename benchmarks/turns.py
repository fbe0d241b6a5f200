"""Arms of a benchmark that train in a thread each and take short blocks of steps in turn, so that all meet the same."""

import tempfile
import threading
from collections.abc import Callable, Sequence


class Baton:
    """Says whose turn it is.

    Args:
        arms: The number of arms.
    """

    def __init__(self, arms: int) -> None:
        """Begin with the first."""
        self._arms, self._turn = arms, 0
        self._failed: list[BaseException] = []
        self._condition = threading.Condition()

    def take(self, arm: int) -> None:
        """Wait for the turn of an arm."""
        with self._condition:
            self._condition.wait_for(lambda: self._turn == arm or self._failed)
            if self._failed:
                raise RuntimeError("another arm failed")

    def pass_on(self) -> None:
        """Let the next arm go."""
        with self._condition:
            self._turn = (self._turn + 1) % self._arms
            self._condition.notify_all()

    def run(self, names: Sequence[str], train: Callable[[str, str], None]) -> None:
        """Call ``train(name, folder)`` in a thread for each arm, with a folder that is gone afterwards.

        Raises:
            BaseException: What the first arm raised that failed; the others end then.
        """

        def arm(name: str, folder: str) -> None:
            try:
                train(name, folder)
            except BaseException as error:  # the others would wait for its turn
                with self._condition:
                    self._failed.append(error)
                    self._condition.notify_all()

        with tempfile.TemporaryDirectory() as folder:
            threads = [threading.Thread(target=arm, args=(name, folder)) for name in names]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if self._failed:
            raise self._failed[0]
