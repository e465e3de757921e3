"""The wheel: four packages, nothing else, working with the sources gone in a project with its own `workers/`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"complete_fn", "complete_fn_connectors", "complete_fn_sql", "complete_fn_workers"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources that is deleted afterwards."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "sources"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(copy)]
    subprocess.run(command, check=True, capture_output=True)
    shutil.rmtree(copy)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and this environment's libraries, but not its editable install."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # A path named in a .pth file is not itself searched for .pth files, so the editable install stays out.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def test_the_wheel_holds_exactly_the_four_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.partition("/")[0] for name in archive.namelist()}
    assert {t for t in tops if not t.endswith(".dist-info")} == PACKAGES


def test_the_wheel_brings_model_lock_catalogue_and_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    for wanted in (
        "complete_fn/engines/models.toml",
        "complete_fn_workers/engine.lock",
        "complete_fn_workers/models/demo-llama/model.safetensors",
        "complete_fn_workers/models/demo-llama/README.md",
        "complete_fn_workers/models/demo-llama-swiftkv/model.safetensors",
        "complete_fn_workers/models/demo-llama-swiftkv/distill.json",
    ):
        assert wanted in names
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert wheel.stat().st_size < 28e6


def test_it_answers_in_a_project_that_has_workers_and_connectors_of_its_own(python: Path, tmp_path: Path) -> None:
    for name in ("workers", "connectors", "sql"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the user's own package was imported')\n")
    code = f"""
import duckdb, complete_fn, complete_fn_workers
from complete_fn_connectors.duckdb import register
assert not complete_fn.__file__.startswith({str(ROOT)!r}), complete_fn.__file__
con = duckdb.connect()
register(con, engine=complete_fn.EchoEngine(), home={str(tmp_path / "home")!r})
print(con.sql("SELECT complete('any', 'hello table')").fetchall()[0][0])
"""
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "hello table", done.stderr


def test_the_console_script_and_the_vllm_plugin_are_declared(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith("entry_points.txt"))
        text = archive.read(name).decode()
    assert "complete-fn = complete_fn.cli.main:main" in text
    assert "[vllm.general_plugins]" in text
