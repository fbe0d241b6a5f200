"""Call the sentinel at every step, also at those at which all other meters sleep."""

from typing import Any

from torch.optim import Optimizer

from dynamon.monitoring.health_caller import HealthCaller
from dynamon.monitoring.sentinel import Sentinel


class SentinelCaller(HealthCaller):
    """Passes the events of every step to the sentinel, where there is one, and catches what it raises.

    The sentinel takes no part in measurements that processes make together, so that its failures are those of this
    process alone.
    """

    def _forget_sentinel(self) -> None:
        """Call none, until the meters have started."""
        self._sentinel: Sentinel | None = None
        self._has_logged = False

    def _find_sentinel(self) -> None:
        """Call the one among the meters."""
        self._sentinel = next((meter for meter in self._meters if isinstance(meter, Sentinel)), None)

    def see_batch(self, batch: Any) -> None:
        """A batch has arrived on the device, at a step that may not be measured."""
        if self._sentinel is not None:
            self._watch("see_batch", batch)

    def see_step(self, optimizer: Optimizer) -> None:
        """An optimizer is about to step, likewise."""
        if self._sentinel is not None:
            self._watch("see_step", optimizer)

    def see_end(self, outputs: Any) -> None:
        """A batch is over, likewise: spikes that have been found are recorded."""
        if self._sentinel is not None:
            has_logged, self._has_logged = self._has_logged, False
            self._watch("see_end", outputs, has_logged)
            if self._sentinel.has_news:
                self._sentinel.has_news = False
                self._tell_spikes()

    def _watch(self, method: str, *arguments: Any) -> None:
        sentinel, run = self._sentinel, self._run
        if sentinel is None or run is None:
            return
        if self._in_a_row.until and self.paused(sentinel):
            sentinel.forget_batch()
            return
        try:
            getattr(sentinel, method)(run, *arguments)
        except Exception as error:  # a measurement that fails must not end training
            if self._strict:
                raise
            self._failed(sentinel, error)
