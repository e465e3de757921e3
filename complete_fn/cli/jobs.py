"""`complete-fn jobs` runs bulk work on a service, from the shell."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from complete_fn.cli.local_state import print_table
from complete_fn.cli.main import ESCAPE, INTERRUPTED, OK, SOME_FAILED, Parser, parse_pairs
from complete_fn.cli.terminal import print_err, print_out
from complete_fn.client import Client, RemoteJob
from complete_fn.errors import CompleteError, InputError
from complete_fn.rows.formats import FORMATS, TablePlace, escaping, place_of
from complete_fn.rows.object_storage import remote
from complete_fn.rows.writers import is_device, refuse_output, whole_file
from complete_fn.settings import secret

DESCRIPTION = """\
Run jobs on a service (`complete-fn serve`).

  complete-fn jobs submit in.parquet -m M -p 'Name the section: {description}' --wait -o out.parquet
  complete-fn jobs submit s3://in/docs.parquet -m M -p '{text}' --sink-uri s3://out/answers.parquet
  complete-fn jobs submit --connection crm --sql 'SELECT id, text FROM docs' -m M -p '{text}' \\
      --sink-connection crm --sink-table answers --key id --wait

A FILE that exists is only replaced with --overwrite.
The service's address is --url or COMPLETE_FN_URL; an API key is taken from COMPLETE_FN_KEY."""
HERE = "http://127.0.0.1:8000"


