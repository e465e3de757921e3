"""`complete-fn run` reads a file and writes its rows with a column of answers. A run can be resumed, and is atomic."""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from complete_fn.cli.main import ESCAPE, INTERRUPTED, OK, SOME_FAILED, Parser, add_home, parse_pairs
from complete_fn.cli.run_input import Limited, Survey, database_url, file_source, is_database, query_source, survey
from complete_fn.cli.run_windows import (
    RunSession,
    TableTarget,
    Target,
    WindowedRun,
    end,
    run_whole,
    run_windows,
)
from complete_fn.cli.terminal import print_err, print_out
from complete_fn.engines.call import Call
from complete_fn.errors import CompleteError, EngineError, InputError, InvalidOptionError, StoreError
from complete_fn.estimates.estimate import Estimate
from complete_fn.estimates.estimate_report import report
from complete_fn.interrupts import off_main
from complete_fn.ledger.usage import committed_rows, last_stop
from complete_fn.prompts.options import Options, parse_options
from complete_fn.prompts.table_prompts import ESTIMATE_PROMPT_BYTES, TablePrompts
from complete_fn.prompts.templates import refuse_missing, template_fields
from complete_fn.rows.databases import QuerySource, open_database
from complete_fn.rows.formats import FORMATS, TablePlace, escaping, place_of
from complete_fn.rows.readers import FileSource, Source, size_for_prompts
from complete_fn.rows.result_tables import refuse_name
from complete_fn.rows.writers import refuse_clash, refuse_output, writing
from complete_fn.session import CompletionWarning, Session
from complete_fn.types import Asker

FEWER_ROWS = "A dry run holds them all: --limit N takes fewer rows."
DESCRIPTION = """\
Make a prompt of every row, complete them all, and write the rows with the answers behind them.

  complete-fn run --model M --prompt 'Write a one-line synopsis: {description}' in.parquet -o out.parquet
  cat in.jsonl | complete-fn run -m M -p '{text}' --format jsonl - > out.jsonl

  complete-fn run -m M -p '{text}' postgresql://me@host/db --table docs --key id -o postgresql://me@host/db --into done

Databases are read by cursor and written by upsert, a row for each --key; a URL with a password is better named by the
variable that has it (env:MY_DATABASE). Input beyond 200,000 rows or 256 MiB goes through in windows of that size:
duplicates are merged and prefixes ordered within a window. A prompt has at most 4 MiB.

Exit code 0: every row has an answer; 3: some failed (--details says why); 1: the query is wrong; 130: interrupted.
An interrupted run, killed ones included, goes on where it was when the same command is given again."""


