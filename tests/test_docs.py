"""The documentation builds without a warning and without the network, and its code runs as it stands."""

import doctest
import importlib
import pkgutil
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import dynamon
from dynamon.callbacks import DynamicsMonitor
from dynamon.cli import main
from dynamon.quantities import REGISTRY
from tests.helpers import Classifier, batches, mlp, trainer

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))
import generated  # noqa: E402

PAGES = sorted(p for p in DOCS.rglob("*.md") if "generated" not in p.parts and p.parent.name != "gallery")
GROUPS = "|".join({one.group for one in REGISTRY.values()})
ENDINGS = ("", "_p10", "_median", "_p90")


def blocks(page: Path, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", "-b", "html", str(DOCS), str(folder)]
    built = subprocess.run([*command, "-d", str(folder / ".doctrees")], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def html(site: Path) -> Iterator[tuple[str, str]]:
    for page in site.rglob("*.html"):
        yield page.relative_to(site).as_posix(), page.read_text()


@pytest.mark.slow
def test_it_builds_with_warnings_as_errors(site) -> None:
    names = {name for name, _ in html(site)}
    assert {"index.html", "quantities.html", "comparison.html", "reference/tags.html"} <= names
    assert {f"gallery/{script.stem}.html" for script in generated.EXAMPLES.glob("*.py")} <= names


@pytest.mark.slow
def test_a_page_needs_no_network(site) -> None:
    for name, text in html(site):
        loaded = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=\"(?:https?:)?//[^>]*>", text)
        assert loaded == [], name
    for style in (site / "_static").rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style.read_text()), style


@pytest.mark.slow
def test_formulas_and_tables_of_docstrings_are_drawn(site) -> None:
    text = (site / "reference" / "rates.html").read_text()
    assert "<mfrac>" in text and "\\frac" not in text and ":math:" not in text and "=====" not in text


@pytest.mark.slow
def test_every_monitor_and_its_tables_are_in_the_reference(site) -> None:
    text = (site / "reference" / "callbacks.html").read_text()
    for name in ("DynamicsMonitor", "SharpnessMonitor", "NoiseAdaptiveLR", "Meter"):
        assert f'id="dynamon.callbacks.{name}"' in text
    keys = (site / "reference" / "tags.html").read_text()
    assert all(tag in keys for tag in REGISTRY)


def test_every_key_has_a_meaning() -> None:
    text = (DOCS / "quantities.md").read_text()
    families = {tag for tag in REGISTRY if tag.endswith(("_upper", "_residual", "_unconverged"))}
    missing = [tag for tag in REGISTRY if f"`{tag}`" not in text and tag not in families]
    assert missing == []


def test_units_are_those_of_the_registry() -> None:
    text = (DOCS / "quantities.md").read_text().split("## The health list")[0]
    rows = re.findall(r"^\| `([a-z]+/[a-z0-9_]+)` \| [^|]+ \| ([^|]*)\|$", text, re.M)
    assert len(rows) > 60
    assert {tag: unit.strip() for tag, unit in rows if REGISTRY[tag].unit != unit.strip()} == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_name_only_keys_that_exist(page) -> None:
    known = {tag + ending for tag in REGISTRY for ending in ENDINGS}
    named = set(re.findall(rf"`((?:{GROUPS})/[a-z0-9_]+)`", page.read_text()))
    assert named - known - health_rules() == set()


def health_rules() -> set[str]:
    """The names that findings can have, as the source says them."""
    sources = "".join(path.read_text() for path in (ROOT / "dynamon" / "health").glob("*.py"))
    return set(re.findall(r'Finding\(\s+"([a-z]+/[a-z_]+)"', sources))


def test_every_health_rule_is_explained() -> None:
    section = (DOCS / "quantities.md").read_text().split("## The health list")[1]
    assert set(re.findall(r"^\| `([a-z]+/[a-z_]+)`", section, re.M)) == health_rules()


def test_tables_of_the_comparison_are_those_of_the_benchmarks() -> None:
    found = generated._result("sharpness")
    table = generated.sharpness_table()
    assert table.count("| PyHessian |") == len(found["cells"])
    times = [cell["methods"]["curvlinops eigsh"]["times dynamon cold"] for cell in found["cells"]]
    assert all(f"| {ratio:.2f} |" in table for ratio in times)


def test_sentences_of_the_comparison_hold_in_the_benchmarks() -> None:
    """What the page says beside the tables, since a new measurement may change it."""
    cells = {(cell["model"], cell["stage"]): cell["methods"] for cell in generated._result("sharpness")["cells"]}
    peer, ours = cells["MLP", "mid"]["PyHessian"], cells["MLP", "mid"]["dynamon cold"]
    assert peer["times dynamon cold"] <= 1.05 and abs(peer["relative errors"][0]) > abs(ours["relative errors"][0])
    assert all(
        m["eigenthings Lanczos 20"]["products"][0] <= m["dynamon cold certified"]["products"][0] for m in cells.values()
    )
    resnet = next(r for r in generated._result("spectra")["results"] if r["name"] == "ResNet-50")
    faster = {row["method"]: row["times_faster"] for row in resnet["rows"]}
    assert faster["torch spectral_norm"] > faster["refresh"]


