"""Tell programs and people what the health rules find: functions of the user's, a file, trackers."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from dynamon.health import NAMES, SEVERITIES, Finding
from dynamon.monitoring.alerts_file import FindingFile
from dynamon.monitoring.alerts_thread import AlertThread, Recipient
from dynamon.monitoring.alerts_trackers import open_runs
from dynamon.monitoring.failures import first_line
from dynamon.monitoring.messages import rank_zero_warn
from dynamon.monitoring.run_context import RunContext

PATIENCE = 5.0  # seconds that a fit waits at its end for alerts that are under way
_NEW_LAYERS = 60.0  # seconds after which a rule is told of further layers
_AGAIN = 3600.0  # seconds after which it is told of what began later in the same layers


@dataclass(frozen=True)
class AlertSettings:
    """Hold what a monitor is to do with findings.

    Attributes:
        on_finding: A function of the user's, or None.
        stop_on: Names of rules, and severities, at which training is to stop.
    """

    on_finding: Callable[[Finding], object] | None = None
    stop_on: tuple[str, ...] = ()

    @classmethod
    def checked(cls, on_finding: Any, stop_on: Any) -> "AlertSettings":
        """Make them from what the user gave.

        Raises:
            TypeError: On an argument of the wrong type.
            ValueError: On a name that is neither a severity nor a rule's.
        """
        if on_finding is not None and not callable(on_finding):
            raise TypeError(f"on_finding must be a function of one Finding, or None, got {type(on_finding).__name__}.")
        if isinstance(stop_on, str) or not isinstance(stop_on, Iterable | None):
            raise TypeError(f"stop_on must be a list of names, or None, got {stop_on!r}; write [{stop_on!r}].")
        names = tuple(stop_on or ())
        for name in names:
            if name not in (*SEVERITIES, *NAMES):
                known = [*SEVERITIES, *NAMES]
                near = [one for one in NAMES if len(str(name)) > 2 and str(name) in one] or get_close_matches(
                    str(name), known
                )
                hint = f"Did you mean {' or '.join(near[:3])}?" if near else f"Rules: {', '.join(NAMES)}."
                raise ValueError(
                    f"stop_on must name severities ({', '.join(SEVERITIES)}) or health rules, got {name!r}. {hint}"
                )
        return cls(on_finding, names)

    def stops(self, finding: Finding) -> bool:
        """Return whether training is to stop at a finding: its rule is named, or a severity that it reaches."""
        reached = SEVERITIES[SEVERITIES.index(finding.severity) :]
        return not {finding.rule, *reached}.isdisjoint(self.stop_on)

    def __deepcopy__(self, memo: Any) -> "AlertSettings":
        """Return itself: what the user's function holds, a connection perhaps, is not to be copied."""
        return self


@dataclass(frozen=True)
class _Told:
    """Hold a finding that was told, when, and the last step whose readings it rests on."""

    finding: Finding
    at: float
    found_at: int


