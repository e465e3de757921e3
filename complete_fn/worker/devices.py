"""Which accelerators the worker processes of this machine take: each its own, lest all load onto the first."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from complete_fn.settings import named_devices

LOG = logging.getLogger("complete_fn.devices")
NODES = Path("/dev")  # NVIDIA's driver has a node for each device that this container was given


def visible_devices() -> list[str]:
    """NVIDIA's devices, as CUDA_VISIBLE_DEVICES names them: those it has, else all; none on CPUs."""
    nodes = [node for node in NODES.glob("nvidia*") if node.name.removeprefix("nvidia").isdecimal()]
    named = named_devices()
    if not nodes or named is None:
        return [str(number) for number in range(len(nodes))]
    devices: list[str] = []
    for name in map(str.strip, named.split(",")):
        if not name or name.startswith("-"):
            break  # CUDA itself reads no further
        devices.append(name)
    return devices


def within_devices(least: int, most: int, devices: Sequence[str]) -> tuple[int, int]:
    """The bounds of --workers, at most one worker per device; as they are where there is none."""
    if not devices or most <= len(devices):
        return least, most
    LOG.warning(
        "--workers asks for up to %s processes and there are %s accelerators (%s): at most %s are started. More "
        "would need devices of their own; CUDA_VISIBLE_DEVICES says which may be used.",
        most,
        len(devices),
        ", ".join(devices),
        len(devices),
    )
    return min(least, len(devices)), len(devices)


def device_shares(devices: Sequence[str], workers: int) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each of so many workers, no more than devices: equal parts. Empty without devices."""
    if not devices or not workers:
        return []
    share = len(devices) // workers
    return [",".join(devices[slot * share : (slot + 1) * share]) for slot in range(workers)]