def main(argv: list[str]) -> int:
    parser = Parser("complete-fn jobs", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(
        dest="verb",
        required=True,
        metavar="submit|list|show|wait|results|cancel|rerun|deliver|delete",
        parser_class=Parser,
    )
    add_submit(verbs.add_parser("submit", help="begin a job over a .parquet, .csv or .jsonl file; prints its id"))
    add_filters(verbs.add_parser("list", help="the newest jobs"))
    for name, what in (
        ("show", "how far a job is"),
        ("wait", "until a job is over, with a bar"),
        ("results", "write a job's rows with their answers"),
        ("cancel", "stop a job; the rows that are done stay"),
        ("rerun", "run a job's failed rows again"),
        ("deliver", "write a job's results to its sink again"),
        ("delete", "delete a job's input, results and stored answers"),
    ):
        verbs.add_parser(name, help=what).add_argument("id", help="of the job")
    add_output(verbs.choices["results"], required=True)
    verbs.choices["rerun"].add_argument("--max-cost", metavar="AMOUNT", help="another cap for the whole job")
    for each in verbs.choices.values():
        each.add_argument("--url", default=secret("COMPLETE_FN_URL") or HERE, help=f"of the service (default: {HERE})")
    asked = parser.parse_args(argv)
    client = Client(asked.url, secret("COMPLETE_FN_KEY"))
    try:
        return ON_JOB[asked.verb](asked, client)
    finally:
        client.close()


def add_filters(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--status", action="append", metavar="STATUS", help="only such jobs: queued, running, completed, ..; repeatable"
    )
    add("-m", "--model", help="only jobs of this model")
    add("--query-tag", metavar="TAG", help="only jobs with this tag")
    add("--limit", type=int, default=20, metavar="N", help="how many (default: 20)")


def add_submit(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("input", nargs="?", help="a file to upload, or a URI that the service reads (with ://)")
    add("--connection", metavar="NAME", help="registered with the service, for --sql")
    add("--sql", metavar="SELECT", help="one statement for --connection")
    add("--sink-uri", metavar="URI", help="the service writes the results there, under a root that it allows")
    add("--sink-connection", metavar="NAME", help="the service writes the results into --sink-table of it")
    add("--sink-table", metavar="TABLE", help="made if missing; written by upsert")
    add("--key", metavar="COLUMN", help="of the source; under it a row is written to --sink-table")
    add("-m", "--model", required=True, help="a name of the service's catalogue")
    add("-p", "--prompt", required=True, help="the template: {column} is replaced, {{ and }} are braces")
    add("--column", default="completion", help="name of the new column (default: completion)")
    add("--option", action="append", default=[], metavar="K=V", help="any option by name; V is JSON or text")
    add("--max-cost", metavar="AMOUNT", help="never spend more, in the currency of the model's prices")
    add("--query-tag", metavar="TAG", help="marks the job's lines in the ledger")
    add("--idempotency-key", metavar="KEY", help="submitting again with the same key finds the first job")
    add("--wait", action="store_true", help="until the job is over, with a bar")
    add_output(parser, required=False)


def add_output(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument("-o", "--output", required=required, metavar="FILE", help=".parquet, .csv, .jsonl or .arrow")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--details", action="store_true", help="add error, usage, cost and source of each row")
    parser.add_argument("--escape-formulas", action="store_true", help=ESCAPE)


def submit(asked: argparse.Namespace, client: Client) -> int:
    place = None if asked.output is None else target_of(asked)
    job = client.submit(
        source_of(asked),
        asked.model,
        asked.prompt,
        sink=sink_of(asked),
        options=parse_pairs(asked.option),
        column=asked.column,
        max_cost=asked.max_cost,
        query_tag=asked.query_tag,
        idempotency_key=asked.idempotency_key,
    )
    print_out(job.id)
    if not (asked.wait or asked.output):
        return OK
    return follow(job, place, asked)


def source_of(asked: argparse.Namespace) -> Any:
    if (asked.input is None) == (asked.connection is None) or (asked.connection is None) != (asked.sql is None):
        raise InputError("Name a file or a URI, or --connection together with --sql.")
    if asked.connection is not None:
        return {"connection": asked.connection, "sql": asked.sql}
    return {"uri": asked.input} if "://" in asked.input else asked.input


def sink_of(asked: argparse.Namespace) -> dict[str, Any] | None:
    """The sink as the flags name it. The service checks it."""
    names = {"uri": asked.sink_uri, "connection": asked.sink_connection, "table": asked.sink_table, "key": asked.key}
    names["escape_formulas"] = asked.escape_formulas or None if asked.sink_uri else None
    return {name: value for name, value in names.items() if value is not None} or None


def follow(job: RemoteJob, place: TablePlace | None, asked: argparse.Namespace) -> int:
    """Wait for a job and write its results. Ctrl-C ends the wait, and the job goes on."""
    try:
        state = job.wait()
    except KeyboardInterrupt:
        print_err(f"The job goes on: complete-fn jobs wait {job.id}")
        return INTERRUPTED
    if place is not None:
        try:
            write(job, place, asked)
        except CompleteError as error:
            more = " --details" * asked.details + " --escape-formulas" * asked.escape_formulas
            again = f"complete-fn jobs results {job.id} -o {shlex.quote(place.name)}{more}"
            raise type(error)(f"{error} The job is over: `{again}` writes its rows.") from error
    print_err(line(state))
    return SOME_FAILED if state["rows"]["failed"] or state["status"] != "completed" else OK


def target_of(asked: argparse.Namespace) -> TablePlace:
    """The output of the results, after a check that it can be written.

    Raises:
        InputError: The output has no suffix of a format, exists already, or cannot be written.
    """
    if remote(asked.output):
        raise InputError(f"{asked.output!r} is no file here. A job over it writes there with --sink-uri.")
    place = place_of(asked.output, "none")
    if place.format not in FORMATS or place.compression is not None:
        raise InputError(f"The format of {place.name!r} is not known: end it with .parquet, .csv, .jsonl or .arrow.")
    refuse_output(place, asked.overwrite)
    return escaping(place, asked.escape_formulas)


def write(job: RemoteJob, place: TablePlace, asked: argparse.Namespace) -> None:
    path = Path(place.name)
    try:
        with path.open("wb") if is_device(path) else whole_file(path.resolve(), place, asked.overwrite) as sink:
            for chunk in job.download(place.format, asked.details, place.escape_formulas):
                sink.write(chunk)
    except OSError as error:
        raise InputError(f"The output {place.name!r} cannot be written: {error.strerror or error}.") from error


def line(state: dict[str, Any]) -> str:
    rows, cost = state["rows"], state["cost"]
    failed = f", {rows['failed']:,} failed" if rows["failed"] else ""
    return f"{state['status']}: {rows['done']:,} of {rows['total']:,} rows{failed}, {cost['currency']} {cost['amount']}"


def list_jobs(asked: argparse.Namespace, client: Client) -> int:
    lines = [
        (
            job["id"],
            job["status"],
            job["model"],
            f"{job['rows']['done']:,}/{job['rows']['total']:,}",
            job["cost"]["amount"],
            datetime.fromtimestamp(job["created_at"]).strftime("%Y-%m-%d %H:%M"),
        )
        for job in client.jobs(asked.limit, asked.status, asked.model, asked.query_tag)
    ]
    print_table([("ID", "STATUS", "MODEL", "ROWS", "COST", "CREATED"), *lines])
    return OK


def show(asked: argparse.Namespace, client: Client) -> int:
    state = client.job(asked.id).state()
    print_out(line(state))
    if state["eta_seconds"] is not None:
        print_out(f"about {state['eta_seconds']:,.0f} s left")
    if state["error"]:
        print_out(state["error"])
    if state["sink"]:
        written, why = f"sink {state['sink']['status']}: {state['sink']['rows']:,} rows", state["sink"]["error"]
        print_out(f"{written}; {why}" if why else written)
    return OK


def results(asked: argparse.Namespace, client: Client) -> int:
    write(client.job(asked.id), target_of(asked), asked)
    return OK


def cancel(asked: argparse.Namespace, client: Client) -> int:
    client.job(asked.id).cancel()
    return OK


def rerun(asked: argparse.Namespace, client: Client) -> int:
    client.job(asked.id).rerun(asked.max_cost)
    return OK


def deliver(asked: argparse.Namespace, client: Client) -> int:
    client.job(asked.id).deliver()
    return OK


def delete(asked: argparse.Namespace, client: Client) -> int:
    client.job(asked.id).delete()
    return OK


ON_JOB: dict[str, Callable[[argparse.Namespace, Client], int]] = {
    "submit": submit,
    "list": list_jobs,
    "show": show,
    "wait": lambda asked, client: follow(client.job(asked.id), None, asked),
    "results": results,
    "cancel": cancel,
    "rerun": rerun,
    "deliver": deliver,
    "delete": delete,
}
