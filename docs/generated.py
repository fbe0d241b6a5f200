"""Pages and tables that the code, the examples and the benchmarks know: made anew for every build.

``docs/generated/`` holds what pages include, ``docs/gallery/`` a page for each example.
"""

import argparse
import ast
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import guard
from benchmarks.faults import score, tables
from benchmarks.rates_study.tables import GROUPS, read
from dynamon import cli
from dynamon.monitoring.dynamics_monitor import PRESETS
from dynamon.quantities import REGISTRY, Quantity

ROOT = Path(__file__).parent.parent
RESULTS, EXAMPLES = ROOT / "benchmarks" / "results", ROOT / "examples"
WRITERS = {
    "gradient": "`GradientMonitor`",
    "weight": "`WeightMonitor`",
    "sharpness": "`SharpnessMonitor`",
    "steps": "`SharpnessMonitor`",
    "progress": "`SharpnessMonitor`",
    "activation": "`ActivationMonitor`",
    "steering": "`LayerwiseLR`",
    "guard": "`SpikeGuard`",
    "sentinel": "`DynamicsMonitor`",
    "advice": "`RateAdvisor`",
    "monitor": "every monitor",
}  # by the meter that takes a quantity


def write(docs: Path) -> None:
    """Write what has changed, so that Sphinx reads again only what it must."""
    for name, make in TABLES.items():
        _write(docs / "generated" / f"{name}.md", make())
    runs = json.loads((docs / "gallery" / "runs.json").read_text())
    for script in sorted(EXAMPLES.glob("*.py")):
        _write(docs / "gallery" / f"{script.stem}.md", gallery_page(script, runs))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    lines = [list(head), *(list(map(str, row)) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


# What a run writes


def key_tables() -> str:
    """The key table, a section for each group."""
    head = ("tag", "what it is", "unit", "kind", "when", "written by")
    text = ""
    for group in dict.fromkeys(one.group for one in REGISTRY.values()):
        rows = [
            (f"`{one.tag}`", one.meaning, one.unit, one.scope.value, _when(one), WRITERS[one.cadence])
            for one in REGISTRY.values()
            if one.group == group
        ]
        text += f"## {group}\n\n{table(head, rows)}\n"
    return text


def _when(quantity: Quantity) -> str:
    """At which of the readings of its meter a quantity is there."""
    every = "" if quantity.every == 1 else f"every {quantity.every}th reading"
    return ", ".join(filter(None, (every, quantity.condition.words)))


def preset_table() -> str:
    """The presets as the code has them."""
    rows = [
        (
            f"`{name}`",
            _steps(preset.gradients),
            _steps(preset.weights),
            _steps(preset.sharpness),
            "never" if preset.activations is None else _steps(preset.activations),
            ", ".join(f"`{q}`" for q in preset.quantities),
            f"{preset.probe_fraction:g} of a batch",
            "yes" if preset.histograms else "no",
        )
        for name, preset in PRESETS.items()
    ]
    head = ("preset", "gradients every", "weights every", "sharpness every")
    head += ("activations every", "of sharpness", "probe", "histograms")
    return table(head, rows)


def _steps(count: int) -> str:
    return "step" if count == 1 else f"{count} steps"


# What was measured


def _result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def provenance(environment: Mapping[str, Any]) -> str:
    """Where figures come from, in a line."""
    parts = [f"`{environment['command']}`", f"torch {environment['torch']}", f"Python {environment['python']}"]
    packages = environment.get("packages", {})
    parts += [f"{name} {v}" for name, v in packages.items() if name not in ("torch", "numpy", "scipy", "lightning")]
    parts += [f"{environment['device']}, {environment['threads']} thread(s)", f"commit {environment['commit']}"]
    parts += [environment["date"]] if "date" in environment else []
    return f"*{'; '.join(parts)}.*\n"


def cost_table() -> str:
    """What each monitor costs."""
    found = _result("monitoring_cost")
    rows = [
        (
            name,
            r.get("readings", "every step"),
            r.get("ms a reading", ""),
            r.get("steps a reading", ""),
            f"{r['overhead from outside']:.1%}",
            f"{r['overhead stated']:.1%}",
        )
        for name, r in found["results"].items()
        if name != "none"
    ]
    head = ("what", "readings", "ms each", "in training steps", "whole run, from outside", "what it says itself")
    step = found["environment"]["ms a training step"]
    return f"{table(head, rows)}\nA training step took {step} ms. {provenance(found['environment'])}"


def activations_table() -> str:
    """What a reading of activations costs."""
    if not (RESULTS / "activations.json").exists():
        return "`python -m benchmarks.activations` has not been run with this version.\n"
    found = _result("activations")
    rows = [
        (
            name,
            one["rows"],
            one["CPU ms a step without"],
            f"{one['CPU ms a reading']} ± {one['half width of the 95 % interval']}",
            one["training steps a reading"],
        )
        for name, one in found["results"].items()
    ]
    head = (
        "model, probe",
        "rows",
        "ms a step",
        "ms a reading, from outside",
        "in training steps",
    )
    return f"{table(head, rows)}\n{provenance(found['environment'])}"


def readings_table() -> str:
    """What short and long runs show under the default budget."""
    if not (RESULTS / "readings.json").exists():
        return "`python -m benchmarks.readings` has not been run with this version.\n"
    found = _result("readings")
    quantities = list(next(iter(next(iter(found["results"].values()))["runs"].values()))["readings"])
    rows = [
        (
            f"{name}, {steps} steps of {run['ms a step without the monitor']:.3g} ms",
            *(sum(run["readings"][quantity]["by part"]) for quantity in quantities),
            max((one["first"] for one in run["readings"].values() if one["first"] is not None), default=""),
            f"{run['seconds spent']:.2f} of {run['seconds allowed']:.2f}",
        )
        for name, case in found["results"].items()
        for steps, run in case["runs"].items()
    ]
    return f"{table(('run', *quantities, 'all by step', 'seconds'), rows)}\n{provenance(found['environment'])}"


def sharpness_table() -> str:
    """The top Hessian eigenvalue by several packages: time, products, error."""
    found = _result("sharpness")
    rows = []
    for cell in found["cells"]:
        for name, method in cell["methods"].items():
            rows.append(
                (
                    f"{cell['model']}, {'at the start' if cell['stage'] == 'init' else 'in training'}",
                    name,
                    f"{np.median(method['products']):g}",
                    f"{method['median seconds'] * 1000:.0f}",
                    f"{method['times dynamon cold']:.2f}",
                    f"{np.abs(method['relative errors']).max():.1g}",
                )
            )
    head = ("model", "method", "products, median", "ms, median", "time over dynamon's cold solve", "largest error")
    return f"{table(head, rows)}\n{provenance(found['environment'])}"


def spectra_table() -> str:
    """Spectra of all matrices of a model."""
    found = _result("spectra")
    rows = [
        (
            model["name"],
            row["method"],
            f"{row['seconds']:.2f}",
            f"{row['times_faster']:.1f}",
            f"{row['worst_error']:.1g}",
        )
        for model in found["results"]
        for row in model["rows"]
    ]
    head = ("matrices of", "method", "seconds", "times faster than `svdvals`", "largest error")
    return f"{table(head, rows)}\n{provenance(found['environment'])}"


def precision_table() -> str:
    """What weights in bfloat16 lose, and what that costs."""
    if not (RESULTS / "precision.json").exists():
        return "`python -m benchmarks.precision` has not been run with this version.\n"
    found = _result("precision")
    rows = [
        (
            f"{run['rate']:g}",
            f"`{run['precision']}`",
            f"{run['loss']:.3f}",
            *(
                f"{run['kinds'][kind][what]:{form}}"
                for what, form in (("size", ".2g"), ("lost", ".0%"), ("moved at all", ".0%"))
                for kind in ("matrices", "gains")
            ),
            f"{run['decay lost']:.0%}",
            ", ".join(f"`{rule}` ({count} of {run['layers']})" for rule, count in run["findings"].items()) or "none",
        )
        for run in found["results"]
    ]
    sizes = (
        "size, matrices",
        "size, gains",
        "lost, matrices",
        "lost, gains",
        "ever moved, matrices",
        "ever moved, gains",
    )
    head = ("rate", "precision", "loss", *sizes, "decay lost", "findings, with layers")
    return f"{table(head, rows)}\n{provenance(found['environment'])}"


def distributed_table() -> str:
    """Readings of several processes against those of one on all samples."""
    found = _result("distributed")
    rows = [(name, f"{value:.1g}") for name, value in found["results"]["largest"].items()]
    head = ("run", "largest relative difference of any reading")
    return f"{table(head, rows)}\n{provenance(found['environment'])}"


def tracking_table() -> str:
    """How well eigenvalues are followed over training."""
    found = _result("tracking")
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in found["rows"]:
        groups.setdefault((row["model"], row["optimizer"], row["operator"]), []).append(row["tracking"])
    rows = [
        (
            *key,
            ", ".join(f"{t['all products']:g}" for t in own),
            ", ".join(f"{t['share']:.2f}" for t in own),
            sum(t["wrong"] for t in own),
            f"{max(t['worst converged'] for t in own):.1g}",
        )
        for key, own in groups.items()
    ]
    head = (
        "model",
        "optimizer",
        "operator",
        "products a reading",
        "over those of a cold start",
        "converged and over 1 % low",
        "worst such error",
    )
    spacings = ", ".join(str(s) for s in dict.fromkeys(row["spacing"] for row in found["rows"]))
    note = f"Medians of runs with a reading every {spacings} steps."
    dated = {row["model"]: row["date"] for row in found["rows"] if row.get("date", "") > found["environment"]["date"]}
    again = "".join(f" {model}: measured again on {date}." for model, date in dated.items())
    return f"{table(head, rows)}\n{note}{again} {provenance(found['environment'])}"


def adaptive_tables() -> str:
    """Rates by layer: every arm against one rate for all layers, task by task."""
    found = read(RESULTS / "adaptive.json")
    head = ("arm", "best base rate", "final loss", "less that of uniform, paired by seed", "base rates within 2 %")
    parts = [found.summary() + "\n"]
    for task in found.chosen:
        said = found.verdict(task) if task in found.judged() else ""
        parts.append(f"**{task}**: {said}\n\n{table(head, found.rows(task))}")
        if task in GROUPS:
            arms, rows = found.ratios(task)
            parts.append(f"Its ratios, their geometric mean 1:\n\n{table(('group', *arms), rows)}")
    return "\n".join([*parts, provenance(_result("adaptive")["environment"])])


def steering_cost() -> str:
    """What following costs, in a sentence."""
    found = _result("steering_cost")
    results, held = found["results"], found["results"]["ratios held"]
    share, error = results["share of a step at the usual interval"], results["its standard error"]
    return (
        f"On the demo's model a reading takes {results['steps a reading']} steps, so {share:.1%} ± {error:.1%} of "
        "training time (a standard error) at one step in 150. Between readings nothing shows: ratios that are held "
        f"take {held['share of a step']:.1%} ± {held['standard error']:.1%}. Measured from outside, block by block in "
        f"turn with a run that is not steered. {provenance(found['environment'])}"
    )


def sentinel_cost() -> str:
    """What the sentinel costs, by default and at every step."""
    found = _result("sentinel_cost")
    rows = []
    for row in found["results"]:
        low, high = row["95 %"]
        on = sum(row["steps"].values())
        kinds = [
            f"{row['steps'][kind] / on:.1%}, {row['ms more'][kind]:.2f} ms" if kind in row["steps"] else ""
            for kind in ("passed", "checked", "looked at")
        ]
        cost = f"{row['share of a step']:.2%} ({low:.2%} to {high:.2%})"
        rows.append((f"{row['CPU ms a step']:.0f} ms", row["sentinel"], cost, *kinds))
    head = ("step", "sentinel", "share of a step, 95 % interval", "passed", "checked", "looked at")
    return "\n".join([table(head, rows), provenance(found["environment"])])


def fault_tables() -> str:
    """Injected faults: their strengths, who named them, false alarms."""
    found = score.read(RESULTS / "faults.json")
    head = ("detector", "right step", "right step and layer", "the same with harmless faults")
    head += ("known after, median steps", "known before the loss moves", "false alarms: by 10,000 steps")
    parts = ["### Detectors\n", table(head, tables.summary_rows(found))]
    parts += ["### Strengths\n\nRise of the final loss; brackets: harmless.\n"]
    parts += [table(("fault", "strength counts", *tables.REPORTED), tables.strength_rows(found))]
    head = (
        "fault, model",
        "named",
        "by",
        "stated step less true step",
        "known after",
        "loss moves after",
        "right layer",
    )
    for detector in tables.ROWS:
        if not found.verdicts(detector, list(tables.REPORTED)):
            continue
        parts += [f"### Fault by fault: {tables.WORDS[detector]}\n", table(head, tables.fault_rows(found, detector))]
    parts += [
        "### False alarms by rule\n",
        table(("rule", *(tables.WORDS[row] for row in tables.ROWS)), tables.alarm_rows(found)),
    ]
    return "\n".join([*parts, provenance(_result("faults")["environment"])])


def guard_table() -> str:
    """Final losses with a guard against spikes and without."""
    if not (RESULTS / "guard.json").exists():
        return "`python -m benchmarks.guard` has not been run with this version.\n"
    found = _result("guard")
    arms = ("none", "best global clipping", "ZClip", "guard")
    head = ("task", "set-up", *arms, *(f"guard against {arm}" for arm in arms[:-1]))
    return f"{table(head, guard.rows(found))}\n{provenance(found['environment'])}"


def radii_table() -> str:
    """Losses at the former and at the present default radii of Lanton."""
    found = dict(_result("radii")["found"])
    radii = found.pop("radii")
    rows = [(task, *(f"{loss:.4f}" for loss in losses.values())) for task, losses in found.items()]
    head = ("task", "loss at the former radii", "at those found")
    words = ", ".join(f"{role} {radius:g}" for role, radius in radii.items())
    return f"{table(head, rows)}\nFound: {words}. {provenance(_result('radii')['environment'])}"


def gpu_tables(found: Mapping[str, Any] | None = None) -> str:
    """What ``make gpu`` found when it was last run on a GPU, or that it was not."""
    if found is None:
        if not (RESULTS / "gpu.json").exists():
            return "`make gpu` has not been run on a GPU with this version.\n"
        found = _result("gpu")
    checks, place = found["checks"], found["environment"]
    counts = Counter(check["status"] for check in checks)
    versions = ", ".join(f"{name} {place[name.lower()]}" for name in ("torch", "Triton", "CUDA", "lightning", "Python"))
    text = f"Run on {place['date']} on one {place['device']}, {versions}, commit {place['commit']} "
    text += f"(`{place['command']}`): "
    text += ", ".join(f"{counts[s]} {s}" for s in ("passed", "failed", "skipped", "not judged") if counts[s]) + ".\n"
    bars = [
        (check["check"], bar["what"], f"{bar['value']:g}", bar["bar"], _HOLDS[bar["holds"]])
        for check in checks
        for bar in check.get("bars", ())
        if "bar" in bar
    ]
    text += f"\n### Bars\n\n{table(('check', 'what', 'found', 'bar', 'holds'), bars)}" if bars else ""
    held = [
        (part, sum(bar["holds"] is True for bar in own), sum(bar["holds"] is False for bar in own))
        for part in dict.fromkeys(check["part"] for check in checks)
        if (own := [b for c in checks if c["part"] == part for b in c.get("bars", ()) if "bar" not in b])
    ]
    text += f"\n### What must hold on any device\n\n{table(('part', 'holds', 'does not'), held)}" if held else ""
    text += _gpu_exceptions(checks)
    figures = [
        (check["check"], name, _cell(value))
        for check in checks
        if check["part"] in ("timing", "kernels", "launches")
        for name, value in check.get("figures", {}).items()
    ]
    return text + (f"\n### Figures\n\n{table(('check', 'what', 'found'), figures)}" if figures else "")


def gpu_draft_tables() -> str:
    """What the first checks on a GPU found, before the faults they showed were mended; and the kernels' times there."""
    found, kernels = _result("gpu_draft"), _result("kernels")
    checks, place = found["checks"], found["environment"]
    failed = [check["check"] for check in checks if not check["ok"]]
    versions = ", ".join(f"{name} {place[name.lower()]}" for name in ("torch", "Triton", "CUDA", "lightning", "Python"))
    text = f"{len(checks)} checks on {place['date']} on one {place['device']}, {versions}, commit {place['commit']}: "
    text += (
        f"{len(checks) - len(failed)} passed, {len(failed)} failed ({', '.join(f'`{name}`' for name in failed)}).\n\n"
    )
    rows = [
        (f"gradient statistics, {row['gradients']} and {row['previous']}", row["method"], f"{row['milliseconds']:.3g}")
        for row in kernels["results"]["gradient_stats"]
    ]
    rows += [
        (f"Gram product, {row['dtype']}, side {row['side']}", row["method"], f"{row['milliseconds']:.3g}")
        for row in kernels["results"]["gram"]
    ]
    rows += [
        (f"polar factor, {' x '.join(map(str, row['shape']))}", row["method"], f"{row['milliseconds']:.3g}")
        for row in kernels["results"]["polar"]
    ]
    return f"{text}{table(('what', 'method', 'ms'), rows)}"


_HOLDS = {True: "yes", False: "**no**", None: "not judged"}


def _gpu_exceptions(checks: list[dict[str, Any]]) -> str:
    """The checks that failed, with what did not hold, and those that were not made, with the reason."""
    rows = []
    for check in checks:
        if check["status"] in ("failed", "skipped"):
            missed = [bar["what"] for bar in check.get("bars", ()) if bar["holds"] is False]
            why = "; ".join([*missed, _cell(check.get("reason", "").partition(" | ")[0])])
            rows.append((check["check"], check["status"], why.strip("; ")))
    return f"\n### Failed and skipped\n\n{table(('check', 'result', 'why'), rows)}" if rows else ""


def _cell(value: object) -> str:
    """A value in a cell of a table."""
    if isinstance(value, Mapping):
        value = ", ".join(f"{name} {_cell(v)}" for name, v in value.items())
    elif isinstance(value, list):
        value = ", ".join(map(_cell, value))
    return " ".join(str(value).replace("|", "/").replace("<", "(").replace(">", ")").split())[:300]


# Commands


def command_help() -> str:
    """What ``--help`` says."""
    parser = argparse.ArgumentParser(prog="dynamon")
    commands = parser.add_subparsers()
    for command in cli.COMMANDS:
        command.add_parser(commands)
    found = commands.choices.items()
    return "".join(f"## dynamon {name}\n\n```text\n{one.format_help()}```\n\n" for name, one in found)


# Examples


def source_hash(script: Path) -> str:
    """What tells one version of a script from another."""
    return hashlib.sha256(script.read_bytes()).hexdigest()[:16]


def gallery_page(script: Path, runs: Mapping[str, Any]) -> str:
    """Docstring, picture, what it printed, code.

    Raises:
        ValueError: Where picture and output are of another version of the script.
    """
    code, name = script.read_text(), script.stem
    run = runs["scripts"].get(name)
    if run is None or run["source"] != source_hash(script):
        raise ValueError(f"examples/{name}.py has changed since its output was recorded: run `make gallery`.")
    title, _, text = (ast.get_docstring(ast.parse(code)) or "").partition("\n")
    where = f"*Printed under {runs['environment']}.*"
    return (
        f"# {title.rstrip('.')}\n{_as_markdown(text)}\n\n![{title}]({name}.png)\n\n## What it prints\n\n"
        f"```text\n{run['printed']}```\n\n{where}\n\n## The script\n\n`examples/{name}.py`\n\n```python\n{code}```\n"
    )


def _as_markdown(text: str) -> str:
    return text.replace("``", "`")


TABLES: dict[str, Callable[[], str]] = {
    "keys": key_tables,
    "presets": preset_table,
    "cost": cost_table,
    "readings": readings_table,
    "activations": activations_table,
    "sharpness": sharpness_table,
    "spectra": spectra_table,
    "precision": precision_table,
    "tracking": tracking_table,
    "adaptive": adaptive_tables,
    "sentinel_cost": sentinel_cost,
    "steering_cost": steering_cost,
    "faults": fault_tables,
    "radii": radii_table,
    "guard": guard_table,
    "distributed": distributed_table,
    "gpu": gpu_tables,
    "gpu_draft": gpu_draft_tables,
    "commands": command_help,
}
