"""The reference pages, written from the code when the site is built, so that nothing in them is typed twice.

`pages()` gives each page's text by its path.
"""

from __future__ import annotations

import inspect
import json
import re
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields
from importlib.resources import files
from types import ModuleType
from typing import Any

from fastapi import FastAPI

from complete_fn import __version__, errors, settings
from complete_fn.cli import main as cli
from complete_fn.client import Client, RemoteJob
from complete_fn.engines import http_engine
from complete_fn.engines.catalogue import Model, Prices, load_catalogue
from complete_fn.errors import CompleteError, InvalidOptionError
from complete_fn.execution.answers import DETAILS
from complete_fn.ledger.usage import GROUPS, UsageLine
from complete_fn.prompts.options import OPTIONS, Options, parse_options
from complete_fn.registry import VERBS, resolve
from complete_fn.server.app import DESCRIPTION as API
from complete_fn.server.app import ROUTERS
from complete_fn.session import Session
from complete_fn.types import SamplingParams
from complete_fn_connectors import duckdb as in_duckdb
from complete_fn_connectors import polars as in_polars
from complete_fn_connectors.duckdb.job_functions import register_jobs
from complete_fn_connectors.duckdb.register import sql_type
from complete_fn_connectors.polars import expressions
from complete_fn_connectors.sql_functions import FUNCTIONS, SqlFunction, functions_of
from complete_fn_workers.swiftkv.cli import USAGE as SWIFTKV_USAGE
from complete_fn_workers.swiftkv.cli import VERBS as SWIFTKV_VERBS
from docs.markdown import block, code, code_lines, documented, page, sentence, table, text
from docs.openapi import routes
from docs.parsers import parser_of, verb_section

POLARS = ("ask", "complete", "configure", "count_tokens", "prompt", "summary", "try_complete")  # beginnings of names
WRONG = b""  # no option takes it, so its refusal says what an option takes


def pages() -> dict[str, str]:
    """Text by path, of every generated page and file."""
    return {
        "reference/options.md": options_page(),
        "reference/functions.md": functions_page(),
        "reference/python.md": python_page(),
        "reference/cli.md": cli_page(),
        "reference/settings.md": settings_page(),
        "reference/models.md": models_page(),
        "reference/errors.md": errors_page(),
        "reference/ledger.md": ledger_page(),
        "reference/rest.md": rest_page(),
        "openapi.json": json.dumps(api(), indent=1),
    }


# -- options, functions, Python


def option_default(name: str) -> str:
    known = {f.name: f for kind in (Options, SamplingParams) for f in fields(kind)}
    given = known[name].default
    return "not set" if given in (None, ()) else code(json.dumps(given))


def option_range(name: str) -> str:
    """What an option takes, as its refusal says."""
    try:
        parse_options({name: WRONG})
    except InvalidOptionError as error:
        told = str(error).removeprefix(f"{name} = {WRONG!r} ").rstrip(".").partition(". ")[0]
        return text(re.sub(r"^(must be|is not) ", "", told))
    raise AssertionError(f"parse_options takes {WRONG!r} for {name}.")


def options_page() -> str:
    flags = {a.dest: a.option_strings[-1] for a in verb_parser("run")._actions if a.dest in OPTIONS}
    return page(
        "Options",
        "Every option of a call, with its default, what it takes and its flag in the shell.",
        "An option that is unknown or out of range is refused before the first row is paid. In SQL, options are the "
        "last argument, a struct: `complete(model, prompt, {'max_tokens': 40})`. In Polars they are keywords, in jobs "
        "of the REST API the object `options`, in PostgreSQL the argument `options` of type `jsonb`.\n",
        "The functions that write their own prompt (`complete_classify` and its like) take `template` too: a version "
        "of the built-in prompt such as `'v1'`, or your own prompt with `{text}` in it.\n",
        "`/v1/chat/completions` and `/v1/completions` keep OpenAI's own names and defaults: see [REST](rest.md).\n",
        *(
            f"## {name}\n\n{option.what}\n\nDefault: {option_default(name)}. Takes: {option_range(name)}. "
            f"Shell: {code(flags.get(name, f'--option {name}=...'))}.\n"
            for name, option in OPTIONS.items()
        ),
    )


def meaning(function: Callable[..., Any]) -> str:
    """The first paragraph of a docstring, without the shape that our own functions begin with."""
    told = (inspect.getdoc(function) or "").partition("\n\n")[0]
    return sentence(re.sub(r"^\[n\] ([A-Z]+|\w+\d*)[:;.] |^\[n\] ", "", told))


