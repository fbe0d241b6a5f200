"""Alerts without a Trainer: what is told and when, the file, the threads, the trackers' functions."""

import copy
import json
import math
import pickle
import subprocess
import sys
import threading
import types
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dynamon.health import SEVERITIES, Finding
from dynamon.monitoring import alerts
from dynamon.monitoring.alerts import Alerts, AlertSettings
from dynamon.monitoring.alerts_file import FindingFile
from dynamon.monitoring.alerts_thread import LONGEST, AlertThread, Recipient
from dynamon.monitoring.alerts_trackers import open_runs, plain_text, recipient_of
from dynamon.monitoring.writers import Writer


def finding(rule: str = "gradient/dead", severity: str = "warning", step: int = 10, **more: Any) -> Finding:
    return Finding(rule, severity, step, "It looks wrong.", "Look at it.", **more)


def run(folder: Path | None = None, *functions: Any) -> Any:
    """What alerts ask of a run: one writer, and a monitor for each function."""
    writer = Writer(None)
    writer.folder = folder
    members = [SimpleNamespace(alert_settings=AlertSettings(function)) for function in functions]
    recorder = SimpleNamespace(writes_to=lambda _: True, writes_to_all=True)
    return SimpleNamespace(loop=SimpleNamespace(members=members, writers=[writer]), recorder=recorder)


def end(thread: AlertThread) -> None:
    thread.finish()
    thread.close(20.0)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "findings.jsonl").read_text().splitlines()]


# What is told, and when


def told(monkeypatch: pytest.MonkeyPatch, *looks: tuple[float, list[Finding]]) -> list[list[Finding]]:
    """What is told at each of some looks, of which the time is given."""
    clock = [0.0]
    monkeypatch.setattr(alerts, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    teller, found = Alerts("Monitor"), []
    for clock[0], seen in looks:
        found.append(teller.tell(run(), seen, 0))
    return found


def test_the_same_is_told_once(monkeypatch) -> None:
    again = [(60.0 * look, [finding(layers=("a",))]) for look in range(200)]
    assert told(monkeypatch, *again) == [[finding(layers=("a",))], *[[]] * 199]


def test_worse_is_told_at_once_and_milder_never(monkeypatch) -> None:
    looks = [
        (float(i), [finding(severity=severity)]) for i, severity in enumerate(("warning", "note", "fault", "fault"))
    ]
    assert list(map(len, told(monkeypatch, *looks))) == [1, 0, 1, 0]


def test_further_layers_wait_a_minute_and_are_told_once(monkeypatch) -> None:
    one, two = finding(layers=("a",)), finding(layers=("a", "b"))
    looks = [(0.0, [one]), (59.0, [two]), (60.0, [two]), (200.0, [two]), (200.0, [one])]
    assert told(monkeypatch, *looks) == [[one], [], [two], [], []]


@pytest.mark.parametrize(("rule", "is_told"), [("spike/deviation", True), ("gradient/dead", False)])
def test_another_spike_is_told_when_training_ends(rule: str, is_told: bool) -> None:
    """There is no later occasion; other rules are of one event that goes on."""
    teller, other = Alerts("Monitor"), finding(rule, step=99)
    assert teller.tell(run(), [finding(rule, step=60)], 60)
    assert teller.tell(run(), [other], 99) == []
    assert teller.tell(run(), [other], 99, is_last=True) == ([other] if is_told else [])


def test_findings_of_one_look_are_all_told(monkeypatch) -> None:
    several = [finding(layers=(name,)) for name in "abc"] + [finding("loss/rising")]
    assert told(monkeypatch, (0.0, several)) == [several]


def test_what_begins_later_is_told_after_an_hour(monkeypatch) -> None:
    first, second = finding(step=10), finding(step=900)
    looks = [(0.0, [first]), (3599.0, [second]), (3600.0, [first]), (3600.0, [second]), (9000.0, [second])]
    assert told(monkeypatch, *looks) == [[first], [], [], [second], []]


def test_the_last_look_leaves_nothing_to_a_later_one() -> None:
    teller, one, two = Alerts("Monitor"), finding(layers=("a",)), finding(layers=("b",))
    assert [teller.tell(run(), [each], 0, is_last=True) for each in (one, two, two)] == [[one], [two], []]


def test_what_was_found_later_than_where_training_goes_back_to_is_told_again() -> None:
    teller = Alerts("Monitor")
    early, late = finding("loss/rising"), finding("gradient/dead")
    teller.tell(run(), [early], 40), teller.tell(run(), [late], 60)
    teller.go_back(run(), 60)
    assert teller.tell(run(), [early, late], 61) == [late]


# The file


def test_lines_are_strict_json_of_everything(tmp_path: Path) -> None:
    numbers = {"nan": math.nan, "up": math.inf, "down": -math.inf, "one": 1.5, "count": 3}
    one = finding(layers=('<img src=x onerror="a()">', "a\nb\x1b[31m\ud800"), numbers=numbers, tags=("gradient/l2",))
    Alerts("Monitor").tell(run(tmp_path), [one], 25)
    raw = (tmp_path / "findings.jsonl").read_bytes()
    assert raw.isascii() and raw.count(b"\n") == 1 and raw.endswith(b"\n")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    line = json.loads(raw, parse_constant=refuse)
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "version": 1,
        "found_at": 25,
        "step": 10,
        "rule": "gradient/dead",
        "severity": "warning",
        "layers": list(one.layers),
        "message": one.message,
        "advice": one.advice,
        "numbers": {"nan": None, "up": None, "down": None, "one": 1.5, "count": 3.0},
        "tags": ["gradient/l2"],
    }


