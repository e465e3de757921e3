"""`escape_formulas` in every way to get a CSV from a service or the shell, and nothing changed without it."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from complete_fn.cli.main import main
from complete_fn.client import Client

TEXT, NAME = "=cmd|' /C calc'!A0", "@name"
PLAIN = [["id", "text", NAME, "completion"], ["-1", TEXT, TEXT, TEXT]]
ESCAPED = [["id", "text", f"'{NAME}", "completion"], ["-1", *[f"'{TEXT}"] * 3]]


def cells(content: bytes | str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(content if isinstance(content, str) else content.decode())))


def written(path: Path) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([row[:3] for row in PLAIN])
    return path


def test_a_job_and_its_sink(
    serve: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMPLETE_FN_SINKS", str(tmp_path))
    running, source = serve(), written(tmp_path / "in.csv")
    with closing(Client(running.url)) as remote, running.http() as client:
        job = remote.submit(source, "echo", "{text}")
        job.wait(progress=False)
        for query, told in (({}, PLAIN), ({"escape_formulas": True}, ESCAPED)):
            reply = client.get(f"/v1/jobs/{job.id}/results", params={"format": "csv", **query})
            assert cells(reply.content) == told
        assert cells(b"".join(job.download("csv", escape_formulas=True))) == ESCAPED
        for kind in ("parquet", "jsonl"):
            reply = client.get(f"/v1/jobs/{job.id}/results", params={"format": kind, "escape_formulas": True})
            assert (reply.status_code, "is for CSV" in reply.text) == (400, True)
        sink = {"uri": f"{tmp_path}/out.csv", "escape_formulas": True}
        remote.submit(source, "echo", "{text}", sink=sink).wait(progress=False)
        assert [row[:4] for row in cells((tmp_path / "out.csv").read_text())] == ESCAPED
        body = {"model": "echo", "prompt": "{id}", "source": {"file_id": remote.upload(source)}}
        for wrong in (
            {**sink, "uri": f"{tmp_path}/out.jsonl"},
            {"connection": "c", "table": "t", **{"escape_formulas": True}},
        ):
            assert client.post("/v1/jobs", json=body | {"sink": wrong}).status_code == 400
    command = ["jobs", "results", job.id, "--url", running.url, "-o", str(tmp_path / "again.csv"), "--escape-formulas"]
    assert main(command) == 0
    assert cells((tmp_path / "again.csv").read_text()) == ESCAPED
    submit = ["jobs", "submit", str(source), "-m", "echo", "-p", "{text}", "--url", running.url]
    assert main([*submit, "--sink-uri", f"{tmp_path}/more.csv", "--escape-formulas", "--wait"]) == 0
    assert [row[:4] for row in cells((tmp_path / "more.csv").read_text())] == ESCAPED


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "models.toml").write_text('[models.echo]\ncheckpoint = "echo"\nengine = "echo"\nmax_model_len = 99\n')
    monkeypatch.setenv("COMPLETE_FN_MODELS", str(tmp_path / "models.toml"))
    run = [
        "run",
        "--home",
        str(tmp_path / "home"),
        "-m",
        "echo",
        "-p",
        "{text}",
        str(written(tmp_path / "in.csv")),
    ]
    for flags, told in (([], PLAIN), (["--escape-formulas"], ESCAPED)):
        assert main([*run, "-o", str(tmp_path / "out.csv"), "--overwrite", *flags]) == 0
        assert cells((tmp_path / "out.csv").read_text()) == told
    assert main([*run, "-o", str(tmp_path / "out.parquet"), "--escape-formulas"]) == 1
    assert "is for CSV, not for parquet" in capfd.readouterr().err
    assert not (tmp_path / "out.parquet").exists()