def function_rows(functions: Mapping[str, SqlFunction]) -> list[tuple[str, ...]]:
    short = {DETAILS: "[details](#details)"}
    return [
        (
            code_lines(entry.form.partition("; in a cursor")[0]),
            short.get(entry.result, code(sql_type(entry.result))),
            meaning(entry.function),
        )
        for entry in functions.values()
    ]


def sql_functions(file: str, pattern: str) -> list[tuple[str, str]]:
    """(call, result) of each function that an SQL file of the package makes."""
    script = files("complete_fn_sql").joinpath(file).read_text("utf-8")
    found = re.findall(pattern, script, re.S)
    return [
        (f"{name}({' '.join(arguments.split())})", re.sub(r"(?<=\() | (?=\))", "", " ".join(result.split())))
        for name, arguments, result in found
    ]


def cortex_macros() -> list[str]:
    """The calls that each macro of Snowflake's older names takes."""
    script = files("complete_fn_sql").joinpath("cortex_catalog.sql").read_text("utf-8")
    rows = []
    for name, body in re.findall(r"CREATE MACRO (snowflake\.cortex\.\w+)(.*?);", script, re.S):
        calls = re.findall(r"^\s*(\([\w, ]+\))\s+AS", body, re.M)
        rows.append(" ".join(code(f"{name.upper()}{call}") for call in calls))
    return rows


def functions_page() -> str:
    ours = {name: found for name, found in FUNCTIONS.items() if name.startswith("ai_") and "_with_" not in name}
    details = ",\n".join(f"    {field}" for field in re.split(r", (?![^(]*\))", sql_type(DETAILS)[len("STRUCT(") : -1]))
    made = r'CREATE OR REPLACE FUNCTION :"schema"\.(\w+)\((.*?)\)\s+(RETURNS .*?)?\s*LANGUAGE'
    external = r"CREATE OR REPLACE (?:EXTERNAL )?FUNCTION (?:`[^`]*`\.)?(\w+)\((.*?)\)\s+RETURNS (\S+(?:\(\d+\))?)"
    warehouses = [
        (label, code(call), code(result))
        for label in ("snowflake", "bigquery", "redshift")
        for call, result in sql_functions(f"{label}.sql", external)
    ]
    return page(
        "Functions",
        "Every SQL function with its arguments and its result.",
        "## DuckDB\n",
        table(("call", "result", "what it gives"), function_rows(functions_of(cortex=False))),
        "`options` is a struct; see [options](options.md). `labels` is a list of texts or of `{label, description}`; "
        "`fields` is a list of names or a struct of questions by name.\n",
        "### Details\n",
        block(f"STRUCT(\n{details}\n)", "sql"),
        "## DuckDB with `cortex=True`\n",
        table(("call", "result", "what it gives"), function_rows(ours)),
        "And Snowflake's older names:\n",
        "\n".join(f"- {calls}" for calls in cortex_macros()) + "\n",
        "## Polars\n",
        "Every expression is also a method of the namespace `.llm`, where the expression is the prompt: "
        + ", ".join(code(f".llm.{n}") for n in llm_names())
        + ".\n",
        *(documented(name, function) for name, function in public(in_polars) if name.startswith(POLARS)),
        "## PostgreSQL\n",
        table(
            ("call", "result"),
            [
                (code_lines(c), code(r.removeprefix("RETURNS ")) if r else "the OUT columns")
                for c, r in sql_functions("postgres_install.sql", made)
            ],
        ),
        "## Warehouses\n",
        table(("in", "call", "result"), warehouses),
    )


def llm_names() -> list[str]:
    """The methods of the namespace `.llm`, those that come from the table of functions as well."""
    own = [name for name, _ in public(expressions.Llm)]
    of_table = [name.removeprefix("complete_") for name in functions_of(cortex=False) if name.startswith("complete_")]
    return own + [name for name in of_table if name not in own and name != "details"]


