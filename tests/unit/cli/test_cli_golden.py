"""What `complete-fn` prints, writes and returns, verb by verb, kept in tests/golden/cli."""

from __future__ import annotations

import re
import signal
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import closing
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import feather, parquet

from tests.golden_files import Transcript, check_golden, check_names, entry_point, plain_environment

MODELS = """
[models.echo]
checkpoint = "echo"
engine = "echo"
max_model_len = 40
prices = { input = 1.0, cached_input = 0.1, output = 4.0, currency = "EUR", basis = "yours" }
"""
ROWS = {"id": [1, 2, 3, 4], "text": ["one", None, "", "one"], "n": [1.5, 2.0, 3.0, 4.0]}
pytestmark = pytest.mark.timeout(60)
RUN = "run -m echo -p {text} in.parquet"

# Every verb with its own verbs; those of swiftkv need the engine's libraries.
VERBS = {
    "run": [],
    "models": [],
    "usage": [],
    "cache": ["stats", "clear"],
    "serve": [],
    "worker": [],
    "jobs": ["submit", "list", "show", "wait", "results", "cancel", "rerun", "deliver", "delete"],
    "keys": ["create", "list", "revoke", "budget", "limit", "weight", "storage"],
    "connections": ["add", "list", "remove"],
    "setup-engine": [],
}
# Tokens of the chat template are counted where the engine's libraries are.
DRY_RUN = "run -m demo-llama-swiftkv -p 'Name the section: {text}' in.parquet --dry-run --max-cost 0.000001"
SWIFTKV = ["convert", "distill", "eval", "check"]

