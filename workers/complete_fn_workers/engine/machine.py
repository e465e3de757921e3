"""These functions tell the cores and memory that this process may use, by CPU affinity and control groups."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
CPUS = Path("/sys/devices/system/cpu")
CPUINFO = Path("/proc/cpuinfo")
BFLOAT16 = {"avx512_bf16", "amx_bf16"}  # x86 instructions that multiply bfloat16
GIB = 1 << 30
ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA = 158, 0x1023, 18  # x86-64 Linux


def available_cores() -> int:
    """Physical cores of this process's affinity, at most its control group's quota.

    Hardware threads do not count, because the threads of a core share its arithmetic units.
    """
    cores = len({siblings(cpu) for cpu in usable_cpus()})
    quota = cgroup_cpus()
    return max(1, min(cores, int(quota)) if quota else cores)


def usable_cpus() -> list[int]:
    """The CPU numbers this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def siblings(cpu: int) -> str:
    try:
        return (CPUS / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def cgroup_cpus() -> float | None:
    """CPUs that the control group grants, None without a limit."""
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def computes_bfloat16() -> bool:
    """Whether this x86 CPU has instructions that multiply bfloat16; True if the system does not tell."""
    try:
        flags = next(line for line in CPUINFO.read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return True
    return bool(BFLOAT16 & set(flags.split()))


def allow_tiles() -> bool:
    """Ask Linux to let this process use AMX's tiles (https://docs.kernel.org/arch/x86/xstate.html).

    vLLM 0.32's attention on CPUs uses the tiles without asking, and dies of SIGILL if no matrix product has asked
    before. Returns False on a machine without tiles.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    return bool(ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0)


def memory_bytes() -> int:
    """Bytes of RAM, or the control group's limit if that is smaller."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            total = min(total, int((CGROUP / name).read_text()))
        except (OSError, ValueError):
            continue
    return total