class Alerts:
    """Tells each finding once: to the functions of a loop's monitors, in ``findings.jsonl``, and to trackers.

    A finding is told again where it has become worse; of further layers after a minute; and where it began later than
    what was told before, after an hour; another spike also when training ends. The file is written by the thread that
    trains, so that a crash loses nothing;
    functions and trackers have a thread each (:class:`dynamon.monitoring.alerts_thread.AlertThread`). What fails is
    counted, said once, and not raised. On the first process only.

    Args:
        name: Who speaks, in messages.

    Cost: nothing without a finding. For each one a line in a file, and what the functions take of the interpreter.
    """

    def __init__(self, name: str) -> None:
        """Start with nothing told."""
        self._name = name
        self._told: list[_Told] = []
        self._threads: dict[int, AlertThread] = {}
        self._failed, self._said = 0, set[str]()

    @property
    def failures(self) -> int:
        """Findings that could not be written or delivered so far."""
        return self._failed + sum(thread.raised + thread.dropped for thread in self._threads.values())

    def go_back(self, run: RunContext, step: int) -> None:
        """Forget what was found at a step or later, here and in the file: training goes on from there."""
        self._told = [told for told in self._told if told.found_at < step]
        with self._counted("findings.jsonl"):
            for file in _files(run):
                file.purge(step)

    def tell(self, run: RunContext, found: Sequence[Finding], step: int, is_last: bool = False) -> list[Finding]:
        """Tell what is new, and return it.

        Args:
            run: The run.
            found: What the rules find, the worst first.
            step: The last step whose readings they saw.
            is_last: Whether there will be no later occasion, so that nothing may wait.
        """
        now = time.monotonic()
        new = [
            one for one in found if _is_new(one, [t for t in self._told if t.finding.rule == one.rule], now, is_last)
        ]
        if new:
            self._told += [_Told(one, now, step) for one in new]
            with self._counted("findings.jsonl"):
                for file in _files(run):
                    file.append(new, step)
            with self._counted("on_finding"):
                for key, recipient in _recipients(run).items():
                    thread = self._threads.setdefault(key, AlertThread(recipient))
                    for one in new:
                        thread.put(one)
        self._complain()
        return new

    def close(self, patience: float = PATIENCE) -> None:
        """End all threads, and wait for what is under way: ``patience`` seconds in all. What waits then is dropped."""
        deadline = time.monotonic() + patience
        for thread in self._threads.values():
            thread.finish()
        for thread in self._threads.values():
            thread.close(max(deadline - time.monotonic(), 0.0))
        self._complain()
        self._failed, self._threads = self.failures, {}

    def _complain(self) -> None:
        """Say once of each recipient what it raised, and that findings did not reach it."""
        for thread in self._threads.values():
            name = thread.recipient.name
            if thread.error is not None:
                self._say(f"{name} raised {thread.error}. What it says is not shown, since it may hold an address.")
            if thread.dropped:
                self._say(f"{name} is slow: some findings did not reach it in time.")

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a disk that is full, a logger without a folder: training goes on
            self._failed += 1
            self._say(f"{name} failed: {first_line(error)}")

    def _say(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            rank_zero_warn(f"{self._name}: {sentence} Training goes on, and .findings has them all.")

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes threads of its own."""
        return {**self.__dict__, "_failed": self.failures, "_threads": {}}


def _is_new(finding: Finding, told: Sequence[_Told], now: float, is_last: bool) -> bool:
    """Return whether to tell a finding beside what was told of its rule."""
    if not told or SEVERITIES.index(finding.severity) < min(SEVERITIES.index(t.finding.severity) for t in told):
        return True
    waited = now - max(t.at for t in told)
    known = {layer for t in told for layer in t.finding.layers}
    if not known.issuperset(finding.layers):
        return is_last or waited >= _NEW_LAYERS
    is_due = waited >= _AGAIN or is_last and finding.rule.startswith("spike/")  # another event, not told otherwise
    return finding.step > max(t.finding.step for t in told) and is_due


def settings_of(run: RunContext) -> list[AlertSettings]:
    """Return what the monitors of a loop were told to do with findings."""
    found = (getattr(member, "alert_settings", None) for member in run.loop.members)
    return [settings for settings in found if settings is not None]


def _files(run: RunContext) -> list[FindingFile]:
    """Return the file in the folder of each logger that has one, among those that were asked for."""
    folders = (writer.folder for writer in run.loop.writers if run.recorder.writes_to(writer))
    return [FindingFile(folder) for folder in dict.fromkeys(folders) if folder is not None]


def _recipients(run: RunContext) -> dict[int, Recipient]:
    """Return all who are told, each once."""
    functions: list[Any] = []
    for settings in settings_of(run):
        if settings.on_finding is not None and settings.on_finding not in functions:
            functions.append(settings.on_finding)
    found = [Recipient("on_finding", function, function) for function in functions]
    found += [one for w in run.loop.writers if run.recorder.writes_to(w) and (one := w.recipient()) is not None]
    found += open_runs() if run.recorder.writes_to_all else ()
    return {id(recipient.target): recipient for recipient in found}
