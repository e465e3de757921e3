"""`complete-fn serve` and `complete-fn keys` as commands."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from complete_fn.cli.main import main


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [str(Path(sys.executable).with_name("complete-fn")), "serve", "--port", "0", "--home", str(tmp_path)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    line = child.stderr.readline()
    found = re.search(r"serves (http://\S+)/v1", line)
    assert found, line
    yield child, found[1]
    child.kill()
    child.wait()


def test_serve_answers_and_ends_on_sigterm(served: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    child, url = served
    assert httpx.get(f"{url}/readyz", timeout=100).status_code == 200
    assert main(["serve", "--port", "0", "--home", str(tmp_path)]) == 1
    assert "Another complete-fn serves from" in capsys.readouterr().err
    child.send_signal(signal.SIGTERM)
    assert child.wait(100) in (0, -signal.SIGTERM)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_public_address_needs_keys(host: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--host", host, "--port", "0", "--home", str(tmp_path)]) == 1
    assert "no API key exists" in capsys.readouterr().err


def test_an_address_that_cannot_be_listened_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--host", "203.0.113.1", "--home", str(tmp_path)]) == 1
    assert "cannot be listened on" in capsys.readouterr().err


def test_keys_are_made_listed_and_revoked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = ["--home", str(tmp_path)]
    assert main(["keys", "create", "--tenant", "acme", "--scopes", "jobs,usage", *home]) == 0
    key = capsys.readouterr().out.strip()
    assert main(["keys", "list", *home]) == 0
    listed = capsys.readouterr().out
    name, secret = key.split("-")[1:]
    assert secret not in listed
    assert secret.encode() not in (tmp_path / "state.sqlite3").read_bytes()
    assert re.search(rf"{name} +acme +service +jobs,usage .*valid", listed)
    assert main(["keys", "revoke", name, *home]) == 0
    assert main(["keys", "revoke", name, *home]) == 1
    main(["keys", "list", *home])
    assert "revoked" in capsys.readouterr().out


def test_a_limit_is_a_number_that_can_be_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = ["--home", str(tmp_path)]
    main(["keys", "create", "--tenant", "t", *home])
    for wrong in ("0", "9" * 20, "9" * 5_000, str(10**12 + 1), "²", "x"):
        assert main(["keys", "limit", "t", wrong, *home]) == 1
        assert "must be a whole number from 1 to 1,000,000,000,000, or 'none'" in capsys.readouterr().err
    for right in (str(10**12), "none"):
        assert main(["keys", "limit", "t", right, *home]) == 0


@pytest.mark.parametrize(
    "wrong", [["create", "--tenant", "a b"], ["create", "--tenant", "a", "--scopes", "root"], ["budget", "a", "-1"]]
)
def test_keys_refuses_what_cannot_be(wrong: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", *wrong, "--home", str(tmp_path)]) == 1
    assert "complete-fn: " in capsys.readouterr().err