# One session each: the commands, in order, in one folder.
SESSIONS: dict[str, list[str]] = {
    "main": ["--version", "walk", "run"],
    "run_parquet": [f"{RUN} -o out.parquet", f"{RUN} -o out.parquet"],
    "run_csv": ["run -m echo -p 'Say {text} {n}' in.csv -o out.csv", "run -m echo -p {text} in.csv.gz -o plain.csv"],
    "run_jsonl": ["run -m echo -p 'Say {text}' in.jsonl -o out.jsonl --details --column said"],
    "run_arrow": ["run -m echo -p '{text} {{n}}' in.arrow -o out.arrow --details"],
    "run_stdout": [f"{RUN} --format jsonl", f"{RUN} --format csv --limit 1 --quiet"],
    "run_stdin": ["run -m echo -p {text} - --format csv < in.csv", "run -m echo -p {text} -"],
    "run_types": [
        "run -m echo -p '{id} {at}' types.parquet -o out.jsonl",
        "run -m echo -p {id} types.parquet -o t.csv",
    ],
    "run_limit_overwrite": [f"{RUN} -o out.csv --limit 1", f"{RUN} -o out.csv", f"{RUN} -o out.csv --overwrite"],
    "run_options": [
        "run -m echo -p 'a b c {text}' in.parquet -o 1.jsonl --limit 1 --details --max-tokens 2",
        "run -m echo -p 'a b c {text}' in.parquet -o 2.jsonl --limit 1 --details --option max_tokens=2",
        "run -m echo -p 'a b c {text}' in.parquet -o 3.jsonl --limit 1 --temperature 1 --top-p 0.9 --top-k 5 --seed 1",
        "run -m echo -p 'a b c {text}' in.parquet -o 4.jsonl --limit 1 --details --choices 'b,z'",
        "run -m echo -p '{text} {n}' in.parquet -o 5.jsonl --limit 1 --details --reorder-fields",
    ],
    "run_cache": [f"{RUN} -o {n}.jsonl --cache {mode}" for n, mode in enumerate(("on", "on", "off", "refresh"))],
    "run_failed_rows": [
        "run -m echo -p {text} bad.jsonl -o out.jsonl --details",
        "run -m echo -p {text} bad.jsonl -o strict.jsonl --strict",
        "run -m echo -p {text} bad.jsonl -o quiet.jsonl --quiet",
    ],
    "run_max_cost": [f"{RUN} -o out.jsonl --details --max-cost 0.000001", f"{RUN} --max-total-tokens 1 -o t.jsonl"],
    "run_dry_run": [
        f"{RUN} --dry-run",
        f"{RUN} -o out.csv --dry-run --max-cost 1 --max-total-tokens 1000 --max-tokens 5",
        f"{RUN} -o known.csv",
        f"{RUN} -o out.csv --dry-run",
    ],
    "run_database": [
        "run -m echo -p {text} sqlite:///docs.db --table docs --key id -o out.csv",
        "run -m echo -p {text} sqlite:///docs.db --sql 'SELECT id, text FROM docs WHERE id > 1' --key id"
        " -o sqlite:///done.db --into answers",
        "run -m echo -p {answer} sqlite:///done.db --sql 'SELECT id, completion AS answer FROM answers' --key id",
        "run -m echo -p {text} sqlite:///docs.db --table docs -o sqlite:///done.db",
        "run -m echo -p {text} sqlite:///docs.db --table absent --key id",
        "run -m echo -p {text} in.csv --table docs",
        "run -m echo -p {text} in.csv --into docs -o out.csv",
    ],
    "run_faults": [
        "run -m ecko -p {text} in.parquet",
        "run -m echo -p {txt} in.parquet",
        "run -m echo -p {text in.parquet",
        "run -m echo -p {text.upper} in.parquet",
        "run -m echo -p {text} no.parquet",
        "run -m echo -p {text} notes.txt",
        f"{RUN} -o in.parquet",
        f"{RUN} -o a/b.csv",
        f"{RUN} --temperature 3",
        f"{RUN} --temperature x",
        f"{RUN} --option topp=1",
        f"{RUN} --option top_p",
        f"{RUN} --limit -1",
        f"{RUN} --max-cost x",
        f"{RUN} --max-total-tokens -5",
        f"{RUN} --response-format no.json",
        f"{RUN} --response-format bad.json",
        f"{RUN} --choices one",
        f"{RUN} --column text",
        f"{RUN} --engine localhost",
        f"{RUN} --engine http://127.0.0.1:9/v1",
        f"{RUN} --cache never",
        f"{RUN} --format xml",
        f"{RUN} --table a --sql b",
        "run -p {text} in.parquet",
        "run -m echo in.parquet",
    ],
    "models": ["models", "models --json", "models --all"],
    "usage": [
        "usage",
        f"{RUN} -o 1.csv --query-tag a --quiet",
        f"{RUN} -o 2.csv --query-tag b --quiet",
        "usage",
        "usage --by model,query_tag",
        "usage --by query_tag --json",
        "usage --by user,tenant --csv --since 1d",
        "usage --since 2999-01-01",
        "usage --views",
        "usage --by week",
        "usage --since lately",
        "usage --focus charges.txt",
    ],
    "usage_focus": [f"{RUN} -o 1.csv --query-tag a --quiet", "usage --focus charges.csv", "usage --focus x.parquet"],
    "cache": [
        "cache stats",
        f"{RUN} -o 1.csv --quiet",
        "cache stats",
        "cache stats --json",
        "cache clear --model other",
        "cache clear --older-than 1",
        "cache clear",
        "cache stats --home <folder>/home",
        "cache",
        "cache clear --older-than long",
    ],
    "keys": [
        "keys list",
        "keys create --tenant acme",
        "keys create --tenant acme --user ann --scopes jobs,usage",
        "keys create --tenant bolt --user bob",
        "keys create --tenant bolt --days 0",
        "keys limit <id> 600",
        "keys limit acme 6000",
        "keys limit acme none",
        "keys budget acme 1.50",
        "keys budget acme none",
        "keys weight acme 2.5",
        "keys storage acme",
        "keys storage acme 1000000",
        "keys storage acme none",
        "keys list",
        "keys revoke <id>",
        "keys list",
        "keys revoke <id>",
        "keys revoke nobody",
        "keys create --tenant 'a b'",
        "keys create --tenant a --scopes root",
        "keys create",
        "keys budget acme -1",
        "keys budget acme much",
        "keys budget acne 1",
        "keys weight nobody 2",
        "keys storage acme 0",
        "keys storage nobody",
        "keys limit acme 0",
        "keys limit nobody 5",
        "keys weight acme 0",
        "keys",
    ],
    "connections": [
        "connections list",
        "connections add crm --tenant acme --url-env CRM_URL",
        "connections add dwh --tenant bolt --url-env DWH_URL --writable",
        "connections list",
        "connections remove crm --tenant acme",
        "connections remove crm --tenant acme",
        "connections list",
        "connections add 'a b' --tenant acme --url-env CRM_URL",
        "connections add crm --tenant acme",
        "connections",
    ],
    "service_faults": [
        "serve --host 0.0.0.0 --port 0",
        "serve --host 203.0.113.1 --port 0",
        "serve --workers 0..2",
        "serve --workers 2..1 --broker redis://127.0.0.1:9",
        "serve --broker amqp://me:secret@127.0.0.1",
        "worker",
        "worker --broker http://127.0.0.1",
        "worker --broker redis://127.0.0.1:9 --parts 0",
        "jobs",
        "jobs show",
        "jobs list --url http://127.0.0.1:9",
        "jobs list --url nowhere",
        "jobs submit in.csv -m echo",
        "jobs submit -m echo -p {text}",
        "jobs submit in.csv -m echo -p {text} -o out.doc",
        "jobs submit no.csv -m echo -p {text}",
        "jobs results job_1",
    ],
}


