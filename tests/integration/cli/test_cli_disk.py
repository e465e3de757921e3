"""`complete-fn run` on a real file system that is full: what was committed stays, the same command goes on."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

MODELS = '[models.echo]\ncheckpoint = "echo"\nengine = "echo"\nprices = { input = 1, output = 1 }\n'
WORDS = 90
TOKENS = 2 * (WORDS + 3)  # of a row: EchoEngine's prompt and answer
CLI = f"{shlex.quote(sys.executable)} -c 'import sys; from complete_fn.cli.main import main; sys.exit(main())'"

COUNT = """
import json, sqlite3, sys
c = sqlite3.connect(sys.argv[1])
stored = c.execute("SELECT count(*), sum(prompt_tokens + completion_tokens) FROM answers").fetchone()
billed = c.execute("SELECT sum(tokens) FROM ledger WHERE price_class IN ('input', 'cached_input', 'output')").fetchone()
print(json.dumps([*stored, *billed]))
"""


def tiny_file_system(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script with a file system of 1,500 KiB on `folder`/tiny, which only it sees."""
    (folder / "tiny").mkdir()
    (folder / "count.py").write_text(COUNT)
    (folder / "models.toml").write_text(MODELS)
    rows = {"n": range(2000), "t": [f"row {n} " + "word " * WORDS for n in range(2000)]}
    pq.write_table(pa.table(rows), folder / "in.parquet")
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(folder / "tiny")]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True).returncode != 0:
        pytest.skip("no file system can be mounted here")
    whole = f"""
        cd {shlex.quote(str(folder))}
        mount -t tmpfs -o size=1500k none tiny || exit 99
        export COMPLETE_FN_MODELS=$PWD/models.toml
        count() {{ {shlex.quote(sys.executable)} count.py "$1"; }}
        run() {{ {CLI} run -m echo -p 'Say {{t}}' in.parquet "$@"; echo "rc=$?"; }}
        {script}
    """
    return subprocess.run(["unshare", "-rm", "bash", "-c", whole], capture_output=True, text=True, timeout=200)


def test_a_full_disk_on_commit(tmp_path: Path) -> None:
    done = tiny_file_system(
        tmp_path,
        """
        run --home tiny/home -o out.parquet
        count tiny/home/state.sqlite3
        mount -o remount,size=60m tiny
        run --home tiny/home -o out.parquet
        count tiny/home/state.sqlite3
        """,
    )
    first, stored, second, after = done.stdout.splitlines()
    assert (first, second) == ("rc=1", "rc=0"), done.stderr
    kept, tokens, billed = json.loads(stored)
    assert 0 < kept < 2000
    assert tokens == billed
    assert "Free some space: what was committed is safe, run again to go on." in done.stderr
    assert "Traceback" not in done.stderr
    assert f"{kept:,} resumed" in done.stderr
    assert json.loads(after) == [2000, 2000 * TOKENS, 2000 * TOKENS]
    assert pq.read_table(tmp_path / "out.parquet")["completion"].null_count == 0


def test_a_full_disk_on_output(tmp_path: Path) -> None:
    done = tiny_file_system(
        tmp_path,
        """
        run --home home -o tiny/out.csv --cache off
        ls -A tiny
        mount -o remount,size=60m tiny
        run --home home -o tiny/out.csv --cache off
        wc -l < tiny/out.csv
        count home/state.sqlite3
        """,
    )
    first, second, lines, after = done.stdout.splitlines()
    assert (first, second, lines) == ("rc=1", "rc=0", "2001"), done.stderr
    assert "'tiny/out.csv' cannot be written: No space left on device. The answers are kept" in done.stderr
    assert "2,000 resumed" in done.stderr
    assert json.loads(after) == [0, None, 2000 * TOKENS]  # paid once; a finished run's own answers go
