"""`complete-fn run`: a file in, the same rows with a column of answers out; resumable, atomic."""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

from complete_fn.answers import Answers
from complete_fn.cli import INTERRUPTED, OK, SOME_FAILED, Parser, add_home
from complete_fn.errors import CompleteError, EngineError, InputError, InvalidOptionError, StoreError
from complete_fn.estimate import estimate, report
from complete_fn.files import FORMATS, Place, Rows, place_of, read_rows
from complete_fn.keys import Call
from complete_fn.options import Options, parse_options
from complete_fn.outputs import refuse_output, write_rows
from complete_fn.prompts import render_column, template_fields
from complete_fn.reports import committed_rows, last_stop
from complete_fn.session import CompletionWarning, Session
from complete_fn.types import Asker

DESCRIPTION = """\
Make a prompt of every row, complete them all, and write the rows with the answers behind them.

  complete-fn run --model M --prompt 'Write a one-line synopsis: {description}' in.parquet -o out.parquet
  cat in.jsonl | complete-fn run -m M -p '{text}' --format jsonl - > out.jsonl

Exit code 0: every row has an answer; 3: some failed (--details says why); 1: the query is wrong; 130: interrupted.
An interrupted run, killed ones included, goes on where it was when the same command is given again."""


def arguments() -> Parser:
    parser = Parser("complete-fn run", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", help="a .parquet, .csv, .jsonl or .arrow file (.gz, .zst, .bz2 too), or - for stdin")
    add = parser.add_argument
    add("-m", "--model", required=True, help="a name of the catalogue, a local folder or a Hub id")
    add("-p", "--prompt", required=True, help="the template: {column} is replaced, {{ and }} are braces")
    add("-o", "--output", default="-", help="the file to write (default: -, stdout)")
    add("--format", choices=FORMATS, help="the format of stdin and stdout")
    add("--column", default="completion", help="name of the new column (default: completion)")
    add("--details", action="store_true", help="add error, usage, cost and source of each row as COLUMN_details")
    add("--limit", type=int, metavar="N", help="only the first N rows")
    add("--dry-run", action="store_true", help="only say what it would take: rows, tokens, price; starts no engine")
    add("--overwrite", action="store_true", help="replace an existing output")
    add("--temperature", type=float, help="0 to 2 (default: 0)")
    add("--top-p", type=float, help="above 0, at most 1 (default: 1)")
    add("--top-k", type=int, help="0 for all (default)")
    add("--max-tokens", type=int, help="tokens of an answer at most (default: the model's)")
    add("--seed", type=int)
    add("--stop", action="append", help="end the answer before this text; may be repeated")
    add("--response-format", metavar="FILE", help="a JSON schema that every answer satisfies")
    add("--option", action="append", default=[], metavar="K=V", help="any option by name; V is JSON or text")
    add("--cache", choices=("on", "off", "refresh"), help="use and keep answers, neither, or only keep (default: on)")
    add("--max-cost", metavar="AMOUNT", help="never spend more, in the currency of the model's prices")
    add("--strict", action="store_true", help="one failed row fails the run: exit code 1, no output")
    add("--engine", metavar="URL", help="an OpenAI-compatible endpoint to use in place of the model's own engine")
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
    session = Session(
        engine=asked.engine,
        home=asked.home,
        max_cost=asked.max_cost,
        who=Asker(query_tag=asked.query_tag),
        progress=False if asked.quiet else None,
    )
    try:
        return run_file(asked, options, session)
    finally:
        session.close()


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def run_file(asked: argparse.Namespace, options: Options, session: Session) -> int:
    call = Call(session.model(asked.model), options.sampling, options.response_format)
    fields = template_fields(asked.prompt)
    source = place_of(asked.input, asked.format)
    target = place_of(asked.output, asked.format, default=source.format)
    if not asked.dry_run:
        refuse_output(target, asked.overwrite)
    rows, piped = read_rows(source)
    refuse_clash(rows, asked.column, asked.details)
    if asked.limit is not None:
        rows = rows.limit(whole(asked.limit))
    prompts = render_column(asked.prompt, chosen_columns(rows, fields), rows.count)
    job = job_id(asked, options, call, piped)
    if asked.dry_run:
        print(report(estimate(call, prompts, session.store, Asker(job=job), options.cache, session.budget)))
        return OK
    return complete_rows(asked, options, session, rows, prompts, target, job)


def complete_rows(
    asked: argparse.Namespace, options: Options, session: Session, rows: Rows, prompts: Any, target: Place, job: str
) -> int:
    tell = Teller(session, job, asked.quiet)
    tell.last_stop()
    try:
        answers = session.complete(asked.model, prompts, options, job, planned=True)
    except KeyboardInterrupt:
        tell.committed("Interrupted")
        return INTERRUPTED
    except (EngineError, StoreError):
        tell.committed("Stopped")
        raise
    write_rows(target, rows, new_columns(answers, asked.column, asked.details), asked.overwrite)
    session.end_job(job)
    tell.say(answers.summary.line())
    return SOME_FAILED if answers.summary.failed else OK


def chosen_columns(rows: Rows, fields: list[str]) -> dict[str, Any]:
    for name in fields:
        if name not in rows.names:
            near = difflib.get_close_matches(name, rows.names, 1)
            hint = f" Did you mean {{{near[0]}}}?" if near else ""
            there = ", ".join(rows.names) or "none"
            raise InputError(f"The prompt names {{{name}}}, which is no column.{hint} Columns: {there}.")
    return {name: rows.column(name) for name in fields}


def new_columns(answers: Answers, column: str, details: bool) -> dict[str, Any]:
    found = {column: answers.text}
    return {**found, f"{column}_details": answers.details} if details else found


def refuse_clash(rows: Rows, column: str, details: bool) -> None:
    for name in (column, f"{column}_details") if details else (column,):
        if name in rows.names:
            raise InputError(f"The input already has a column {name!r}. Name the new one with --column NAME.")


def whole(limit: int) -> int:
    if limit < 0:
        raise InvalidOptionError(f"--limit {limit} must be a whole number, at least 0.")
    return limit


def options_of(asked: argparse.Namespace) -> Options:
    """Options from `--option k=v` and from their own flags, which win."""
    given: dict[str, Any] = {}
    for pair in asked.option:
        name, equals, text = pair.partition("=")
        if not equals:
            raise InvalidOptionError(f"--option {pair!r} is not of the form name=value.")
        try:
            given[name] = json.loads(text)
        except ValueError:
            given[name] = text
    for name in ("temperature", "top_p", "top_k", "max_tokens", "seed", "stop", "cache"):
        if getattr(asked, name) is not None:
            given[name] = getattr(asked, name)
    if asked.strict:
        given["strict"] = True
    if asked.response_format is not None:
        try:
            given["response_format"] = Path(asked.response_format).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"The schema file {asked.response_format!r} cannot be read: {error}.") from error
    return parse_options(given)