def arguments() -> Parser:
    parser = Parser("complete-fn run", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = "a .parquet, .csv, .jsonl or .arrow file (.gz, .zst, .bz2 too), s3://, a database's URL, or - for stdin"
    parser.add_argument("input", help=what)
    add = parser.add_argument
    add("-m", "--model", required=True, help="a name of the catalogue, a local folder or a Hub id")
    add("-p", "--prompt", required=True, help="the template: {column} is replaced, {{ and }} are braces")
    add("-o", "--output", default="-", help="the file, s3:// object or database to write (default: -, stdout)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--table", help="of the input database")
    source.add_argument("--sql", metavar="SELECT", help="one statement for the input database")
    add("--into", metavar="TABLE", help="of the output database; made if missing")
    add("--key", metavar="COLUMN", help="tells the rows of a database apart; an interrupted run goes on behind it")
    add("--format", choices=FORMATS, help="the format of stdin and stdout")
    add("--column", default="completion", help="name of the new column (default: completion)")
    add("--details", action="store_true", help="add error, usage, cost and source of each row as COLUMN_details")
    add("--escape-formulas", action="store_true", help=ESCAPE)
    add("--limit", type=int, metavar="N", help="only the first N rows")
    add("--dry-run", action="store_true", help="only say what it would take: rows, tokens, price; starts no engine")
    add("--overwrite", action="store_true", help="replace an existing output")
    add("--temperature", type=float, help="0 to 2 (default: 0)")
    add("--top-p", type=float, help="above 0, at most 1 (default: 1)")
    add("--top-k", type=int, help="0 for all (default)")
    add("--max-tokens", type=int, help="tokens of an answer at most (default: the model's)")
    add("--seed", type=int, help="makes draws above temperature 0 repeatable on the same engine")
    add("--stop", action="append", help="end the answer before this text; may be repeated")
    add("--choices", metavar="A,B,C", help="labels: the likeliest is the answer, in one token (--details: scores)")
    add("--response-format", metavar="FILE", help="a JSON schema that every answer satisfies")
    add("--option", action="append", default=[], metavar="K=V", help="any option by name; V is JSON or text")
    add("--cache", choices=("on", "off", "refresh"), help="use and keep answers, neither, or only keep (default: on)")
    add(
        "--reorder-fields", action="store_true", help="fields as lines behind the prompt, in the order that costs least"
    )
    add("--max-cost", metavar="AMOUNT", help="never spend more, in the currency of the model's prices")
    add("--max-total-tokens", type=int, metavar="N", help="never use more tokens in all, prompts and answers")
    add("--strict", action="store_true", help="one failed row fails the run: exit code 1, no output")
    add("--engine", metavar="URL", help="an OpenAI-compatible endpoint to use in place of the model's own engine")
    add("--prices", metavar="NAME=N,..", help="what --engine takes per million tokens: input=0.15,output=0.6")
    add("--query-tag", metavar="TAG", help="marks the run's lines in the ledger")
    add("--quiet", action="store_true", help="no progress bar, warnings or summary")
    add_home(parser)
    return parser


def main(argv: list[str]) -> int:
    asked = arguments().parse_args(argv)
    if asked.quiet:
        warnings.simplefilter("ignore", CompletionWarning)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupt)
    options = options_of(asked)
    session = RunSession(
        engine=asked.engine,
        prices=None if asked.prices is None else named_prices(asked.prices),
        home=asked.home,
        max_cost=asked.max_cost,
        max_total_tokens=asked.max_total_tokens,
        who=Asker(query_tag=asked.query_tag),
        progress=False if asked.quiet else None,
    )
    try:
        return run_file(asked, options, session)
    finally:
        session.close()


def named_prices(text: str) -> dict[str, str]:
    """Raises:
    InvalidOptionError: A part of the text is not NAME=AMOUNT.
    """
    pairs = [pair.partition("=") for pair in text.split(",")]
    if wrong := ["".join(pair) for pair in pairs if not pair[1]]:
        raise InvalidOptionError(f"--prices {wrong[0]!r} is not like input=0.15,output=0.6.")
    return {name.strip(): amount.strip() for name, _, amount in pairs}


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def run_file(asked: argparse.Namespace, options: Options, session: RunSession) -> int:
    call = Call.of(session.model(asked.model), options)
    fields = template_fields(asked.prompt)
    made = TablePrompts(asked.prompt, options.reorder_fields)
    table, identity, kind = opened_source(asked)
    source: Source = replace(table, window=size_for_prompts(made.own_bytes, made.most_mentions))
    place = None if is_database(asked.output) else place_of(asked.output, asked.format, default=kind)
    if place is not None:
        place = escaping(place, asked.escape_formulas)
    if not asked.dry_run:
        refuse_target(asked, place)
    if asked.limit is not None:
        source = Limited(source, whole(asked.limit))
    found = survey(source, identity, with_schema=place is not None and place.format != "jsonl")
    if place is not None:
        refuse_clash(found.names, asked.column, asked.details, "--column NAME")
    refuse_missing(fields, found.names)
    job = job_id(asked, options, call, identity)
    work = WindowedRun(session, asked.model, options, asked.prompt, job, asked.column, asked.details)
    if asked.dry_run:
        print_out(report(estimated(work, found)))
        return OK
    return complete_rows(asked, work, found, place)


def opened_source(asked: argparse.Namespace) -> tuple[FileSource | QuerySource, str, str | None]:
    """(source, identity, format) of the input."""
    if is_database(asked.input):
        return *query_source(asked.input, asked.table, asked.sql, asked.key), "jsonl"
    if asked.table or asked.sql:
        raise InputError(f"--table and --sql are for databases; {asked.input!r} is a file.")
    place = place_of(asked.input, asked.format)
    return *file_source(place), place.format


def refuse_target(asked: argparse.Namespace, place: TablePlace | None) -> None:
    if place is not None:
        if asked.into:
            raise InputError(f"--into is for databases; the output {asked.output!r} is a file.")
        refuse_output(place, asked.overwrite)
    elif asked.into is None or asked.key is None:
        raise InputError("To write into a database say --into TABLE and --key COLUMN, which tells the rows apart.")
    else:
        refuse_name(asked.into)


