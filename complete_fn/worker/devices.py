"""Each worker process of a machine gets its own accelerators; otherwise all would load onto the first one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from complete_fn.logs import logger
from complete_fn.settings import named_devices

LOG = logger("devices")
NODES = Path("/dev")  # NVIDIA's driver has a node here for each device that this container may use


def visible_devices() -> list[str]:
    """NVIDIA's devices by their names in CUDA_VISIBLE_DEVICES: those in that variable, or else all; none on CPUs."""
    nodes = [node for node in NODES.glob("nvidia*") if node.name.removeprefix("nvidia").isdecimal()]
    named = named_devices()
    if not nodes or named is None:
        return [str(number) for number in range(len(nodes))]
    devices: list[str] = []
    for name in map(str.strip, named.split(",")):
        if not name or name.startswith("-"):
            break  # CUDA itself ignores the names behind an invalid one
        devices.append(name)
    return devices


def within_devices(least: int, most: int, devices: Sequence[str]) -> tuple[int, int]:
    """The bounds of --workers, lowered to one worker per device; unchanged without devices."""
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
    """CUDA_VISIBLE_DEVICES for each of `workers` workers, in equal shares; there are at least as many devices.

    Empty without devices.
    """
    if not devices or not workers:
        return []
    share = len(devices) // workers
    return [",".join(devices[slot * share : (slot + 1) * share]) for slot in range(workers)]
