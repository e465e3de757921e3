"""`complete-fn models`, `usage` and `cache` show the catalogue, the ledger and the stored answers."""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from complete_fn.cli.main import OK, Parser, add_home
from complete_fn.cli.terminal import print_out
from complete_fn.engines.catalogue import Model, load_catalogue
from complete_fn.errors import InvalidOptionError
from complete_fn.ledger.pruning import DAY
from complete_fn.logs import printable
from complete_fn.registry import resolve
from complete_fn.settings import load_settings

if TYPE_CHECKING:
    from complete_fn.ledger.usage import UsageLine


def models_main(argv: list[str]) -> int:
    parser = Parser("complete-fn models", description="List the models of the catalogue.")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    asked = parser.parse_args(argv)
    found = load_catalogue(load_settings().models_file).values()
    if asked.json:
        print_out(json.dumps([model_object(m) for m in found], indent=2))
        return OK
    head = ("NAME", "CHECKPOINT", "LICENCE", "GATED", "DOWNLOAD", "CONTEXT", "PRICES PER MILLION", "TRIED")
    print_table([head, *(model_row(m) for m in found)])
    print_out("\nPrices: input / cached input / output. A local folder or a Hub id (owner/name) works as a model too.")
    return OK


def model_row(model: Model) -> tuple[str, ...]:
    p = model.prices
    return (
        model.name,
        model.checkpoint.removeprefix("package:"),
        model.licence,
        "gated" if model.gated else "open",
        model.download,
        f"{model.max_model_len:,}" if model.max_model_len else "model's",
        f"{p.currency} {p.input} / {p.cached_input} / {p.output} ({p.basis})",
        model.tried,
    )


def model_object(model: Model) -> dict[str, Any]:
    p = model.prices
    amounts = {"input": float(p.input), "cached_input": float(p.cached_input), "output": float(p.output)}
    return {
        "name": model.name,
        "checkpoint": model.checkpoint,
        "revision": model.revision,
        "engine": model.engine,
        "url": model.url,
        "licence": model.licence,
        "gated": model.gated,
        "download": model.download,
        "max_model_len": model.max_model_len,
        "default_max_tokens": model.default_max_tokens,
        "prices_per_million": {**amounts, "currency": p.currency, "basis": p.basis},
        "tried": model.tried,
        "nodes": model.nodes,
        "note": model.note,
    }


VIEWS = """print SQL that gives the ledger views with the names and columns of Cortex's usage history; to install them:
complete-fn usage --views | sqlite3 STATE.sqlite3, or | psql "$COMPLETE_FN_DATABASE" """


def usage_main(argv: list[str]) -> int:
    from complete_fn.ledger.usage import GROUPS, usage

    parser = Parser("complete-fn usage", description="Sum the ledger.")
    add = parser.add_argument
    add("--by", default="day,model", metavar="FIELDS", help=f"one or more of {', '.join(GROUPS)} (default: day,model)")
    add(
        "--since",
        metavar="WHEN",
        help="from a date on (2026-01-31, in UTC as the days are), or for so long back (7d, 24h)",
    )
    add("--until", metavar="WHEN", help="before a date, or before so long back")
    add("--json", action="store_true", help="as JSON")
    add("--csv", action="store_true", help="as CSV")
    add("--views", action="store_true", help=VIEWS)
    add("--focus", metavar="FILE", help="write charges by hour with FOCUS 1.2 column names to a .parquet or .csv file")
    add_home(parser)
    asked = parser.parse_args(argv)
    if asked.views:
        kind = open_store(asked.home).engine.dialect.name
        print_out(files("complete_fn_sql").joinpath(f"usage_views_{kind}.sql").read_text("utf-8"), end="")
        return OK
    by = asked.by.split(",")
    if wrong := [name for name in by if name not in GROUPS]:
        raise InvalidOptionError(f"--by {wrong[0]!r} is not one of {', '.join(GROUPS)}.")
    since = moment(asked.since) if asked.since else 0.0
    until = moment(asked.until, "--until") if asked.until else None
    if asked.focus:
        count = resolve("complete_fn.ledger.focus_export:export")(
            open_store(asked.home), Path(asked.focus), since, None, until
        )
        print_out(f"{count:,} charges written to {asked.focus}.")
        return OK
    lines = usage(open_store(asked.home), by, since, until=until)
    head = (*by, *USAGE)
    rows = [usage_row(u) for u in lines]
    if asked.json:
        print_out(json.dumps([dict(zip(head, row, strict=True)) for row in rows], indent=2, default=float))
    elif asked.csv:
        written = io.StringIO()
        csv.writer(written, lineterminator="\n").writerows([head, *rows])
        if sys.stdout.isatty():
            print_out(written.getvalue(), end="")
        else:  # a file or a program gets the names as they are
            sys.stdout.write(written.getvalue())
    elif not rows:
        print_out(f"Nothing was run {'in that time' if until is not None else 'since then' if since else 'yet'}.")
    else:
        print_table([[h.upper().replace("_", " ") for h in head], *([shown(v) for v in row] for row in rows)])
    return OK