def test_lines_are_there_before_anybody_else_is_told(tmp_path: Path) -> None:
    seen: list[int] = []
    teller = Alerts("Monitor")
    teller.tell(run(tmp_path, lambda _: seen.append(len(lines(tmp_path)))), [finding()], 0)
    teller.close()
    assert seen == [1]


def test_purging_keeps_what_was_found_before(tmp_path: Path) -> None:
    file = FindingFile(tmp_path)
    for at in (10, 20, 30):
        file.append([finding(step=at - 5)], at)
    with file.path.open("a") as raw:
        raw.write('{"version": 1, "time": "20')  # a process was killed here
    file.purge(20)
    assert [line["found_at"] for line in lines(tmp_path)] == [10]
    assert [path.name for path in tmp_path.iterdir()] == ["findings.jsonl"]
    FindingFile(tmp_path / "none").purge(0)
    assert not (tmp_path / "none").exists()


def test_a_line_that_a_crash_has_cut_does_not_spoil_the_next(tmp_path: Path) -> None:
    file = FindingFile(tmp_path)
    file.path.write_text('{"version": 1, "ti')
    file.append([finding()], 1)
    assert json.loads(file.path.read_text().splitlines()[1])["rule"] == "gradient/dead"


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    teller, got = Alerts("Monitor"), []
    with pytest.warns(UserWarning, match=r"findings\.jsonl failed: .*Training goes on") as caught:
        for rule in ("a", "b", "c"):
            teller.tell(run(tmp_path / "file", got.append), [finding(rule)], 0)
        teller.close()
    assert len(caught) == 1 and teller.failures == 3 and len(got) == 3


# Threads


def test_functions_run_in_order_on_another_thread_and_each_has_its_own() -> None:
    seen: list[tuple[str, str]] = []
    functions = [lambda one: seen.append((one.rule, threading.current_thread().name)) for _ in range(2)]
    teller = Alerts("Monitor")
    teller.tell(run(None, *functions, functions[0]), [finding("a"), finding("b")], 0)
    teller.close()
    assert sorted(seen) == [("a", "dynamon alerts")] * 2 + [("b", "dynamon alerts")] * 2
    assert not any(thread.name == "dynamon alerts" for thread in threading.enumerate())


def test_a_function_that_raises_is_counted_and_named_once_without_its_message() -> None:
    got: list[Finding] = []

    def secret(one: Finding) -> None:
        raise ConnectionError("https://hooks.example.com/services/T00/B00/token")

    teller = Alerts("Monitor")
    with pytest.warns(UserWarning) as caught:
        teller.tell(run(None, secret, got.append), [finding("a"), finding("b")], 0)
        teller.close()
        teller.tell(run(None, secret, got.append), [finding("c")], 0)
        teller.close()
    (warning,) = caught
    assert "on_finding raised ConnectionError (test_alerts.py, line " in str(warning.message)
    assert "token" not in str(warning.message)
    assert teller.failures == 3 and [one.rule for one in got] == ["a", "b", "c"]


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_whatever_is_raised_the_thread_goes_on(error: type[BaseException]) -> None:
    got: list[str] = []

    def function(one: Finding) -> None:
        got.append(one.rule)
        raise error

    thread = AlertThread(Recipient("f", function, function))
    thread.put(finding("a")), thread.put(finding("b"))
    end(thread)
    assert got == ["a", "b"] and thread.raised == 2 and thread.dropped == 0


