"""`kill -9` and Ctrl-C of `complete-fn run`, then the same command again: nothing is lost, computed or billed twice."""

from __future__ import annotations

import http.server
import itertools
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import termios
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

COMMAND = [sys.executable, "-c", "import sys; from complete_fn.cli.main import main; sys.exit(main())", "run"]
ROWS, DELAY_S, CONCURRENCY = 320, 0.08, 5  # about 5 s, a commit every 2 s


class SlowEndpoint:
    """An OpenAI-compatible server that takes its time. `asked` counts prompts; once `gone` it hangs up."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.gone = False
        endpoint, serial = self, itertools.count()

        class Answer(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                prompt = body["messages"][-1]["content"]
                endpoint.asked[prompt] += 1
                time.sleep(DELAY_S)
                if endpoint.gone:
                    raise ConnectionError
                if "refuse" in prompt:
                    self.reply(400, {"error": {"message": "no"}})
                    return
                drawn = f" {next(serial)}" if body["temperature"] else ""
                message = {"role": "assistant", "content": prompt.upper() + drawn}
                usage = {"prompt_tokens": len(prompt), "completion_tokens": 5 + len(prompt) % 7}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                self.reply(200, {"choices": [choice], "usage": usage})

            def reply(self, status: int, found: dict[str, Any]) -> None:
                content = json.dumps(found).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

            def handle(self) -> None:
                with suppress(ConnectionError):  # the client was killed
                    super().handle()

        class Server(http.server.ThreadingHTTPServer):
            request_queue_size = 128

        self.server = Server(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture(scope="module")
def endpoint() -> Iterator[SlowEndpoint]:
    found = SlowEndpoint()
    yield found
    found.server.shutdown()
    found.server.server_close()


@dataclass
class Place:
    """A folder with a table, a catalogue and a state of its own, and the command that is run in it again and again."""

    folder: Path
    arguments: list[str]

    def start(self, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
        here = {"COMPLETE_FN_HOME": str(self.folder / "home"), "COMPLETE_FN_MODELS": str(self.folder / "models.toml")}
        files = [str(self.folder / "in.parquet"), "-o", str(self.folder / "out.parquet"), "--details"]
        command = [*COMMAND, *self.arguments, *files]
        return subprocess.Popen(command, env={**os.environ, **here}, stderr=stderr, text=True)

    def finish(self) -> str:
        """Run to the end; what it said."""
        running = self.start()
        _, said = running.communicate(timeout=900)
        assert running.returncode in (0, 3), said
        return said

    def sql(self, query: str) -> list[tuple[Any, ...]]:
        path = self.folder / "home" / "state.sqlite3"
        if not path.exists():
            return []
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30)) as connection:
            try:
                return connection.execute(query).fetchall()
            except sqlite3.OperationalError:
                return []  # not made yet

    def commits(self) -> list[float]:
        """Times of the slices committed so far."""
        return [at for (at,) in self.sql("SELECT DISTINCT at FROM ledger WHERE price_class = 'input' ORDER BY at")]

    def billed(self) -> int:
        classes = "('input', 'cached_input', 'output')"
        return int(self.sql(f"SELECT coalesce(sum(tokens), 0) FROM ledger WHERE price_class IN {classes}")[0][0])

    def stored(self) -> list[str | None]:
        """Texts of the answers in the store, None for a failed row."""
        return [text for (text,) in self.sql("SELECT text FROM answers")]

    def stored_tokens(self) -> int:
        return int(self.sql("SELECT coalesce(sum(prompt_tokens + completion_tokens), 0) FROM answers")[0][0])

    def lost(self) -> tuple[int, int, int]:
        found = self.sql("SELECT sum(rows), sum(tokens), sum(cost_nano) FROM ledger WHERE price_class = 'lost'")[0]
        return tuple(x or 0 for x in found)  # type: ignore[return-value]

    def kill_after(self, seconds: float, sign: signal.Signals = signal.SIGKILL) -> subprocess.Popen[str] | None:
        """Start, wait for the first commit of this attempt and `seconds` more, stop it; None if it ended before."""
        before = len(self.commits())
        running = self.start()
        while len(self.commits()) == before and running.poll() is None:
            time.sleep(0.01)
        time.sleep(seconds)
        running.send_signal(sign)
        running.wait(60)
        return running if running.returncode != 0 and not (self.folder / "out.parquet").exists() else None


def killed(make: Callable[[str], Place], name: str, seconds: float, answers: int) -> Place:
    """A run killed so long after its first commit, or sooner where by then all its `answers` were committed."""
    for attempt in range(6):
        place = make(f"{name}-{attempt}")
        if place.kill_after(seconds / 2**attempt) and len(place.stored()) < answers:
            return place
    raise AssertionError(f"{name} always ended before it was killed")


def make_place(folder: Path, endpoint: SlowEndpoint, name: str, *arguments: str) -> Place:
    folder = folder / name
    folder.mkdir()
    (folder / "models.toml").write_text(
        f'[models.slow]\nurl = "{endpoint.url}"\ndefault_max_tokens = 50\n'
        f"prices = {{ input = 1.0, output = 3.0 }}\nengine_args = {{ concurrency = {CONCURRENCY} }}\n"
    )
    texts = [f"{name} text {n}" for n in range(ROWS)]
    texts[7] = f"{name} refuse this"
    texts[200:210] = texts[0:10]
    column = pa.array([None if n % 50 == 49 else t for n, t in enumerate(texts)])
    pq.write_table(pa.table({"id": range(ROWS), "text": column}), folder / "in.parquet")
    return Place(folder, ["-m", "slow", "-p", "{text}", *arguments])


def outcome(place: Place, with_text: bool = True) -> list[tuple[Any, ...]]:
    rows = pq.read_table(place.folder / "out.parquet").to_pylist()
    details = [r["completion_details"] or {} for r in rows]
    codes = [(d.get("error") or {}).get("code") for d in details]
    named = zip(rows, codes, strict=True)
    return [(r["id"], r["text"], c, r["completion"] if with_text else r["completion"] is None) for r, c in named]


def tokens_of(place: Place) -> int:
    """Tokens of the answers in the output, each distinct prompt once."""
    rows = pq.read_table(place.folder / "out.parquet").to_pylist()
    seen = {r["text"]: r["completion_details"]["usage"] for r in rows if r["completion_details"]}
    return sum(u["prompt_tokens"] + u["completion_tokens"] for u in seen.values())


SHORT = {
    "greedy": [],
    "cacheless": ["--cache", "off"],
    "refreshed": ["--cache", "refresh"],
}


def test_killed_runs_go_on(endpoint: SlowEndpoint, tmp_path: Path) -> None:
    """Three ways of running, each killed at a moment drawn between its first and last commit, at the same time."""
    undisturbed = make_place(tmp_path, endpoint, "undisturbed")
    undisturbed.finish()
    times = undisturbed.commits()
    assert len(times) >= 3
    draw = random.Random(int(times[0]))
    print(f"seed {int(times[0])}")
    whole = [(n, c, e) for n, _, c, e in outcome(undisturbed)]
    answers = len(undisturbed.stored())

    def check(kind: str, seconds: float) -> None:
        place = killed(lambda name: make_place(tmp_path, endpoint, name, *SHORT[kind]), kind, seconds, answers)
        name = place.folder.name
        committed = place.stored()
        assert committed, kind
        assert place.billed() == place.stored_tokens()
        asked = Counter(p for p in endpoint.asked if p.startswith(f"{name} "))
        said = place.finish()
        lost_rows, lost_tokens, lost_cost = place.lost()
        assert lost_rows >= 1
        assert lost_cost == 0
        assert (
            f"was killed with at most {lost_rows:,} rows, about {lost_tokens:,} tokens, uncommitted: not billed" in said
        )
        found = [(n, c, e and e.replace(name.upper(), "UNDISTURBED")) for n, _, c, e in outcome(place)]
        assert found == whole
        assert place.billed() == tokens_of(place)
        again = [p for p in asked if p.upper() in committed and endpoint.asked[p] > 1]
        assert not again, "committed rows were computed again"

    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(check, kind, draw.uniform(0, times[-1] - times[0])) for kind in SHORT]
        for each in runs:
            each.result()


def test_sampled_rows_are_kept_by_the_job_that_drew_them(endpoint: SlowEndpoint, tmp_path: Path) -> None:
    """Killed, then interrupted, then finished: three attempts. Sampled answers belong to their row, duplicates too."""
    place = make_place(tmp_path, endpoint, "sampled", "--temperature", "0.8")
    assert place.kill_after(0.3)
    first = place.stored()
    assert place.kill_after(0.3, signal.SIGINT)
    second = place.stored()
    assert set(first) < set(second)
    assert place.billed() == place.stored_tokens()
    said = place.finish()
    assert "The last attempt was interrupted with at most" in said
    assert f"{len(second)} resumed" in said
    texts = {t for *_, t in outcome(place) if t is not None}
    assert set(second) - {None} <= texts
    details = [r["completion_details"] for r in pq.read_table(place.folder / "out.parquet").to_pylist()]
    used = [d["usage"] for d in details if d]
    assert place.billed() == sum(u["prompt_tokens"] + u["completion_tokens"] for u in used)
    assert not place.stored(), "a finished job's own answers go"


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so_and_ends_soon(endpoint: SlowEndpoint, tmp_path: Path, sign: signal.Signals) -> None:
    place = make_place(tmp_path, endpoint, f"stopped{sign}")
    running = place.start()
    while not place.commits():
        time.sleep(0.01)
    began = time.monotonic()
    running.send_signal(sign)
    _, said = running.communicate(timeout=30)
    assert time.monotonic() - began < 2
    assert running.returncode == 130
    rows = place.sql("SELECT sum(rows) FROM ledger WHERE price_class IN ('input', 'duplicate')")[0][0]
    assert said == f"Interrupted with {rows} rows committed. The same command goes on from there.\n"
    assert not (place.folder / "out.parquet").exists()
    assert [p.name for p in place.folder.iterdir() if p.name.endswith(".part")] == []


def test_a_person_sees_a_bar_and_a_summary(endpoint: SlowEndpoint, tmp_path: Path) -> None:
    place = make_place(tmp_path, endpoint, "watched")
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (40, 120))
    running = place.start(stderr=theirs)
    os.close(theirs)
    seen = b""
    with suppress(OSError):  # the terminal's end
        while chunk := os.read(ours, 4096):
            seen += chunk
    os.close(ours)
    assert running.wait(60) == 3
    text = seen.decode()
    assert "slow:" in text
    assert "/314 " in text  # rows with a prompt
    assert " tokens/s, USD 0." in text
    assert text.rstrip().splitlines()[-1].startswith("320 rows · ")


def test_an_endpoint_that_goes_away_leaves_what_was_committed(tmp_path: Path) -> None:
    endpoint = SlowEndpoint()
    place = make_place(tmp_path, endpoint, "gone")
    running = place.start()
    while not place.commits():
        time.sleep(0.01)
    endpoint.gone = True
    endpoint.server.shutdown()
    endpoint.server.server_close()
    _, said = running.communicate(timeout=60)
    assert running.returncode == 1
    assert "rows committed. The same command goes on from there." in said
    assert place.billed() == place.stored_tokens() > 0


REAL_ROWS, KILLS = 2000, 10
SAMPLE = Path(__file__).parents[2] / "sql" / "examples" / "packages.parquet"


@pytest.mark.long
@pytest.mark.engine
@pytest.mark.timeout(7200)
def test_ten_kills_of_a_real_run(tmp_path: Path) -> None:
    """2,000 rows on the embedded engine, killed at ten moments, each run finished by the same command."""
    table = pq.read_table(SAMPLE)
    table = pa.concat_tables([table, table]).slice(0, REAL_ROWS)
    rows = pa.table({"id": range(REAL_ROWS), "text": table["description"]})

    def place(name: str) -> Place:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "models.toml").write_text("")
        pq.write_table(rows, folder / "in.parquet")
        return Place(folder, ["-m", "demo-llama", "-p", "Name the section: {text}"])

    undisturbed = place("undisturbed")
    undisturbed.finish()
    times = undisturbed.commits()
    assert len(times) >= 20
    whole = outcome(undisturbed)
    seed = int(times[0])
    draw = random.Random(seed)
    for n, moment in enumerate(sorted(draw.uniform(0, times[-1] - times[0]) for _ in range(KILLS))):
        run = killed(place, f"killed{n}", moment, len(undisturbed.stored()))
        committed = len(run.stored())
        assert run.billed() == run.stored_tokens()
        said = run.finish()
        lost_rows, lost_tokens, lost_cost = run.lost()
        assert lost_cost == 0
        assert f"at most {lost_rows:,} rows, about {lost_tokens:,} tokens, uncommitted: not billed" in said
        found = outcome(run)
        assert [row[:3] for row in found] == [row[:3] for row in whole]
        assert run.billed() == tokens_of(run)
        different = [(a, b) for a, b in zip(whole, found, strict=True) if a != b]
        counts = f"{committed} committed, {lost_rows} lost, {len(different)} differ"
        print(f"seed {seed}, kill {n} at {moment:.1f} s: {counts}")
        for a, b in different:
            print(f"  row {a[0]}: {a[3]!r} / {b[3]!r}")
        assert len(different) <= 0.01 * REAL_ROWS
