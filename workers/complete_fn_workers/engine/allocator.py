"""Chooses the memory allocator of the engine's child process, by its environment; the user does nothing.

vLLM's CPU backend allocates and frees large buffers in every step. With glibc's defaults each becomes a fresh mapping
whose pages fault in again; tcmalloc, or glibc told to keep its memory, spares that (`benchmarks/allocators.py`).
"""

from __future__ import annotations

import sys
from pathlib import Path

LIBRARY_FOLDERS = ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64")
NAMES = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4")
# No mapping per allocation, no return of the heap's top, growth in large pieces.
KEEP_MEMORY = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=67108864"


def find_tcmalloc() -> Path | None:
    """tcmalloc where the system has it (Debian's libtcmalloc-minimal4), else None."""
    for folder in map(Path, LIBRARY_FOLDERS):
        for name in NAMES:
            for found in (folder / name, *sorted(folder.glob(f"*-linux-gnu/{name}"))):
                if found.exists():
                    return found
    return None


def allocator_environment(current: dict[str, str]) -> dict[str, str]:
    """What to add to `current`, a child's environment; empty where the user has chosen an allocator."""
    preload = current.get("LD_PRELOAD", "")
    if not sys.platform.startswith("linux") or "malloc" in preload or "GLIBC_TUNABLES" in current:
        return {}
    tcmalloc = find_tcmalloc()
    if tcmalloc is None:
        return {"GLIBC_TUNABLES": KEEP_MEMORY}
    return {"LD_PRELOAD": f"{tcmalloc}:{preload}".rstrip(":")}
