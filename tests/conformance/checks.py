"""Run a cell of the table, and what must hold in every one."""

import copy
import importlib
import io
import random
import re
from collections import deque
from functools import cache, reduce
from operator import or_
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from torch.utils._python_dispatch import TorchDispatchMode

import dynamon.callbacks
from dynamon.callbacks import Monitor
from dynamon.callbacks.lightning.callback import DynamonCallback
from dynamon.quantities import ALWAYS, REGISTRY, Condition, quantities_of
from tests.conformance.subjects import MODELS, Data, MemoryLogger, Subject, Witness, is_users, loss_fn, metric_states
from tests.conformance.tables import CALLBACKS, SETUPS, STEPS, Cell
from tests.helpers import documented

READINGS = 5
SHARED = {one.tag for one in quantities_of("monitor")}


def callbacks_of(cell: Cell) -> list[DynamonCallback]:
    """New callbacks of the cell's row."""
    return [getattr(dynamon.callbacks, name)(**_built(arguments)) for name, arguments in _row(cell)]


def _row(cell: Cell) -> list[tuple[str, dict[str, Any]]]:
    """Names and arguments, with a ``loss_fn`` where monitors cannot call ``training_step``."""
    by_hand = optimizers_of(cell) > 1 or SETUPS[cell.setup].subject.get("manual", False)
    extra = {"loss_fn": "tests.conformance.subjects.loss_fn"} if by_hand else {}
    takes = ("ActivationMonitor", "SharpnessMonitor", "DynamicsMonitor", "RateAdvisor")
    return [
        (n, {**arguments, **extra} if n in takes or "BalancedRates" in str(arguments) else arguments)
        for n, arguments in CALLBACKS[cell.callback].classes
    ]


def _built(value: Any) -> Any:
    """What a LightningCLI makes of the entries of a configuration."""
    if isinstance(value, dict) and "class_path" in value:
        module, name = value["class_path"].rsplit(".", 1)
        return getattr(importlib.import_module(module), name)(**value["init_args"])
    if isinstance(value, dict):
        return {k: loss_fn if k == "loss_fn" else _built(v) for k, v in value.items()}
    return value


def optimizers_of(cell: Cell) -> int:
    """How many there are."""
    return max(MODELS[cell.model].parts, SETUPS[cell.setup].subject.get("optimizers", 1))


class Outcome:
    """All that a run leaves behind and that dynamon may not touch."""

    def __init__(self, trainer: pl.Trainer, subject: Subject, witness: Witness, logger: MemoryLogger | None) -> None:
        self.left = {
            "weights": {k: v.clone() for k, v in subject.state_dict().items()},
            "optimizers": copy.deepcopy([optimizer.state_dict() for optimizer in trainer.optimizers]),
            "streams, order and metrics by batch": witness.seen,
            "counters": [subject.calls, subject.collected],
            "torchmetrics": metric_states(subject),
            "logged": {k: float(v) for k, v in trainer.logged_metrics.items() if is_users(k)},
            "steps": [trainer.global_step, trainer.current_epoch, subject.training],
        }
        written = (
            [(step, {k: v for k, v in row.items() if is_users(k)}) for step, row in logger.written] if logger else []
        )
        self.left["written"] = [entry for entry in written if entry[1]]
        self.keys = {k for _, row in logger.written for k in row if not is_users(k)} if logger else set()
        self.batches = sum(1 for _ in witness.seen)


def run(cell: Cell, callbacks: list[DynamonCallback], root: Path) -> Outcome:
    """Train from a fixed seed."""
    torch._dynamo.reset()
    setup, witness = SETUPS[cell.setup], Witness()
    random.seed(0), np.random.seed(0), torch.manual_seed(3)
    memory = None if setup.loggers == "none" else MemoryLogger()
    loggers: Any = [memory] if memory else False
    if setup.loggers == "several":
        loggers = [memory, CSVLogger(root), TensorBoardLogger(root)]
    trainer = pl.Trainer(
        **_trainer_arguments(cell), callbacks=[*callbacks, witness], logger=loggers, default_root_dir=root
    )
    subject = Subject(cell.model, **setup.subject)
    trainer.fit(subject, Data(cell.model, "overfit_batches" not in setup.trainer, **setup.data))
    return Outcome(trainer, subject, witness, memory)