def test_too_many_that_wait_are_dropped_and_counted() -> None:
    go_on, got = threading.Event(), []

    def slow(one: Finding) -> None:
        go_on.wait(20)
        got.append(one.step)

    thread = AlertThread(Recipient("f", slow, slow))
    for step in range(LONGEST + 7):
        thread.put(finding(step=step))
    assert thread.dropped == 7
    go_on.set()
    end(thread)
    assert got == list(range(LONGEST)) and thread.dropped == 7


def test_one_that_never_returns_is_left_behind_and_others_are_not_kept_waiting() -> None:
    go_on, began, got = threading.Event(), threading.Event(), []

    def stuck(one: Finding) -> None:
        began.set()
        go_on.wait()

    teller = Alerts("Monitor")
    teller.tell(run(None, stuck, got.append), [finding("a"), finding("b")], 0)
    assert began.wait(20)
    with pytest.warns(UserWarning, match="on_finding is slow: some findings did not reach it in time"):
        teller.close(0.3)
    assert len(got) == 2 and teller.failures == 2
    (left,) = [thread for thread in threading.enumerate() if thread.name == "dynamon alerts"]
    go_on.set()
    left.join(20)
    assert not left.is_alive()


@pytest.mark.parametrize("end", ["", "1 / 0"])
def test_an_interpreter_ends_with_a_function_that_never_returns(end: str) -> None:
    script = f"""
import threading
from dynamon.health import Finding
from dynamon.monitoring.alerts_thread import AlertThread, Recipient
began = threading.Event()
def stuck(one):
    began.set()
    threading.Event().wait()
thread = AlertThread(Recipient("f", stuck, stuck))
thread.put(Finding("a", "fault", 0, "", ""))
assert began.wait(20)
thread.finish()
thread.close(0.1)
{end}
"""
    ended = subprocess.run([sys.executable, "-c", script], timeout=120, capture_output=True, text=True)
    assert ended.returncode == (1 if end else 0), ended.stderr


def test_copies_have_threads_of_their_own_and_share_the_function() -> None:
    lock = threading.Lock()  # what cannot be copied

    class Client:
        def __init__(self) -> None:
            self.lock = lock

        def send(self, one: Finding) -> None:
            pass

    teller, client = Alerts("Monitor"), Client()
    settings = AlertSettings.checked(client.send, None)
    assert copy.deepcopy(settings).on_finding.__self__ is client
    teller.tell(run(None, client.send), [finding()], 0)
    for twin in (copy.deepcopy(teller), pickle.loads(pickle.dumps(teller))):
        assert twin.tell(run(), [finding()], 0) == []
        assert twin._threads == {}
    teller.close()


# Arguments


def test_settings_are_checked() -> None:
    assert AlertSettings.checked(None, None) == AlertSettings()
    assert AlertSettings.checked(print, ["fault", "loss/rising"]).stop_on == ("fault", "loss/rising")
    with pytest.raises(TypeError, match=r"on_finding must be a function of one Finding, or None, got str"):
        AlertSettings.checked("print", None)
    with pytest.raises(TypeError, match=r"stop_on must be a list of names, or None, got 'fault'; write \['fault'\]"):
        AlertSettings.checked(None, "fault")
    with pytest.raises(ValueError, match=r"got 'spike'. Did you mean spike/deviation or spike/many or spike/shift\?"):
        AlertSettings.checked(None, ["spike"])
    with pytest.raises(ValueError, match=r"got 'x'. Rules: .*spike/shift"):
        AlertSettings.checked(None, ["x"])
    with pytest.raises(ValueError, match=r"stop_on must name severities \(fault, warning, note\) .* 'loss/nan'.*mean"):
        AlertSettings.checked(None, ["fault", "loss/nan"])
    with pytest.raises(ValueError, match="got 3"):
        AlertSettings.checked(None, [3])


