"""What the machine lets us use."""

from __future__ import annotations

from complete_fn_workers.engine import machine


def test_tiles_are_allowed_where_there_are_some() -> None:
    flags = machine.CPUINFO.read_text() if machine.CPUINFO.exists() else ""
    assert machine.allow_tiles() == ("amx_tile" in flags)
