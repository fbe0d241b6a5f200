"""With what people put around a Trainer: LightningCLI, loggers of several kinds, the other import."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.loggers.logger import rank_zero_experiment

import dynamon.callbacks
from dynamon.callbacks import DynamicsMonitor, GradientMonitor, NoiseAdaptiveLR
from tests.helpers import Classifier, fit, mlp, same_weights

QUIET = [
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.accelerator=cpu",
    "--trainer.limit_val_batches=0",
]
CALLBACKS = {
    "DynamicsMonitor": ("preset", "full"),
    "SharpnessMonitor": ("quantities", ["hessian"]),
    "GradientMonitor": ("every_n_steps", 7),
    "WeightMonitor": ("convolutions", True),
    "NoiseAdaptiveLR": ("floor", 0.5),
}


@pytest.fixture(autouse=True)
def no_arguments_of_pytest(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])


def cli(arguments: list[str], run: bool = False) -> LightningCLI:
    return LightningCLI(
        BoringModel, BoringDataModule, args=arguments, run=run, save_config_callback=None, seed_everything_default=1
    )


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_is_found_by_its_short_name(name: str) -> None:
    argument, value = CALLBACKS[name]
    made = cli([f"--trainer.callbacks+={name}", f"--trainer.callbacks.{argument}={value}", *QUIET])
    (callback,) = [c for c in made.trainer.callbacks if isinstance(c, getattr(dynamon.callbacks, name))]
    own = {"floor": lambda c: c.rule.floor, "preset": lambda c: c.preset}
    assert argument not in own or own[argument](callback) == value


@pytest.mark.slow
def test_a_run_from_the_command_line(tmp_path) -> None:
    """As a configuration file written by --print_config, read again and run."""
    program = (
        "import dynamon.callbacks\n"
        "from lightning.pytorch.cli import LightningCLI\n"
        "from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel\n"
        "if __name__ == '__main__':\n"
        "    LightningCLI(BoringModel, BoringDataModule)\n"
    )
    script = tmp_path / "train.py"
    script.write_text(program)
    arguments = ["--trainer.callbacks+=DynamicsMonitor", "--trainer.callbacks.every_n_steps=2", *QUIET]
    arguments += ["--trainer.callbacks+=NoiseAdaptiveLR", "--trainer.callbacks.floor=0.5", "--trainer.max_steps=4"]
    command = [sys.executable, str(script), "fit"]
    printed = subprocess.run([*command, *arguments, "--print_config"], capture_output=True, text=True, cwd=tmp_path)
    assert printed.returncode == 0, printed.stderr
    config = yaml.safe_load(printed.stdout)
    paths = [callback["class_path"] for callback in config["trainer"]["callbacks"]]
    assert paths == ["dynamon.callbacks.DynamicsMonitor", "dynamon.callbacks.NoiseAdaptiveLR"]
    assert config["trainer"]["callbacks"][1]["init_args"]["floor"] == 0.5
    (tmp_path / "chosen.yaml").write_text(printed.stdout)
    done = subprocess.run([*command, "--config", "chosen.yaml"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "`max_steps=4` reached" in done.stdout + done.stderr


@pytest.mark.parametrize("name", CALLBACKS)
def test_help_shows_the_arguments_and_what_they_do(name: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli([f"--trainer.callbacks.help=dynamon.callbacks.{name}"])
    shown = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    expected = {
        "DynamicsMonitor": "Share of training time that monitoring may take; None for no limit",
        "SharpnessMonitor": "What to measure, from the table above",
        "GradientMonitor": "Measure at every step that is a multiple of this",
        "WeightMonitor": "Bound the norm of each convolution as a map of whole inputs",
        "NoiseAdaptiveLR": "Smallest ratio, in (0, 1]",
    }
    assert expected[name] in shown


def test_the_csv_logger_holds_all_readings(tmp_path) -> None:
    """One row a step with our columns and the user's; a new quantity in mid-run rewrites the file's header."""
    logger = CSVLogger(tmp_path, name="csv", version=0, flush_logs_every_n_steps=3)
    monitor, steering = DynamicsMonitor(every_n_steps=2, strict=True), NoiseAdaptiveLR(warmup=2)
    fit(Classifier(mlp()), [monitor, steering], logger=logger)
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    for tag in ("gradient/norm", "noise/dual_median", "sharpness/stability_ratio", "weight/operator_p90", "lr/base"):
        history = (steering if tag.startswith("lr/") else monitor).history
        found = {int(row["step"]): float(row[tag]) for row in rows if row.get(tag)}
        if tag in history:
            assert found == pytest.approx(dict(zip(history[tag].steps.tolist(), history[tag].values, strict=True)))
        assert len(found) >= 8, tag
    assert all(row["train/loss"] for row in rows if int(row["step"]) % 2 == 1 and row["train/loss"])
    assert any("gradient.dual/network.0.weight" in row for row in rows)


class FakeRun:
    """What Lightning's WandbLogger calls of a run of wandb: steps that go back are dropped, as wandb drops them."""

    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.defined: list[tuple] = []
        self.summary: dict = {}

    def define_metric(self, name: str, **settings) -> None:
        self.defined.append((name, settings))

    def log(self, values: dict, step: int | None = None, commit: bool | None = None) -> None:
        for key, value in values.items():
            assert isinstance(key, str) and isinstance(value, int | float), (key, value)
        self.rows.append(dict(values))
        self.summary.update(values)


