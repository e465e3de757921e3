"""What the README shows is run: its Python blocks and shell lines in order, as a reader would; its printed answers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.acceptance.doc_blocks import ROOT, RUNNING, alike, blocks_of, environment, read_page

README = (ROOT / "README.md").read_text()
BLOCKS = [block for block in blocks_of(README) if block.kind in RUNNING]


@pytest.fixture(scope="module")
def printed(engine_home: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What each block prints."""
    folder = tmp_path_factory.mktemp("readme")
    return read_page(BLOCKS, folder, environment(engine_home), {"/tmp/": f"{folder}/"})


@pytest.mark.engine
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [n for n, block in enumerate(BLOCKS) if block.kind == "python"])
def test_a_python_block_prints_what_the_readme_shows(number: int, printed: list[str]) -> None:
    assert printed[number].strip()
    if shown := BLOCKS[number].shown:
        assert alike(shown, printed[number]) >= 0.9, printed[number]


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_the_shell_lines_run(printed: list[str]) -> None:
    shell = [number for number, block in enumerate(BLOCKS) if block.kind == "sh"]
    assert any("DAY" in printed[number] for number in shell)  # `complete-fn usage`, after runs


def test_every_make_target_that_the_readme_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z-]+)`?", README)):
        assert f"\n{target}:" in makefile, target


def test_every_file_that_the_readme_names_exists() -> None:
    for name in set(re.findall(r"(?:benchmarks|sql|workers|connectors|tests|deploy|docs)/[\w./-]+\w", README)):
        assert (ROOT / name).exists(), name
