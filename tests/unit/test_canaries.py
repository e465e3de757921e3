"""Canaries can fail: each names what is missing. And nothing of another library's insides is read past its module."""

from __future__ import annotations

import ast
import asyncio
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

import complete_fn_workers
from complete_fn_workers import celery_internals
from complete_fn_workers.engine import vllm_internals
from tests.canaries import Need, complaint, needs_in, without

ROOT = Path(__file__).parents[2]
ROOMS = ("complete_fn", "connectors/complete_fn_connectors", "sql/complete_fn_sql", "workers/complete_fn_workers")
WORKERS = Path(complete_fn_workers.__file__ or "").parent
SHIPPED = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
SOURCES = [*SHIPPED, *(path for room in ("benchmarks", "deploy") for path in sorted((ROOT / room).rglob("*.py")))]
MODULES = {"vLLM": vllm_internals, "Celery": celery_internals}
INTERNALS = {library: Path(module.__file__ or "") for library, module in MODULES.items()}
TABLES = {library: needs_in(module.__doc__ or "") for library, module in MODULES.items()}
# What only one module reads, so that this module is its table.
OTHERS = {
    "SQLAlchemy": Need(
        "sqlalchemy.dialects.mysql.base:MySQLDialect",
        "is_mariadb",
        "rows/result_tables.py",
        "to choose a collation that the server has",
        "The dialect's name is that of the URL.",
    ),
    "uvicorn": Need(
        "uvicorn:Server", "should_exit", "server/worker_api.py", "to end a server in a thread", "There is no stop()."
    ),
}
STARTED = OTHERS["uvicorn"]._replace(name="started", purpose="to know when its server listens")
# Named with an underscore, and documented all the same.
DOCUMENTED = {"_mapping": "SQLAlchemy's rows", "_exit": "os", "_getframe": "sys"}
# What vLLM exports, and what its documentation tells authors of plug-ins and models to import.
OFFERED = (
    "vllm",
    "vllm.config",
    "vllm.inputs",
    "vllm.sampling_params",
    "vllm.platforms",
    "vllm.plugins",
    "vllm.distributed",
    "vllm.sequence",
    "vllm.compilation.decorators",
    "vllm.model_executor.layers.",
    "vllm.model_executor.models.",
    "vllm.v1.sample.logits_processor",
    "vllm.v1.worker.gpu.sample.logits_processor",
)
NAMED = [(library, need) for library, needs in TABLES.items() for need in needs]


@pytest.mark.parametrize(("library", "need"), NAMED, ids=str)
def test_what_is_missing_is_named_with_its_reader(library: str, need: Need) -> None:
    others = TABLES[library]
    message = complaint(library, "99.0", need, without(need, others)) or ""
    assert message.startswith(f"{library} 99.0 has no {need}, which {need.reader} need")
    for other in others:
        if other.owner == need.owner and other.name != need.name:
            assert complaint(library, "99.0", other, without(need, others)) is None


def test_a_module_or_class_that_is_gone_is_named_too() -> None:
    for owner in ("json.nothing:Request", "json:Nothing"):
        gone = NAMED[0][1]._replace(owner=owner)
        assert (complaint("vLLM", "99.0", gone) or "").startswith(f"vLLM 99.0 has no {owner}, whose {gone.name} ")


def test_every_entry_says_who_reads_it_for_what_and_why_not_publicly() -> None:
    for library, needs in TABLES.items():
        text = INTERNALS[library].read_text()
        assert len(needs) == len(set(needs)) > 4
        for need in needs:
            assert all((WORKERS / reader).is_file() for reader in need.reader.split(" and ")), need
            assert need.purpose.startswith("to "), need
            assert need.reason.endswith("."), need
        # No line of the table went unread.
        table = [line for line in text.splitlines() if line.startswith(f"{library.lower()}.")]
        assert {line.split()[0] for line in table} == {need.owner for need in needs}


@pytest.mark.canary
@pytest.mark.parametrize(("library", "need"), [*OTHERS.items(), ("uvicorn", STARTED)], ids=str)
def test_other_libraries_still_have(library: str, need: Need) -> None:
    assert need.name in (ROOT / "complete_fn" / need.reader).read_text()
    missing = complaint(library, version(library), need)
    assert not missing, missing
    assert need.name in (complaint(library, version(library), need, type("Empty", (), {})) or "")


@pytest.mark.canary
def test_fastapi_still_says_which_route_a_request_took() -> None:
    seen: list[str] = []
    app = FastAPI()

    @app.get("/jobs/{job}")
    def job(job: str) -> str:
        return job

    async def noting(scope: Any, receive: Any, send: Any) -> None:
        await app(scope, receive, send)
        seen.append(getattr(scope.get("route"), "path", "none"))

    async def ask() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(noting), base_url="http://test") as client:
            assert (await client.get("/jobs/7")).status_code == 200

    asyncio.run(ask())
    why = f"FastAPI {version('fastapi')} has no scope['route'].path, which server/metrics.py needs to count by route."
    assert seen == ["/jobs/{job}"], why


def private_names(tree: ast.AST) -> Iterator[str]:
    """Of other objects than `self`, and of modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = node.value
            if not (isinstance(owner, ast.Name) and owner.id in ("self", "cls")):
                yield node.attr


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def test_private_names_are_read_in_no_other_module() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in SOURCES
        if path not in INTERNALS.values()
        for name in private_names(ast.parse(path.read_text()))
        if name not in DOCUMENTED
    }
    assert not found


def test_a_private_name_is_seen() -> None:
    tree = ast.parse("from torch import _dynamo\nlimit = torch._dynamo.config\nself._own = row.__class__")
    assert list(private_names(tree)) == ["_dynamo", "_dynamo"]


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def is_offered(module: str) -> bool:
    return any(module == name or (name.endswith(".") and f"{module}.".startswith(name)) for name in OFFERED)


@pytest.mark.parametrize("library", INTERNALS)
def test_only_its_module_imports_a_librarys_insides(library: str) -> None:
    top = library.lower()
    """Of what is shipped: a benchmark may look into the peer that it times."""
    offered = is_offered if library == "vLLM" else lambda module: module in ("celery", "celery.exceptions")
    found = {
        f"{path.relative_to(ROOT)}: {module}"
        for path in SHIPPED
        if path != INTERNALS[library]
        for module in imported(ast.parse(path.read_text()))
        if module.partition(".")[0] == top and not offered(module)
    }
    assert not found


def test_an_import_of_insides_is_seen() -> None:
    assert is_offered("vllm.model_executor.layers.linear")
    assert not is_offered("vllm.v1.request")
    assert not is_offered("vllm.model_executor")
