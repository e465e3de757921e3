"""A port that does not exist is refused wherever one can be named, as the system would take it modulo 65,536."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from complete_fn import Client, Session
from complete_fn.cli.main import FAULT, main
from complete_fn.engines.catalogue import Model
from complete_fn.engines.http_engine import open_engine
from complete_fn.engines.pool import at_engine
from complete_fn.errors import CompleteError
from complete_fn.jobs.queue import celery_app
from complete_fn.ports import LAST_PORT, has_port, is_port
from complete_fn.rows.databases import open_database
from complete_fn.settings import load_settings
from complete_fn.store.store import Store

ROOT = Path(__file__).parents[2]
WRONG = (str(LAST_PORT + 1), "70000")  # 70000 is 4464 modulo 65,536
SECRET = "hidden"


@pytest.mark.parametrize("port", [*WRONG, "-1", "web", "80.5"])
def test_serve_refuses_a_port_that_does_not_exist(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", port]) == FAULT
    assert f"--port: '{port}' is no port; a port is a whole number from 0 to 65535" in capsys.readouterr().err


@pytest.mark.parametrize("port", WRONG)
def test_make_service_refuses_it_before_anything_starts(port: str) -> None:
    script = str(ROOT / "deploy" / "service.py")
    done = subprocess.run([sys.executable, script, "--port", port], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"'{port}' is no port" in done.stderr


def store_at(port: str) -> object:
    return Store(f"postgresql://u:{SECRET}@127.0.0.1:{port}/d")


TAKERS: dict[str, Callable[[str], object]] = {
    "a session's engine": lambda port: at_engine(Model("m", "m"), f"http://127.0.0.1:{port}/v1"),
    "a model's url": lambda port: open_engine(Model("m", "m", url=f"http://127.0.0.1:{port}/v1"), load_settings()),
    "a client": lambda port: Client(f"http://127.0.0.1:{port}"),
    "the broker": lambda port: celery_app(f"redis://u:{SECRET}@127.0.0.1:{port}/0"),
    "the store": store_at,
    **{
        f"rows in {kind}": lambda port, kind=kind: open_database(f"{kind}://u:{SECRET}@127.0.0.1:{port}/d")
        for kind in ("postgresql", "mysql", "mariadb")
    },
}


@pytest.mark.parametrize("port", WRONG)
@pytest.mark.parametrize("taker", TAKERS)
def test_a_url_with_such_a_port_is_refused_before_anything_is_sent(taker: str, port: str) -> None:
    with pytest.raises(CompleteError, match="a port is a whole number from 0 to 65535") as caught:
        TAKERS[taker](port)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("verb", [["jobs", "list", "--url", "http://127.0.0.1:70000"], ["worker", "--broker"]])
def test_the_shell_refuses_it_in_the_url_of_a_flag(
    verb: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMPLETE_FN_HOME", str(tmp_path))
    given = [*verb, "redis://127.0.0.1:70000/0"] if verb[-1] == "--broker" else verb
    assert main(given) == FAULT
    assert "a port is a whole number from 0 to 65535" in capsys.readouterr().err


def test_a_session_refuses_it_before_the_first_row(tmp_path: Path) -> None:
    session = Session(engine="http://127.0.0.1:70000/v1", home=tmp_path)
    with pytest.raises(CompleteError, match="a port is a whole number"):
        session.complete("m", ["one"])
    session.close()


def test_ports_at_the_ends_and_urls_without_one_are_taken() -> None:
    assert all(map(is_port, (None, 0, LAST_PORT)))
    assert all(map(has_port, ("http://h", "http://h:0/v1", f"redis://:p@h:{LAST_PORT}/0", "http://[::1]:8000", "h:x")))
    assert not any(map(has_port, ("http://h:65536", "http://h:-1", "http://h:web", "redis://:p@h:99999/0")))


def test_a_database_url_whose_port_is_no_number_is_told_without_it() -> None:
    with pytest.raises(CompleteError, match="cannot be read") as caught:
        open_database(f"mysql://u:{SECRET}@h:web/d")
    assert SECRET not in str(caught.value)
