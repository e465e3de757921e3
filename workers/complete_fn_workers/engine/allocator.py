"""`allocator_environment` chooses the memory allocator of the engine's child process; the user need do nothing.

vLLM's CPU backend allocates and frees large buffers in every step. With glibc's defaults each buffer is a fresh mapping
whose pages fault in again. tcmalloc avoids that, and so does glibc if it keeps its memory
(`benchmarks/engines/allocators.py`).
"""

from __future__ import annotations

import sys
from pathlib import Path

LIBRARY_FOLDERS = ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64")
NAMES = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4")
# glibc makes no mapping per allocation, keeps up to 16 GiB at the heap's top, and grows in pieces of 64 MiB.
KEEP_MEMORY = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=67108864"


def find_tcmalloc() -> Path | None:
    """The system's tcmalloc (Debian's libtcmalloc-minimal4), or None."""
    for folder in map(Path, LIBRARY_FOLDERS):
        for name in NAMES:
            for found in (folder / name, *sorted(folder.glob(f"*-linux-gnu/{name}"))):
                if found.exists():
                    return found
    return None


def allocator_environment(current: dict[str, str]) -> dict[str, str]:
    """The variables to add to `current`, a child's environment. Empty if the user has chosen an allocator."""
    preload = current.get("LD_PRELOAD", "")
    if not sys.platform.startswith("linux") or "malloc" in preload or "GLIBC_TUNABLES" in current:
        return {}
    tcmalloc = find_tcmalloc()
    if tcmalloc is None:
        return {"GLIBC_TUNABLES": KEEP_MEMORY}
    return {"LD_PRELOAD": f"{tcmalloc}:{preload}".rstrip(":")}