def complete_rows(asked: argparse.Namespace, work: WindowedRun, found: Survey, place: TablePlace | None) -> int:
    session = work.session
    tell = Teller(session, work, asked.quiet)
    tell.last_stop()
    try:
        with target_of(asked, place, found.schema) as target:
            if found.first is not None:
                run_whole(work, found.first, target)
            else:
                session.share_bar(asked.model, found.count)
                run_windows(work, found, target)
    except KeyboardInterrupt:
        tell.committed("Interrupted")
        return INTERRUPTED
    except (EngineError, StoreError):
        tell.committed("Stopped")
        raise
    end(work)
    tell.say(work.summary.line())
    return SOME_FAILED if work.summary.failed else OK


@contextmanager
def target_of(asked: argparse.Namespace, place: TablePlace | None, schema: Any) -> Iterator[Target]:
    if place is not None:
        with writing(place, asked.overwrite, schema) as writer:
            yield writer
        return
    database = open_database(database_url(asked.output))
    try:
        yield TableTarget(database, asked.into, asked.key, asked.column, asked.details)
    finally:
        database.close()


def estimated(work: WindowedRun, found: Survey) -> Estimate:
    """The estimate of all windows as one plan. Only here are all prompts in memory at the same time."""
    windows = [found.first] if found.first is not None else found.source.windows()
    made = TablePrompts(work.template, work.options.reorder_fields, ESTIMATE_PROMPT_BYTES, FEWER_ROWS)
    chunks = [chunk for rows in windows for chunk in made.of(rows).chunks]
    prompts = pa.chunked_array(chunks, pa.large_string())
    return work.session.estimate(work.model, prompts, work.options, work.job, planned=True)


def whole(limit: int) -> int:
    if limit < 0:
        raise InvalidOptionError(f"--limit {limit} must be a whole number, at least 0.")
    return limit


def options_of(asked: argparse.Namespace) -> Options:
    """The options, from `--option k=v` and from flags of their own. A flag overrides `--option`."""
    given = parse_pairs(asked.option)
    for name in ("temperature", "top_p", "top_k", "max_tokens", "seed", "stop", "cache"):
        if getattr(asked, name) is not None:
            given[name] = getattr(asked, name)
    if asked.reorder_fields:
        given["reorder_fields"] = True
    if asked.choices is not None:
        given["choices"] = [label.strip() for label in asked.choices.split(",")]
    if asked.strict:
        given["strict"] = True
    if asked.response_format is not None:
        try:
            given["response_format"] = Path(asked.response_format).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"The schema file {asked.response_format!r} cannot be read: {error}.") from error
    return parse_options(given)


def job_id(asked: argparse.Namespace, options: Options, call: Call, identity: str) -> str:
    """A name of the work, so that the same command finds the state of an interrupted run.

    A file counts by its path, not by its content: answers are kept by prompt and row, so changed rows are new anyway.
    """
    plain = asked.output == "-" or "://" in asked.output or is_database(asked.output)
    target = asked.output if plain else str(Path(asked.output).resolve())
    into = [asked.into, asked.key] if asked.into else []
    keys = [asked.prompt, target, asked.limit, options.cache, options.reorder_fields, asked.column, asked.details]
    what = [identity, call.fingerprint.hex(), *keys, *into]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


class Teller:
    """Tells a person about a run, on stderr."""

    def __init__(self, session: Session, work: WindowedRun, quiet: bool) -> None:
        self.session, self.work, self.quiet = session, work, quiet

    def say(self, text: str) -> None:
        if not self.quiet:
            print_err(text)

    @off_main
    def last_stop(self) -> None:
        """Tell how the last attempt of an unfinished run ended, in any window, and what it lost."""
        for job in reversed(self.work.jobs()):
            stop = last_stop(self.session.store, self.session.who.tenant, job)
            if stop is not None:
                self.say(stop.line())
                return

    @off_main
    def committed(self, what: str) -> None:
        tenant = self.session.who.tenant
        try:
            rows = sum(committed_rows(self.session.store, tenant, job) for job in self.work.jobs())
        except CompleteError:
            return
        self.say(f"{what} with {rows:,} rows committed. The same command goes on from there.")