@pytest.fixture
def shell(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Transcript]:
    """Records `complete-fn` in a folder of its own, with a model `echo` and some tables."""
    plain_environment(monkeypatch, tmp_path)
    monkeypatch.setenv("COMPLETE_FN_MODELS", str(tmp_path / "models.toml"))
    monkeypatch.setenv("COMPLETE_FN_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield Transcript(tmp_path, capfd)
    signal.signal(signal.SIGTERM, before)


def write_inputs(folder: Path) -> None:
    (folder / "models.toml").write_text(MODELS)
    table = pa.table(ROWS)
    parquet.write_table(table, folder / "in.parquet")
    feather.write_feather(table, str(folder / "in.arrow"), compression="uncompressed")
    (folder / "in.csv").write_text('id,text,n\n1,one,1.5\n2,,2.0\n3,"two\nlines",3.0\n4,one,4.0\n')
    with pa.CompressedOutputStream(str(folder / "in.csv.gz"), "gzip") as sink:
        sink.write(b"text\none\n")
    (folder / "in.jsonl").write_text('{"id": 1, "text": "one"}\n{"id": 2}\n{"id": 3, "text": "two", "more": [1]}\n')
    (folder / "bad.jsonl").write_text('{"text": "\\ud800"}\n{"text": "fine"}\n{"text": "' + "long " * 50 + '"}\n')
    (folder / "notes.txt").write_text("one\n")
    (folder / "bad.json").write_text('{"type": 5}')
    parquet.write_table(typed_table(), folder / "types.parquet")
    with closing(sqlite3.connect(folder / "docs.db")) as docs, docs:
        docs.execute("CREATE TABLE docs (id INTEGER PRIMARY KEY, text VARCHAR(20))")
        docs.executemany("INSERT INTO docs VALUES (?, ?)", [(1, "one"), (2, None), (3, "three"), (4, "one")])


def typed_table() -> pa.Table:
    """A column of each kind that CSV and JSON write in a way of their own."""
    at = datetime(2020, 2, 29, 12, 30, 15, 250_000)
    return pa.table(
        {
            "id": pa.array([1, None], pa.uint64()),
            "at": pa.array([at, None], pa.timestamp("us")),
            "zoned": pa.array([at, None], pa.timestamp("ms", "UTC")),
            "day": pa.array([date(2020, 2, 29), None]),
            "took": pa.array([timedelta(hours=1, microseconds=5), None], pa.duration("us")),
            "price": pa.array([Decimal("12.30"), None], pa.decimal128(9, 2)),
            "share": pa.array([0.1, float("nan")]),
            "good": pa.array([True, None]),
            "raw": pa.array([b"\x00\xff", None]),
            "tags": pa.array([["a", None], None], pa.list_(pa.string())),
            "place": pa.array([{"x": 1, "y": "é"}, None], pa.struct([("x", pa.int32()), ("y", pa.string())])),
            "counts": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())),
        }
    )


@pytest.mark.parametrize("name", SESSIONS)
def test_a_session_prints_writes_and_returns_what_it_did(shell: Transcript, name: str) -> None:
    for command in SESSIONS[name]:
        shell.run(command)
    check_golden(f"cli/{name}.txt", shell.text())


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_the_help_of_a_verb_is_what_it_was(shell: Transcript, verb: str) -> None:
    for own in ("", *VERBS.get(verb, [])):
        shell.run(" ".join([*filter(None, (verb, own)), "--help"]))
    check_golden(f"cli/help_{verb.replace('-', '_') or 'main'}.txt", shell.text())


@pytest.mark.engine
@pytest.mark.usefixtures("needs_vllm")
def test_the_help_of_swiftkv_is_what_it_was(shell: Transcript) -> None:
    for given in ("", "--help", *(f"{verb} --help" for verb in SWIFTKV), "compress"):
        shell.run(f"swiftkv {given}".strip())
    check_golden("cli/help_swiftkv.txt", shell.text())


@pytest.mark.engine
@pytest.mark.usefixtures("needs_vllm")
def test_a_dry_run_that_counts_tokens_says_what_it_did(shell: Transcript) -> None:
    shell.run(DRY_RUN)
    check_golden("cli/run_dry_run_tokens.txt", shell.text())


@pytest.mark.usefixtures("shell")
def test_no_verb_is_left_out(capfd: pytest.CaptureFixture[str]) -> None:
    main = entry_point()
    assert main(["--help"]) == 0
    shown = capfd.readouterr().out.partition("verbs:\n")[2].partition("\n\n")[0]
    assert [line.split()[0] for line in shown.splitlines()] == [*VERBS, "swiftkv"]
    for verb, own in VERBS.items():
        main([verb, "--help"])
        found = re.search(r"^  ([a-z|]+\|[a-z|]+)$", capfd.readouterr().out, re.MULTILINE)
        assert (found[1].split("|") if found else []) == own


def test_every_golden_file_has_its_session() -> None:
    of_helps = [f"help_{verb.replace('-', '_')}" for verb in ("main", *VERBS, "swiftkv")]
    check_names("cli/*.txt", [f"{name}.txt" for name in (*SESSIONS, *of_helps, "run_dry_run_tokens", "jobs", "serve")])