def _trainer_arguments(cell: Cell) -> dict[str, Any]:
    given = SETUPS[cell.setup].trainer
    arguments: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": STEPS,
        "max_epochs": -1,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        **given,
    }
    if given.get("precision") == "16-mixed":  # a scale at which none of these models overflows
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        arguments = {**arguments, "plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
        del arguments["precision"]
    if given.get("barebones"):
        arguments = {k: v for k, v in arguments.items() if k not in ("log_every_n_steps", "num_sanity_val_steps")}
    # Lightning counts the steps of all optimizers.
    for name in ("max_steps", "fast_dev_run"):
        if arguments.get(name, -1) > 0:
            arguments[name] *= optimizers_of(cell)
    return arguments


def run_by_cli(cell: Cell, root: Path, plain: bool) -> tuple[Outcome, list[DynamonCallback]]:
    """The same from a configuration."""
    witness = Witness()
    random.seed(0), np.random.seed(0), torch.manual_seed(3)
    paths = [{"class_path": f"dynamon.callbacks.{name}", "init_args": given} for name, given in _row(cell)]
    trainer = {
        **_trainer_arguments(cell),
        "callbacks": [] if plain else paths,
        "logger": {"class_path": "tests.conformance.subjects.MemoryLogger"},
        "default_root_dir": str(root),
    }
    cli = LightningCLI(
        Subject,
        Data,
        save_config_callback=None,
        seed_everything_default=False,
        trainer_defaults={"callbacks": [witness]},
        args={
            "subcommand": "fit",
            "fit": {"trainer": trainer, "model": {"model": cell.model}, "data": {"model": cell.model}},
        },
    )
    callbacks = [c for c in cli.trainer.callbacks if isinstance(c, DynamonCallback)]
    return Outcome(cli.trainer, cli.model, witness, cli.trainer.logger), callbacks


@cache
def plain(model: str, setup: str, root: Path) -> Outcome:
    """The run without dynamon."""
    cell = Cell(model, setup, next(iter(CALLBACKS)))
    return run_by_cli(cell, root, plain=True)[0] if SETUPS[setup].cli else run(cell, [], root)


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two nested structures differ, bit by bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        if list(one) != list(other):
            return [f"{path}: keys {list(one)} and {list(other)}"]
        return [d for k in one for d in differences(one[k], other[k], f"{path}/{k}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return [f"{path}: lengths {len(one)} and {len(other)}"]
        return [d for i, (a, b) in enumerate(zip(one, other, strict=True)) for d in differences(a, b, f"{path}[{i}]")]
    return [] if _same(one, other) else [f"{path}: {one!r:.80} and {other!r:.80}"]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    return type(one) is type(other) and (one == other or (one != one and other != other))


def check_neutral(cell: Cell, found: Outcome, expected: Outcome) -> None:
    """Nothing of the run is different."""
    if CALLBACKS[cell.callback].neutral:
        assert differences(found.left, expected.left) == []


def check_state(cell: Cell, callback: DynamonCallback) -> None:
    """The state survives a file that is loaded safely, and a callback that has it saves it again."""
    file = io.BytesIO()
    torch.save(callback.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    fresh = next(c for c in callbacks_of(cell) if type(c) is type(callback))
    fresh.load_state_dict(copy.deepcopy(loaded))
    assert differences(fresh.state_dict(), loaded) == []


def check_twice(callback: DynamonCallback, before: dict[str, Any]) -> None:
    """A second fit with the same object measures what the first did."""
    now = histories(callback)
    timed = ("dynamon/overhead", "dynamon/steering_overhead")
    assert (
        differences(
            {k: v for k, v in now.items() if k not in timed}, {k: v for k, v in before.items() if k not in timed}
        )
        == []
    )


def histories(callback: DynamonCallback) -> dict[str, Any]:
    """All readings, as plain lists."""
    return {tag: (s.steps.tolist(), s.values.copy(), s.layers) for tag, s in callback.history.items()}


def documented_by(callback: DynamonCallback) -> set[str]:
    """The tags in the tables of its docstring; DynamicsMonitor refers to those of the four others as well."""
    cls: type = type(callback)
    if cls is dynamon.callbacks.NoiseAdaptiveLR:
        cls = dynamon.callbacks.LayerwiseLR
    if cls is dynamon.callbacks.DynamicsMonitor:
        names = ("DynamicsMonitor", "GradientMonitor", "WeightMonitor", "SharpnessMonitor", "ActivationMonitor")
        return set().union(*(documented(getattr(dynamon.callbacks, name)) for name in names))
    return documented(cls)


def check_keys(cell: Cell, callbacks: list[DynamonCallback], outcome: Outcome) -> None:
    """Loggers and history hold documented keys only, and the same ones."""
    known = set().union(*(documented_by(c) for c in callbacks))
    history = {_quantity(tag) for c in callbacks for tag in c.history}
    written = {_quantity(key) for key in outcome.keys}
    assert history <= known
    assert written <= known
    if SETUPS[cell.setup].loggers != "none" and "fast_dev_run" not in SETUPS[cell.setup].trainer:
        assert {tag for tag in history if finite(callbacks, tag)} == written


def _quantity(key: str) -> str:
    """The documented tag of a scalar, a quantile across layers (``a/b_p10``) or a layer (``a.b/<layer>``)."""
    first = key.split("/")[0]
    return first.replace(".", "/") if "." in first else re.sub(r"_(p10|median|p90)$", "", key)


def finite(callbacks: list[DynamonCallback], tag: str) -> int:
    """How many readings of a tag hold a finite number."""
    series = [c.history[tag] for c in callbacks if tag in c.history]
    return sum(int(np.isfinite(s.values).reshape(len(s), -1).any(1).sum()) for s in series)


def check_readings(cell: Cell, callbacks: list[DynamonCallback]) -> None:
    """At least five finite readings of every documented tag that applies, and no failure."""
    if not SETUPS[cell.setup].measures:
        assert all(not c.history for c in callbacks)
        return
    for callback in callbacks:
        wanted = {tag for tag in _declared(callback) & documented_by(callback) if _applies(tag, cell, callback)}
        few = {tag: finite(callbacks, tag) for tag in wanted}
        few = {t: n for t, n in few.items() if n < (READINGS if REGISTRY[t].every == 1 else 1)}
        assert few == {}
        assert getattr(callback, "failures", 0) == 0


def _declared(callback: DynamonCallback) -> set[str]:
    if not isinstance(callback, Monitor):
        return {*callback.tags, *callback.quantities}
    return SHARED | {tag for m in callback._meters for tag in (*m.tags, *m.quantities)}


def _applies(tag: str, cell: Cell, callback: DynamonCallback) -> bool:
    """Whether a tag can be expected of a cell.

    Chance decides about signals, power laws and how the loss bends; :func:`check_solved` about eigenvalues, which have
    a twin for values that did not converge.
    """
    if tag == "noise/dual" and not isinstance(callback, Monitor) and not _follows_noise(cell):
        return False
    return REGISTRY[tag].condition in _conditions(cell)


def _conditions(cell: Cell) -> Condition:
    """What holds in a cell, as far as its row says."""
    setup, model, one = SETUPS[cell.setup], MODELS[cell.model], optimizers_of(cell) == 1
    name = model.optimizer[0]
    by_hand = not one or setup.subject.get("manual", False)
    wrapped = setup.subject.get("sam", False)  # nothing is known of the steps of a class that stands around another
    alone = one and not wrapped and name in ("SGD", "Adam", "AdamW", "RMSprop")
    holds = {
        Condition.AUTOMATIC: not by_hand,
        Condition.RETURNED_LOSS: not by_hand,
        Condition.KNOWN_SAMPLES: True,
        Condition.INDEPENDENT_GRADIENTS: cell.setup == "accumulation",
        Condition.DECOUPLED_DECAY: name == "AdamW" and (one or not model.sparse),
        Condition.COMPUTED_STEP: not wrapped and name in ("SGD", "Adam", "AdamW"),
        Condition.CONVOLUTIONS: cell.model.startswith("CNN") and cell.callback == "WeightMonitor",
        Condition.STABILITY_FORMULA: alone,
        Condition.KEEPS_STATE: name != "SGD" or bool(model.optimizer[1].get("momentum")),
        Condition.SECOND_MOMENT: one and name in ("Adam", "AdamW", "RMSprop"),
        Condition.ACTIVATION_FUNCTIONS: cell.model != "LSTM",
        Condition.ATTENTION: cell.model.startswith("transformer"),
        Condition.ONE_THRESHOLD: alone and name == "SGD",
    }
    return reduce(or_, (condition for condition, is_true in holds.items() if is_true), ALWAYS)


def _follows_noise(cell: Cell) -> bool:
    return all(name == "NoiseAdaptiveLR" for name, _ in CALLBACKS[cell.callback].classes)


def check_solved(callbacks: list[DynamonCallback]) -> None:
    """Every residual belongs to a value, converged or marked."""
    for tag in {t for c in callbacks for t in c.history if t.endswith("_residual")}:
        base = tag.removesuffix("_residual")
        assert finite(callbacks, base) + finite(callbacks, f"{base}_unconverged") == finite(callbacks, tag)


PACKAGE = Path(dynamon.callbacks.__file__).parents[1]
OWN_FILES = [str(PACKAGE / folder / "*") for folder in ("callbacks", "dynamon", "kernels")]


def fit_quietly(cell: Cell, callbacks: list[Any], steps: int) -> None:
    """Train for some steps and log nothing but what monitors measure."""
    random.seed(0), np.random.seed(0), torch.manual_seed(3)
    arguments = {**_trainer_arguments(cell), "max_steps": steps * optimizers_of(cell), "log_every_n_steps": 10_000}
    trainer = pl.Trainer(**arguments, callbacks=callbacks, logger=False)
    subject = Subject(cell.model, options={"foreach": True})  # the others read their count of steps on the host
    subject.collected = deque(maxlen=10)
    trainer.fit(subject, Data(cell.model))


class _Waits(TorchDispatchMode):
    """Counts the operations that make the host wait for the device."""

    OPERATIONS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.equal, torch.ops.aten.nonzero)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in self.OPERATIONS
        return func(*args, **(kwargs or {}))


class _ByStep(pl.Callback):
    def __init__(self, mode: _Waits) -> None:
        self.mode, self.counts = mode, []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.counts.append(self.mode.count)
        self.mode.count = 0


def waits_by_step(cell: Cell, callbacks: list[Any], steps: int = 24) -> list[int]:
    """How often the host waits for the device in each step, whoever makes it wait."""
    with _Waits() as mode:
        counter = _ByStep(mode)
        fit_quietly(cell, [*callbacks, counter], steps)
    return counter.counts