def test_a_severity_stops_at_worse_ones_too() -> None:
    for limit in SEVERITIES:
        settings = AlertSettings.checked(None, [limit])
        stopping = [severity for severity in SEVERITIES if settings.stops(finding(severity=severity))]
        assert stopping == list(SEVERITIES[: SEVERITIES.index(limit) + 1])
    only = AlertSettings.checked(None, ["loss/rising"])
    assert only.stops(finding("loss/rising", "note")) and not only.stops(finding("gradient/dead", "fault"))
    assert not AlertSettings().stops(finding(severity="fault"))


# Trackers


class Sent(list):
    """Takes what a tracker's ``alert`` is called with."""

    def alert(self, **given: Any) -> None:
        self.append(given)


def as_of(package: str) -> Sent:
    return type("Run", (Sent,), {"__module__": f"{package}.run"})()


def test_texts_are_plain() -> None:
    assert plain_text("<script>a()</script>\r\n\x1b[31m\x00\u202eb & c") == (
        "&lt;script&gt;a()&lt;/script&gt;   [31m  b &amp; c"
    )
    assert len(plain_text("x" * 5000)) == 1000


def test_wandb_is_told_of_faults_and_warnings_with_advice() -> None:
    sent = as_of("wandb")
    recipient = recipient_of(sent)
    assert recipient is not None
    thread = AlertThread(recipient)
    for severity in SEVERITIES:
        thread.put(finding("update/stopped", severity, layers=("<b>",)))
    end(thread)
    text = "From step 10: It looks wrong. Look at it."
    assert sent == [
        {"title": "dynamon: update/stopped, fault", "text": text, "level": "ERROR"},
        {"title": "dynamon: update/stopped, warning", "text": text, "level": "WARN"},
    ]


def test_titles_are_as_short_as_wandb_wants() -> None:
    from dynamon.health import NAMES

    assert max(len(f"dynamon: {name}, warning") for name in NAMES) < 64


def test_a_tracker_without_the_function_is_told_nothing() -> None:
    class Old:
        __module__ = "trackio.run"

    assert recipient_of(None) is None and recipient_of(Old()) is None
    assert recipient_of(as_of("mlflow")) is None  # which has an alert, but none that we know


def test_open_runs_are_found_without_importing_a_tracker(monkeypatch) -> None:
    for name in ("wandb", "trackio", "trackio.context_vars"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert list(open_runs()) == [] and "trackio" not in sys.modules
    one, other = as_of("wandb"), as_of("trackio")
    known = types.ModuleType("trackio.context_vars")
    known.current_run = SimpleNamespace(get=lambda: other)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=one))
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(AlertLevel=lambda level: f"AlertLevel({level})"))
    monkeypatch.setitem(sys.modules, "trackio.context_vars", known)
    teller = Alerts("Monitor")
    teller.tell(run(), [finding(severity="fault")], 0)
    teller.close()
    assert [sent["level"] for sent in (*one, *other)] == ["ERROR", "AlertLevel(error)"]
    known.current_run = None  # another release
    assert [recipient.target for recipient in open_runs()] == [one]


def test_open_runs_are_left_alone_where_certain_loggers_were_asked_for(monkeypatch) -> None:
    sent = as_of("wandb")
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=sent))
    chosen = run()
    chosen.recorder.writes_to_all = False
    teller = Alerts("Monitor")
    teller.tell(chosen, [finding()], 0)
    teller.close()
    assert sent == []


def test_a_run_that_is_both_the_loggers_and_open_is_told_once(monkeypatch) -> None:
    sent = as_of("wandb")
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=sent))
    twice = run()
    twice.loop.writers[0].recipient = lambda: recipient_of(sent)
    teller = Alerts("Monitor")
    teller.tell(twice, [finding()], 0)
    teller.close()
    assert len(sent) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_trackio_itself_takes_an_alert(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trackio = pytest.importorskip("trackio")
        trackio.init(project="p", name="r", embed=False)
        teller = Alerts("Monitor")
        teller.tell(run(), [finding(severity="fault", layers=("a",)), finding("lr/zero", "note")], 0)
        teller.close()
        trackio.finish()
        (alert,) = trackio.Api().alerts("p")
    assert alert["title"] == "dynamon: gradient/dead, fault" and alert["level"] == "error" and teller.failures == 0
