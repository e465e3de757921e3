"""What the operating system says of a folder's file system, of a process, and of where we run."""

from __future__ import annotations

import functools
import os
import socket
import sys
from pathlib import Path


def filesystem_of(path: Path, mounts: str | None = None) -> str | None:
    """The type of the file system that holds `path` ("ext4", "nfs4", ...), None where the system does not say.

    Args:
        mounts: text in the format of /proc/mounts; read from there if None.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/mounts").read_text("utf-8", "replace")
        except OSError:
            return None
    wanted = str(path.resolve()) + "/"
    best, kind = "", None
    for line in mounts.splitlines():
        fields = line.split(" ")
        point = fields[1].replace("\\040", " ").rstrip("/") + "/"
        if wanted.startswith(point) and len(point) >= len(best):
            best, kind = point, fields[2]
    return kind


def process_started(pid: int) -> float | None:
    """A value that tells this process from a later one with the same number; None if there is no such process."""
    if sys.platform == "linux":
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return None
        after_name = stat.rpartition(")")[2].split()
        return None if after_name[0] == "Z" else float(after_name[19])  # proc(5): field 22, starttime
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return 0.0
    return 0.0


@functools.cache
def here() -> str:
    """The machine as far as process numbers go: its name and, on Linux, the PID namespace (a container has its own)."""
    try:
        return f"{socket.gethostname()}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return socket.gethostname()
