"""What `complete-fn jobs` and `complete-fn serve` print, write and return with a service, kept in tests/golden/cli."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from complete_fn import EchoEngine
from tests.golden_files import Transcript, check_golden, environment, plain_environment
from tests.integration.server.conftest import Running

ASK = "jobs submit in.csv -m echo -p 'Say: {text}'"
JOBS = (
    "jobs list",
    f"{ASK} --idempotency-key k",
    "jobs wait <id>",
    "jobs show <id>",
    "jobs list",
    "jobs results <id> -o out.csv",
    "jobs results <id> -o out.csv",
    "jobs results <id> -o out.csv --overwrite --details",
    "jobs results <id> -o out.doc",
    "jobs cancel <id>",
    "jobs rerun <id>",
    "jobs deliver <id>",
    f"{ASK} --idempotency-key k --column said",
    f"{ASK} -o done.jsonl --column said --option max_tokens=2 --max-cost 1 --query-tag t",
    f"{ASK} -o done.jsonl",
    "jobs submit long.csv -m echo -p '{text}' --wait",
    "jobs submit in.csv -m nothing -p '{text}'",
    "jobs submit in.csv -m echo -p '{txt}'",
    "jobs submit in.csv -m echo -p '{text}' --option topp=1",
    "jobs submit in.csv -m echo -p '{text}' --option topp",
    "jobs submit in.csv -m echo -p '{text}' --max-cost much",
    "jobs submit s3://bucket/in.csv -m echo -p '{text}'",
    "jobs submit --connection crm --sql 'SELECT 1' -m echo -p '{text}'",
    "jobs submit in.csv -m echo -p '{text}' --sink-connection crm --sink-table t",
    "jobs delete <id>",
    "jobs show <id>",
    "jobs rerun nothing",
)


@pytest.fixture(autouse=True)
def no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_environment(monkeypatch, tmp_path)


def test_a_session_of_jobs_prints_writes_and_returns_what_it_did(
    serve: Callable[..., Running], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = serve(EchoEngine(64))
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "in.csv").write_text("id,text\n1,one\n2,\n3,two words\n4,one\n")
    (folder / "long.csv").write_text(f"text\n{'word ' * 70}\nfine\n")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COMPLETE_FN_URL", running.url)
    shell = Transcript(folder, capfd, {running.url: "<url>"})
    for command in JOBS:
        shell.run(command)
    check_golden("cli/jobs.txt", shell.text())


def test_serve_says_where_it_is_and_ends_well(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shell = Transcript(tmp_path, capfd)
    command = [sys.executable, "-m", "complete_fn", "serve", "--port", "0", "--home", str(tmp_path / "home")]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        line = child.stderr.readline()
        url = re.search(r"http://\S+(?=/v1)", line)
        assert url, line
        shell.names[url[0]] = "<url>"
        assert httpx.get(f"{url[0]}/healthz", timeout=60).json() == {"status": "ok"}
        child.send_signal(signal.SIGINT)
        rest = child.stderr.read()
        code = child.wait(60)
    shell.note("complete-fn serve --port 0 --home <folder>/home  # then Ctrl-C", code, "", line + rest)
    check_golden("cli/serve.txt", shell.text())