def test_contributing_names_every_folder_and_no_file_that_is_not_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    folders = {folder.parent.name for folder in (ROOT / "dynamon").glob("*/__init__.py")}
    assert {name for name in folders if f"| `dynamon/{name}/` |" not in text} == set()
    named = set(re.findall(r"`((?:callbacks|docs|dynamon|kernels|tests|examples|benchmarks)/[\w/.]*)`", text))
    assert len(named) > 40 and {name for name in named if not (ROOT / name).exists()} == set()


def test_a_changed_example_asks_for_a_new_recording(tmp_path) -> None:
    script = tmp_path / "edge_of_stability.py"
    script.write_text((generated.EXAMPLES / "edge_of_stability.py").read_text() + "\n")
    runs = {"environment": "", "scripts": {"edge_of_stability": {"source": "another", "printed": ""}}}
    with pytest.raises(ValueError, match="run `make gallery`"):
        generated.gallery_page(script, runs)


def prelude() -> dict[str, Any]:
    """What pages may speak of without saying where it comes from."""
    torch.manual_seed(0)
    network, data = mlp(), batches(count=512)
    return {
        "network": network,
        "model": Classifier(network),
        "data": data,
        "batch": next(iter(data)),
        "loss_fn": lambda module, batch: cross_entropy(module(batch[0]), batch[1]),
        "trainer": lambda callbacks, **given: trainer(callbacks, steps=60, **given),
        "DynamicsMonitor": DynamicsMonitor,
    }


@pytest.fixture
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page) and page.stem != "index"], ids=lambda page: page.stem
)
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:DynamicsMonitor. Step 50 is a spike")
def test_code_blocks_run(page, tmp_path, monkeypatch, one_process) -> None:
    monkeypatch.chdir(tmp_path)
    names = prelude()
    for number, block in enumerate(blocks(page)):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)  # noqa: S102


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_the_first_page_leads_to_panels(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    use, model, look = blocks(DOCS / "index.md")
    names: dict[str, Any] = {}
    for block in (model, use, look):
        exec(compile(block, "index.md", "exec"), names)  # noqa: S102
    assert names["trainer"].global_step == 200
    assert len(names["monitor"].history["sharpness/stability_ratio"]) >= 15
    commands = [line for block in blocks(DOCS / "index.md", "bash") for line in block.splitlines()]
    reports = [shlex.split(line)[1:] for line in commands if line.startswith("dynamon ")]
    assert "tensorboard --logdir lightning_logs" in commands and len(reports) == 2
    assert [main(report) for report in reports] == [0, 0]
    assert (tmp_path / "report.html").stat().st_size > 50_000
    assert "stability ratio" in capsys.readouterr().out


def test_examples_in_docstrings_run() -> None:
    optimizer = torch.optim.SGD(mlp().parameters(), lr=0.1)
    names = {"optimizer": optimizer, "LambdaLR": torch.optim.lr_scheduler.LambdaLR, "schedule": [0.5, 1.0, 0.0]}
    found = [m.name for m in pkgutil.walk_packages(dynamon.__path__, "dynamon.") if not m.name.endswith("__main__")]
    modules = [importlib.import_module(name) for name in found]
    results = [doctest.testmod(module, extraglobs=names, verbose=False) for module in modules]
    assert sum(r.failed for r in results) == 0 and sum(r.attempted for r in results) >= 1


def test_each_page_shows_pictures_that_are_there() -> None:
    for page in PAGES:
        for image in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text()):
            assert (page.parent / image).read_bytes()[:4] == b"\x89PNG", image


def test_the_gallery_lists_every_example() -> None:
    text = (DOCS / "gallery" / "index.md").read_text()
    assert all(f"]({script.stem}.md)" in text for script in generated.EXAMPLES.glob("*.py"))


def test_the_table_of_gpu_checks_says_what_was_found() -> None:
    names = ("device", "torch", "triton", "cuda", "lightning", "python", "commit", "command", "date")
    bars = [
        {"what": "share of a step", "value": 0.03, "bar": "<= 0.02", "holds": False},
        {"what": "bitwise equal", "holds": True},
    ]
    checks = [
        {
            "check": "steering",
            "part": "timing",
            "status": "failed",
            "seconds": 1.0,
            "bars": bars,
            "figures": {"ms": [1, 2]},
        },
        {"check": "two GPUs", "part": "hazards", "status": "skipped", "seconds": 0.0, "reason": "one | GPU"},
    ]
    text = generated.gpu_tables({"environment": {name: f"a {name}" for name in names}, "checks": checks})
    assert "on one a device, torch a torch, Triton a triton" in text and "1 failed, 1 skipped" in text
    assert "| steering | share of a step | 0.03 | <= 0.02 | **no** |" in text and "| timing | 1 | 0 |" in text
    assert "| two GPUs | skipped | one |" in text and "| steering | ms | 1, 2 |" in text
