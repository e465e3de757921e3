"""The operating system: a folder's file system, open files, processes and their forks, and where we run."""

from __future__ import annotations

import functools
import os
import resource
import socket
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

MOST_FILES = 1 << 16  # where the system sets no limit


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


def raise_file_limit() -> int:
    """Let this process open as many files as its hard limit allows. Returns how many it may open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # macOS allows less than its hard limit says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    now = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST_FILES if now == resource.RLIM_INFINITY else now


class Forkable(Protocol):
    """What a forked child must not share with its parent."""

    def after_fork(self) -> None:
        """In the child: make each lock anew, as a thread of the parent may hold it; leave the parent's connections."""
        ...


FORKABLE: weakref.WeakSet[Forkable] = weakref.WeakSet()


def renew_in_child(thing: Forkable) -> None:
    """Call `thing.after_fork()` in every child that is forked while the thing lives."""
    FORKABLE.add(thing)


def renew_all() -> None:
    for thing in FORKABLE:
        thing.after_fork()


def at_fork(**hooks: Callable[[], None]) -> None:
    """`os.register_at_fork`. Windows does not fork."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(**hooks)


at_fork(after_in_child=renew_all)
