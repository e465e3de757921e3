"""The documentation: it builds strictly, its reference pages have all that the code has, and its code blocks run."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import signal
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlglot

from complete_fn.engines.catalogue import load_catalogue
from complete_fn.errors import ROW_ERRORS, CompleteError
from complete_fn.prompts.options import OPTIONS
from complete_fn.registry import VERBS
from tests.acceptance.doc_blocks import ROOT, RUNNING, WAIT, Block, alike, blocks_of, environment, free_port, read_page

PAGES = ROOT / "docs" / "pages"
NAMES = sorted(str(path.relative_to(PAGES)) for path in PAGES.rglob("*.md"))
QUICK = [name for name in NAMES if name.startswith("start/")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WAREHOUSES = ("Snowflake", "BigQuery", "Redshift")  # their definitions are shown as the package has them
ENDPOINT = """
[models."llama3.2"]
engine = "echo"
checkpoint = "llama3.2"
max_model_len = 4096
"""


def page_blocks(name: str) -> list[Block]:
    return blocks_of((PAGES / name).read_text())


LONG = [
    n for n in NAMES if n not in QUICK and n != "use/warehouses.md" and any(b.kind in RUNNING for b in page_blocks(n))
]


# -- the site


@pytest.fixture(scope="module")
def site(needs_vllm: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site; the page of the shell's verbs needs all that a verb imports."""
    from docs.build import build

    return build(tmp_path_factory.mktemp("docs"))


@pytest.mark.engine
def test_the_documentation_builds_strictly(site: Path) -> None:
    pages = {path.relative_to(site) for path in site.rglob("*.html")}
    assert {Path(name).with_suffix(".html") for name in NAMES} <= pages
    assert (site / "waterfall.png").read_bytes() == (ROOT / "benchmarks" / "waterfall.png").read_bytes()


@pytest.mark.engine
def test_nothing_is_fetched_from_another_host(site: Path) -> None:
    for path in [*site.rglob("*.html"), *site.rglob("*.css")]:
        loaded = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=[\"']?(https?:[^\s\"'>]+)", path.read_text())
        assert not loaded, path
        assert "fonts.g" not in path.read_text(), path


