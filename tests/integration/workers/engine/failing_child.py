"""An engine's child without a model: it echoes prompts, dies at one with `poison` and hangs at one with `hang`.

It speaks the protocol of `complete_fn_workers.engine` and computes the rows of all connections in batches.
"""

from __future__ import annotations

import argparse
import os
import queue
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from complete_fn_workers.engine.connections import EngineConnections
from complete_fn_workers.engine.loop import Isolation

SEATS = 8


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, kind in (("listener", int), ("parent", int), ("socket", Path), ("lock", Path)):
        parser.add_argument(f"--{name}", type=kind)
    asked = parser.parse_args()
    sys.stdin.readline()
    listener, parent = socket.socket(fileno=asked.listener), socket.socket(fileno=asked.parent)
    connections = EngineConnections(listener, parent, (asked.socket, asked.lock))
    connections.greet({"ready": {"pid": os.getpid(), "device": "none", "skipped": 0, "max_num_seqs": SEATS}})
    rows: list[tuple[Any, int, str]] = []
    isolation, batch = Isolation(), list[Any]()
    while True:
        connection, message = next_message(connections, 0.0 if batch else 0.2)
        while connection is not None:
            if message is None or "stop" in message:
                rows = [row for row in rows if row[0] is not connection]
                isolation.forget(connection)
            for number, prompt, *_ in (message or {}).get("rows", ()):
                rows.append((connection, number, prompt))
            if message and "alone" in message:
                isolation.asking.append(connection)
            if message and "stop" in message:
                connections.send(connection, {"stopped": True})
            connection, message = (None, None) if connections.inbox.empty() else connections.inbox.get()
        if isolation.holder is not None and not isolation.is_told:
            isolation.is_told = True
            connections.send(isolation.holder, {"alone": True})
        batch = [row for row in rows if isolation.holder in (None, row[0])][:SEATS]
        if any("poison" in prompt for _, _, prompt in batch):
            os.kill(os.getpid(), signal.SIGKILL)
        if any("hang" in prompt for _, _, prompt in batch):
            time.sleep(1000)
        for link, number, prompt in batch[:2]:
            connections.send(link, {"done": [[number, prompt, "stop", None, None, None, 1, 0, 1, 0.0]]})
            rows.remove((link, number, prompt))
        for link in {row[0] for row in rows} | set(isolation.asking):
            connections.send(link, {"steps": 1})
        time.sleep(0.001)


def next_message(connections: EngineConnections, seconds: float) -> tuple[Any, Any]:
    try:
        return connections.inbox.get(timeout=seconds)
    except queue.Empty:
        return None, None


main()