def public(home: ModuleType | type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The functions of a class, or of a module or what it is the front door of, in their order."""
    own = home.__name__
    for name, value in vars(home).items():
        if not inspect.isfunction(value) or name.startswith("_"):
            continue
        if not isinstance(home, ModuleType) or f"{value.__module__}.".startswith(f"{own}."):
            yield name, value


def python_page() -> str:
    return page(
        "Python",
        "The Python names that a program calls: DuckDB's, a service's client, and the session below them.",
        "## DuckDB\n",
        "From `complete_fn_connectors.duckdb`.\n",
        *(
            documented(f.__name__, f)
            for f in (in_duckdb.register, in_duckdb.sql, in_duckdb.explain, in_duckdb.estimate)
        ),
        documented("Registration", in_duckdb.Registration),
        *(
            documented(f"Registration.{n}", f, 4)
            for n, f in public(in_duckdb.Registration)
            if n in ("summary", "interrupt", "close")
        ),
        "From `complete_fn_connectors.duckdb.job_functions`.\n",
        documented("register_jobs", register_jobs),
        "## A service's client\n",
        "From `complete_fn`.\n",
        documented("Client", Client),
        *(documented(f"Client.{n}", f, 4) for n, f in public(Client) if n not in ("told", "ask")),
        documented("RemoteJob", RemoteJob),
        *(documented(f"RemoteJob.{n}", f, 4) for n, f in public(RemoteJob)),
        "## Session\n",
        "From `complete_fn`. What the connectors and the shell are built on.\n",
        documented("Session", Session),
        *(
            documented(f"Session.{n}", getattr(Session, n), 4)
            for n in ("complete", "estimate", "count_tokens", "close")
        ),
    )


# -- the shell


def verb_parser(verb: str, *words: str) -> ArgumentParser:
    """The parser of a verb of the shell."""
    return parser_of(resolve(VERBS[verb].target), *words)


def cli_page() -> str:
    sections = []
    for name, verb in VERBS.items():
        if name == "swiftkv":
            told = dict(re.findall(r"^  (\w+) +(.*)$", SWIFTKV_USAGE, re.M))
            sections.append(f"## complete-fn {name}\n\n{sentence(verb.what)}\n")
            sections += [verb_section(verb_parser(name, word), 3, told[word]) for word in (*SWIFTKV_VERBS, "check")]
        else:
            sections.append(verb_section(verb_parser(name), 2, verb.what))
    codes = (inspect.getdoc(cli.main) or "").partition("Returns:")[2]
    verbs = [(f"[{name}](#complete-fn-{name})", sentence(verb.what)) for name, verb in VERBS.items()]
    return page(
        "Command line",
        "Every verb of `complete-fn` with its arguments.",
        table(("verb", "what it does"), verbs),
        f"Exit codes: {text(codes)}\n",
        *sections,
    )


# -- settings, models, errors, ledger


def settings_page() -> str:
    """From the docstring of the one module that reads the environment."""
    entries: list[tuple[list[str], list[str]]] = []
    for line in (settings.__doc__ or "").splitlines():
        found = re.match(r"((?:COMPLETE_FN_\w+(?:, )?)+)\s*(.*)", line)
        if found:
            entries.append((found[1].split(", "), [found[2]]))
        elif line.strip() and entries:
            entries[-1][1].append(line.strip())
    read = set(re.findall(r'"(COMPLETE_FN_\w+)"', inspect.getsource(settings)))
    if missing := read - {name for names, _ in entries for name in names}:
        raise AssertionError(f"The settings read {sorted(missing)}, which their docstring does not explain.")
    rows = []
    for names, lines in entries:
        told = " ".join(lines).strip()
        default = re.search(r" \(default: (.*)\)", told)
        what = told.replace(default[0], "") if default else told
        more = f" Default: {text(default[1])}." if default else ""
        rows.append(f"- {', '.join(map(code, names))}: {sentence(what)}{more}")
    return page(
        "Settings",
        "Every environment variable that complete-fn reads.",
        "\n".join(rows) + "\n",
        "A flag or an argument (`--home`, `home=`) goes before its variable. Keys of endpoints are read from the "
        "variable that a model's `api_key_env` names, URLs of databases from the one that `env:NAME` or `--url-env` "
        "names; `CUDA_VISIBLE_DEVICES` says which accelerators there are.\n",
    )


def models_page() -> str:
    found = load_catalogue().values()
    kinds = [
        (
            code(m.name),
            text(m.checkpoint.removeprefix("package:complete_fn_workers/models/")),
            text(m.licence + (", gated" if m.gated else "")),
            text(m.download),
            f"{m.max_model_len:,}" if m.max_model_len else "the model's",
            text(m.tried),
        )
        for m in found
    ]
    prices = [
        (
            code(m.name),
            *map(str, (m.prices.input, m.prices.cached_input, m.prices.output)),
            f"{m.prices.currency}, {m.prices.basis}",
        )
        for m in found
    ]
    own = [
        (
            code(f.name),
            code(str(f.type)),
            "" if f.default in (MISSING, None, "", ()) or isinstance(f.default, Prices) else code(f.default),
        )
        for f in fields(Model)
        if f.name != "name"
    ]
    arguments = re.findall(r"^    (\w+) +(.*(?:\n {20,}.*)*)", http_engine.__doc__ or "", re.M)
    return page(
        "Models",
        "The built-in catalogue: checkpoints, licences, prices, and where each model was really run.",
        table(("model", "checkpoint", "licence", "download", "context", "tried"), kinds),
        "Nobody has run the models marked `not tried` or `GPU: not run yet` with complete-fn so far. A folder with a "
        "checkpoint, a Hub id (`owner/name`) and "
        "any OpenAI-compatible URL is a model too.\n",
        "## Where they fit\n",
        table(
            ("model", "hardware", "note"),
            [(code(m.name), text(m.nodes), text(m.note)) for m in found if m.nodes or m.note],
        ),
        "## Prices\n",
        "Per million tokens. Prices with the basis `example` are arithmetic, not an offer: set your own.\n",
        table(("model", "input", "cached input", "output", "currency, basis"), prices),
        "## Fields of models.toml\n",
        "Your own file (`COMPLETE_FN_MODELS`) adds entries `[models.NAME]` or changes fields of built-in ones.\n",
        table(("field", "type", "default"), own),
        "`prices` has the fields " + ", ".join(code(f.name) for f in fields(Prices)) + ". With the embedded engine, "
        "`engine_args` are vLLM's own. With a `url` they are:\n",
        table(("engine_args", "what it sets"), [(code(n), text(w)) for n, w in arguments]),
    )


def tree(kind: type[CompleteError], depth: int = 0) -> Iterator[tuple[type[CompleteError], int]]:
    yield kind, depth
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from tree(child, depth + 1)


def errors_page() -> str:
    whose = re.findall(r"^[├└]── (\w+)\s+(.*)", errors.__doc__ or "", re.M)
    rows = [
        (
            "&nbsp;" * 4 * depth + code(kind.__name__),
            code(kind.code),
            str(kind.status),
            "yes" if kind.retryable else "no",
            text(kind.__doc__),
        )
        for kind, depth in tree(CompleteError)
    ]
    return page(
        "Errors",
        "Every error of a query or a request, and every reason why one row has no answer.",
        "## Errors of a query\n",
        "They are raised before the first row is paid, except where an engine or the store fails on the way. Over REST "
        "the reply has the status, and `error.code`; in Python the class is in `complete_fn.errors`. *Retryable* says "
        "whether the same request may succeed later.\n",
        table(("class", "code", "HTTP", "retryable", "default message"), rows),
        "Who can act:\n",
        "\n".join(f"- `{name}`: {text(told)}." for name, told in whose) + "\n",
        "## Row errors\n",
        "A row error is a value: `complete` gives NULL and warns once, `complete_details` has the code in "
        "`error.code`, `strict` raises it. A row error is never stored, so the next run asks again.\n",
        table(("code", "meaning"), [(code(c), sentence(m)) for c, m in errors.ROW_ERRORS.items()]),
    )


def ledger_page() -> str:
    told = text((inspect.getdoc(UsageLine) or "").partition("\n\n")[2])
    return page(
        "Usage columns",
        "The columns of `complete-fn usage` and `/v1/usage`, and what they can be grouped by.",
        f"Groups: {', '.join(map(code, GROUPS))}.\n",
        f"Columns: {', '.join(code(f.name) for f in fields(UsageLine) if f.name != 'group')}.\n",
        told + "\n",
    )


# -- REST


def api() -> dict[str, Any]:
    """The OpenAPI document of the service's routes."""
    app = FastAPI(title="complete-fn", version=__version__, description=API)
    for router in ROUTERS:
        app.include_router(router)
    return app.openapi()


def rest_page() -> str:
    document = api()
    return page(
        "REST",
        "Every route of the service, from its OpenAPI document.",
        text(document["info"]["description"]) + "\n",
        "Send the API key as `Authorization: Bearer KEY`. [Errors](errors.md) lists the codes. The same as a file: "
        "[openapi.json](../openapi.json). A running service shows it at `/docs`.\n",
        *routes(document),
    )