class FakeWandbLogger(Logger):
    """Lightning's WandbLogger without wandb: the step travels as ``trainer/global_step``, nothing is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.run: FakeRun | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> FakeRun:
        if self.run is None:
            self.run = FakeRun()
            self.run.define_metric("trainer/global_step")
            self.run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return self.run

    @property
    def name(self) -> str:
        return "offline"

    @property
    def version(self) -> str:
        return "0"

    def log_hyperparams(self, params, *_, **__) -> None:
        pass

    def log_metrics(self, metrics, step=None) -> None:
        values = dict(metrics)
        self.experiment.log(values if step is None else {**values, "trainer/global_step": step})


def test_a_logger_in_the_manner_of_wandb() -> None:
    """Plain numbers by step, chosen by a part of its class name; steps never go back."""
    plain, module, logger = Classifier(mlp()), Classifier(mlp()), FakeWandbLogger()
    fit(plain, [])
    monitor = DynamicsMonitor("standard", every_n_steps=2, loggers=["wandb"], strict=True)
    fit(module, [monitor], logger=logger)
    assert same_weights(plain, module)
    steps = [row["trainer/global_step"] for row in logger.experiment.rows]
    assert steps == sorted(steps)
    for tag in ("gradient/norm", "sharpness/stability_ratio", "dynamon/overhead"):
        rows = [row for row in logger.experiment.rows if tag in row]
        assert [row["trainer/global_step"] for row in rows[:1]] == [int(monitor.history[tag].steps[0])]
        assert len(rows) >= len(monitor.history[tag])
    with pytest.raises(ValueError, match="matches no logger of the Trainer, which has: FakeWandbLogger"):
        fit(Classifier(mlp()), [DynamicsMonitor(loggers=["tensorboard"])], logger=FakeWandbLogger())


class InMemory(Logger):
    """Keeps what it is given."""

    name = version = "memory"

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict]] = []

    def log_metrics(self, metrics, step=None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params, *_, **__) -> None:
        pass


def test_an_in_memory_logger_has_what_the_history_has() -> None:
    logger, monitor = InMemory(), GradientMonitor(every_n_steps=3, strict=True)
    fit(Classifier(mlp()), [monitor], logger=logger)
    ours = [(step, row) for step, row in logger.rows if "gradient/norm" in row]
    assert [step for step, _ in ours] == monitor.history["gradient/norm"].steps.tolist()
    assert [row["gradient/norm"] for _, row in ours] == monitor.history["gradient/norm"].values.tolist()
    assert all(isinstance(value, float) for _, row in ours for value in row.values())


def test_the_users_own_numbers_are_the_same_with_us_in_the_trainer() -> None:
    """Loss by step in the user's logger, and their metrics in callback_metrics."""
    found = []
    for callbacks in ([], [DynamicsMonitor(every_n_steps=2), NoiseAdaptiveLR(floor=1.0)]):
        logger = InMemory()
        run = fit(Classifier(mlp(0.2)), callbacks, logger=logger)
        losses = [(step, row["train/loss"]) for step, row in logger.rows if "train/loss" in row]
        found.append((losses, float(run.callback_metrics["train/loss"])))
    assert found[0] == found[1] and len(found[0][0]) == 20


@pytest.mark.parametrize("name", [*CALLBACKS, "LayerwiseLR"])
def test_the_other_import_is_refused_with_the_fix(name: str, tmp_path) -> None:
    """pytorch_lightning has classes of its own under the same names."""
    import pytorch_lightning
    from pytorch_lightning.demos.boring_classes import BoringModel as OtherModel

    from dynamon.rates import FixedRates

    made = (
        dynamon.callbacks.LayerwiseLR(FixedRates({})) if name == "LayerwiseLR" else getattr(dynamon.callbacks, name)()
    )
    run = pytorch_lightning.Trainer(
        callbacks=[made],
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=tmp_path,
    )
    with pytest.raises(TypeError) as refused:
        run.fit(OtherModel())
    assert str(refused.value) == (
        f"{name} works with lightning.pytorch, but this Trainer comes from pytorch_lightning; change its import to "
        "'import lightning.pytorch as pl'."
    )
    assert isinstance(made, Callback) and torch.is_grad_enabled()


def test_hooks_and_start_up_are_in_the_stated_overhead() -> None:
    monitor = DynamicsMonitor(every_n_steps=1000)
    fit(Classifier(mlp()), [monitor], steps=10)
    spent = monitor._budget.spent_on
    assert spent["hooks"] > 0 and monitor._budget.spent == pytest.approx(sum(spent.values()))