@pytest.mark.engine
def test_llms_txt_leads_to_every_page_as_markdown(site: Path) -> None:
    text = (site / "llms.txt").read_text()
    assert text.startswith("# complete-fn\n\n> ")
    listed = re.findall(r"^- \[[^]]+\]\(([^)]+)\): \S", text, re.M)
    assert set(NAMES) < set(listed)
    assert all((site / path).read_text().startswith("---\ndescription: ") for path in listed)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("[x](gone.md)", "page does not exist"),
        ("[x](use/duckdb.md#gone)", "anchor does not exist"),
        ("![x](gone.png)", "there is no such file"),
        ('<script src="https://cdn.example/x.js"></script>', "it would be fetched from another host"),
    ],
)
def test_a_broken_page_fails_the_build(
    fault: str, told: str, needs_vllm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from docs import build

    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    with (tmp_path / "docs" / "pages" / "index.md").open("a") as index:
        index.write(f"\n{fault}\n")
    monkeypatch.setattr(build, "HERE", tmp_path / "docs")
    with pytest.raises(build.DocsError, match=told):
        build.build(tmp_path / "out")


@pytest.mark.engine
def test_a_page_outside_of_the_navigation_fails_the_build(
    needs_vllm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from docs import build

    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "docs" / "pages" / "stray.md").write_text("---\ndescription: Stray.\n---\n\n# Stray\n")
    monkeypatch.setattr(build, "HERE", tmp_path / "docs")
    with pytest.raises(build.DocsError, match=r"stray\.md"):
        build.build(tmp_path / "out")


# -- the reference pages


def reference(site: Path, name: str) -> str:
    return (site / "reference" / f"{name}.md").read_text()


@pytest.mark.engine
def test_the_options_page_has_every_option_of_the_code_with_its_text(site: Path) -> None:
    told = re.findall(
        r"^## (\w+)\n\n(\S.*)\n\nDefault: .+\. Takes: .+\. Shell: `--.+`\.$", reference(site, "options"), re.M
    )
    assert told == [(name, option.what) for name, option in OPTIONS.items()]


@pytest.mark.engine
def test_the_settings_page_has_every_variable_that_the_packages_name(site: Path) -> None:
    named = set()
    for room in ("complete_fn", "connectors", "workers"):
        for path in (ROOT / room).rglob("*.py"):
            named |= set(re.findall(r"COMPLETE_FN_[A-Z_]+[A-Z]", path.read_text()))
    told = set(re.findall(r"`(COMPLETE_FN_\w+)`", reference(site, "settings")))
    assert named == told


@pytest.mark.engine
def test_the_command_line_page_has_every_verb(site: Path) -> None:
    headings = re.findall(r"^##+ complete-fn (.+)$", reference(site, "cli"), re.M)
    assert set(VERBS) <= set(headings)
    assert {"jobs submit", "jobs rerun", "keys budget", "cache clear", "connections add", "swiftkv distill"} <= set(
        headings
    )
    assert "| `-m, --model MODEL` | Required; " in reference(site, "cli")


def error_kinds(root: type[CompleteError]) -> Iterator[type[CompleteError]]:
    yield root
    for kind in root.__subclasses__():
        if kind.__module__ == root.__module__:
            yield from error_kinds(kind)


@pytest.mark.engine
def test_the_errors_page_has_every_error_and_every_row_error(site: Path) -> None:
    page = reference(site, "errors")
    for kind in error_kinds(CompleteError):
        again = "yes" if kind.retryable else "no"
        assert f"`{kind.__name__}` | `{kind.code}` | {kind.status} | {again} | {kind.__doc__} |" in page, kind
    assert set(re.findall(r"^\| `(\w+)` \| \w", page, re.M)) == set(ROW_ERRORS)


@pytest.mark.engine
def test_the_rest_page_has_every_route(site: Path) -> None:
    document = json.loads((site / "openapi.json").read_text())
    routes = {f"{verb.upper()} {path}" for path, verbs in document["paths"].items() for verb in verbs}
    assert len(routes) > 20
    assert set(re.findall(r"^### (.+)$", reference(site, "rest"), re.M)) == routes


@pytest.mark.engine
def test_the_models_page_has_every_model_with_its_prices(site: Path) -> None:
    page = reference(site, "models")
    for model in load_catalogue().values():
        assert (
            f"| `{model.name}` | {model.prices.input} | {model.prices.cached_input} | {model.prices.output} |" in page
        )


@pytest.mark.engine
def test_the_functions_page_has_every_function(site: Path) -> None:
    from complete_fn_connectors.sql_functions import functions_of

    page = reference(site, "functions")
    for name in functions_of(cortex=False):
        assert f"| `{name}(" in page, name
    for name in ("complete_table(query text", "AI_CLASSIFY(input, categories", "SNOWFLAKE.CORTEX.TRY_COMPLETE(model"):
        assert f"`{name}" in page, name


# -- blocks that are not run


@pytest.mark.parametrize("name", NAMES)
def test_every_block_is_well_formed(name: str, tmp_path: Path) -> None:
    for block in page_blocks(name):
        if block.title not in WAREHOUSES:
            assert max(map(len, block.code.splitlines())) <= 100, block.code  # what a page shows on a desktop
        if block.kind in ("python", "py"):
            ast.parse(block.code)
        elif block.kind in ("sh", "bash"):
            done = subprocess.run(["bash", "-n"], input=block.code, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        elif block.kind == "toml":
            (tmp_path / "models.toml").write_text(block.code)
            assert load_catalogue(tmp_path / "models.toml")
        else:
            assert block.kind in ("sql", "text"), f"{name}: a block of kind {block.kind} is neither run nor checked"


@pytest.mark.engine
@pytest.mark.parametrize("name", NAMES)
def test_every_command_that_a_page_shows_has_its_verbs_and_flags(name: str, needs_vllm: None) -> None:
    from docs.reference import verb_parser

    for block in page_blocks(name):
        for command in block.commands if block.kind in ("sh", "bash") else ():
            for extras in re.findall(r"pip install '\.\[([\w,]+)\]'", command):
                assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"]), command
            if found := re.match(r"python (benchmarks/[\w/]+\.py)", command):
                script = (ROOT / found[1]).read_text()
                assert all(f'"{flag}"' in script for flag in re.findall(r" (--[\w-]+)", command)), command
            if found := re.search(r"(?:^|\$\()complete-fn ([^|)]*)", command):
                verb, *given = shlex.split(found[1].replace("\\\n", " "))
                words = given[:1] if verb == "swiftkv" else []
                verb_parser(verb, *words).parse_args(given[len(words) :])


@pytest.mark.parametrize("name", NAMES)
def test_every_file_and_make_target_that_a_page_names_exists(name: str) -> None:
    text = (PAGES / name).read_text()
    for path in set(re.findall(r"(?<![\w/])(?:benchmarks|sql|workers|connectors|tests|deploy)/[\w./-]+\w", text)):
        assert (ROOT / path).exists(), path
    targets = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.M)
    assert targets
    assert set(re.findall(r"`make ([a-z-]+)`", text)) <= set(targets[1].split())


def test_the_files_of_the_way_through_the_code_have_what_a_reader_looks_for() -> None:
    rows = re.findall(r"^\| .* \| `([\w/]+\.py)` \| (`.+`) \|$", (PAGES / "how-it-works.md").read_text(), re.M)
    assert len(rows) == 7
    for path, names in rows:
        tree = ast.parse((ROOT / path).read_text())
        for name in re.findall(r"`([\w.]+)`", names):
            inside: list[ast.stmt] = tree.body
            for part in name.split("."):
                found = [n for n in inside if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == part]
                assert found, f"{path}: {name}"
                inside = found[0].body


def test_every_test_that_a_page_names_exists() -> None:
    named = [found for name in NAMES for found in re.findall(r"(tests/[\w./]+\.py)::(\w+)", (PAGES / name).read_text())]
    assert len(named) > 40
    for path, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / path).read_text(), re.M), f"{path}::{test}"