def job_id(asked: argparse.Namespace, options: Options, call: Call, piped: bytes | None) -> str:
    """Names the work, so that the same command finds what an interrupted one left.

    The input counts by its path, not its content: answers are kept by prompt and row, so changed rows are new anyway.
    """
    source = str(Path(asked.input).resolve()) if piped is None else hashlib.sha256(piped).hexdigest()
    target = asked.output if asked.output == "-" else str(Path(asked.output).resolve())
    what = [source, call.fingerprint.hex(), asked.prompt, target, asked.limit, options.cache]
    return hashlib.sha256(json.dumps(what).encode("utf-8", "surrogatepass")).hexdigest()


class Teller:
    """What a person is told of a run on stderr."""

    def __init__(self, session: Session, job: str, quiet: bool) -> None:
        self.session, self.job, self.quiet = session, job, quiet

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr)

    def last_stop(self) -> None:
        """How the last attempt of an unfinished job ended, and what was lost with it."""
        stop = last_stop(self.session.store, self.session.who.tenant, self.job)
        if stop is not None:
            self.say(stop.line())

    def committed(self, what: str) -> None:
        try:
            rows = committed_rows(self.session.store, self.session.who.tenant, self.job)
        except CompleteError:
            return
        self.say(f"{what} with {rows:,} rows committed. The same command goes on from there.")