USAGE = (
    *("rows", "input", "cached", "output", "cost", "currency", "basis", "saved", "lost_rows", "lost_tokens"),
    *("cache_saved", "device_seconds", "idle_seconds", "aborted_seconds", "saved_seconds"),
)


def usage_row(u: UsageLine) -> tuple[Any, ...]:
    return (*u.group, *(getattr(u, name) for name in USAGE))


def shown(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else f"{value:.6f}"


def moment(text: str, option: str = "--since") -> float:
    """Seconds of the epoch of a date (in UTC if it names no zone), or of a span before now such as 7d."""
    try:
        if match := re.fullmatch(r"(\d+)([dh])", text):
            return time.time() - int(match[1]) * (DAY if match[2] == "d" else DAY / 24)
        at = datetime.fromisoformat(text)
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError) as error:
        raise InvalidOptionError(f"{option} {text!r} is neither a date like 2026-01-31 nor a span like 7d.") from error


def cache_main(argv: list[str]) -> int:
    parser = Parser("complete-fn cache", description="Show or clear the stored answers.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="stats|clear", parser_class=Parser)
    stats = verbs.add_parser("stats", help="where answers are stored, how many, how large")
    stats.add_argument("--json", action="store_true", help="as JSON")
    clear = verbs.add_parser("clear", help="delete stored answers; the ledger stays")
    clear.add_argument("--model", metavar="M", help="only answers of this model")
    clear.add_argument("--older-than", type=float, metavar="DAYS", help="only answers made before that")
    for each in (stats, clear):
        add_home(each)
    asked = parser.parse_args(argv)
    return cache_stats(asked) if asked.verb == "stats" else cache_clear(asked)


def cache_stats(asked: argparse.Namespace) -> int:
    from complete_fn.ledger.usage import stored

    store, settings = open_store(asked.home), load_settings()
    found = stored(store)
    if asked.json:
        every = {"path": store.place, "answers": found.count, "for_jobs": found.for_jobs, "bytes": found.bytes}
        bounds = {"limit_gib": settings.cache_gib, "limit_days": settings.cache_days}
        print_out(json.dumps({**every, "models": found.models, **bounds}, indent=2))
        return OK
    lines = [
        ("state", store.place),
        ("answers", f"{found.count:,}" + (f" ({found.for_jobs:,} for unfinished runs)" if found.for_jobs else "")),
        ("size", f"{found.bytes / 2**20:,.1f} MiB with the ledger"),
        ("bounds", f"{settings.cache_gib:g} GiB, {settings.cache_days:g} days; the oldest go first"),
    ]
    if found.oldest is not None and found.newest is not None:
        lines.append(("from, to", f"{day(found.oldest)}, {day(found.newest)}"))
    lines += [(f"  {name}", f"{count:,}") for name, count in found.models.items()]
    width = max(len(name) for name, _ in lines) + 2
    print_out("\n".join(f"{name:{width}}{text}" for name, text in lines))
    return OK


def cache_clear(asked: argparse.Namespace) -> int:
    from complete_fn.ledger.pruning import clear

    store = open_store(asked.home)
    before = None if asked.older_than is None else time.time() - asked.older_than * DAY
    print_out(f"{clear(store, asked.model, before):,} answers deleted from {store.place}. The ledger stays.")
    return OK


def open_store(home: str | None) -> Any:
    from complete_fn.store.store import Store

    return Store(load_settings(home).store)


def day(at: float) -> str:
    return datetime.fromtimestamp(at).date().isoformat()


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns as wide as their widest cell. Columns of numbers are right-aligned."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    right = [all(row[n].replace(",", "").replace(".", "").isdigit() for row in rows[1:]) for n in range(len(widths))]
    for row in rows:
        cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        print_out("  ".join(cells).rstrip())