def test_the_owasp_page_has_tests_for_each_of_the_ten_points() -> None:
    points = re.split(r"^## API(\d+): ", (PAGES / "owasp.md").read_text(), flags=re.M)[1:]
    assert points[::2] == [str(n) for n in range(1, 11)]
    for number, text in zip(points[::2], points[1::2], strict=True):
        assert re.search(r"^- `tests/", text, re.M), number


def test_the_warehouses_sql_is_that_of_the_package_and_parses() -> None:
    blocks = [b for b in page_blocks("use/warehouses.md") if b.kind == "sql"]
    assert {b.title for b in blocks} == set(WAREHOUSES)
    for block in blocks:
        if block.code.startswith("CREATE"):
            script = (ROOT / "sql" / "complete_fn_sql" / f"{block.title.lower()}.sql").read_text()
            shipped = " ".join(script.split())  # the page may break a line where the package does not
            assert all(" ".join(s.split()) in shipped for s in re.split(r"(?<=;)\n", block.code)), block.code
        else:
            assert sqlglot.parse_one(block.code, dialect=block.title.lower())


# -- blocks that are run


def check_printed(blocks: list[Block], printed: list[str]) -> None:
    running = [b for b in blocks if b.kind in RUNNING]
    assert len(printed) == len(running)
    for block, real in zip(running, printed, strict=True):
        if block.shown:
            assert alike(block.shown, real) >= 0.9, real


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    """The address of an OpenAI-compatible endpoint that serves a model named llama3.2."""
    folder, port = tmp_path / "endpoint", free_port()
    folder.mkdir()
    (folder / "models.toml").write_text(ENDPOINT)
    given = environment(folder, COMPLETE_FN_MODELS=str(folder / "models.toml"))
    with (folder / "log").open("w") as log:
        child = subprocess.Popen(["complete-fn", "serve", "--port", str(port)], env=given, stdout=log, stderr=log)
    try:
        subprocess.run(["bash", "-c", f"{WAIT} http://127.0.0.1:{port}/readyz"], check=True, capture_output=True)
        yield f"127.0.0.1:{port}"
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(60)


def test_the_quick_start_with_an_endpoint(endpoint: str, tmp_path: Path) -> None:
    folder = tmp_path / "page"
    folder.mkdir()
    blocks = page_blocks("start/endpoint.md")
    printed = read_page(blocks, folder, environment(tmp_path / "home"), {"localhost:11434": endpoint})
    check_printed(blocks, printed)
    assert "hello to Ada" in printed[-1].replace("Say ", "")
    assert (folder / "answers.parquet").exists()


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_the_quick_start_on_this_machine(engine_home: Path, tmp_path: Path) -> None:
    blocks = page_blocks("start/machine.md")
    printed = read_page(blocks, tmp_path, environment(engine_home))
    check_printed(blocks, printed)
    assert "to compute" in printed[2]
    assert (tmp_path / "synopses.parquet").exists()


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_the_quick_start_of_a_service(needs_vllm: None, tmp_path: Path) -> None:
    folder = tmp_path / "page"
    folder.mkdir()
    blocks = page_blocks("start/service.md")
    printed = read_page(blocks, folder, environment(tmp_path / "home"))
    check_printed(blocks, printed)
    assert "research" in printed[-1]
    assert (folder / "sections.parquet").exists()


@pytest.mark.long
@pytest.mark.engine
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", LONG)
def test_the_blocks_of_a_page_run(name: str, needs_vllm: None, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = tmp_path / "page"
    folder.mkdir()
    changes = {}
    if name == "use/postgresql.md":
        database = str(request.getfixturevalue("postgres_url"))
        changes = {"-d mydatabase": f"-d {database}", "mydatabase": database}
    blocks = page_blocks(name)
    given = environment(tmp_path / "home", DOCS_DATABASE=changes.get("mydatabase", ""))
    check_printed(blocks, read_page(blocks, folder, given, changes))
