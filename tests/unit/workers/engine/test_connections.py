"""The child's connections end the child in every case: alone, its folder gone, a stranger on its socket."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHILD = """
import socket, sys, time
from pathlib import Path
from complete_fn_workers.engine.connections import EngineConnections
folder = Path(sys.argv[1])
listener = socket.socket(socket.AF_UNIX)
listener.bind(str(folder / "s"))
listener.listen()
EngineConnections(listener, socket.socket(fileno=int(sys.argv[2])), (folder / "s", folder / "lock"))
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def child(tmp_path: Path) -> tuple[subprocess.Popen[str], socket.socket, Path]:
    folder = tmp_path / "d"
    folder.mkdir()
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-c", CHILD, str(folder), str(theirs.fileno())]
    process = subprocess.Popen(
        command, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    theirs.close()
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process, ours, folder


def ended(process: subprocess.Popen[str], seconds: float = 4.0) -> bool:
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        return False
    return True


Child = tuple[subprocess.Popen[str], socket.socket, Path]


def test_it_stays_while_it_is_wanted_and_goes_when_its_last_parent_does(child: Child) -> None:
    process, ours, _ = child
    time.sleep(1.6)
    assert process.poll() is None
    ours.close()
    assert ended(process)


def test_it_goes_also_when_its_folder_is_gone(child: Child) -> None:
    process, ours, folder = child
    shutil.rmtree(folder)
    ours.close()
    assert ended(process)


def test_a_stranger_on_its_socket_does_not_harm_others(child: Child) -> None:
    process, ours, folder = child
    stranger = socket.socket(socket.AF_UNIX)
    stranger.connect(str(folder / "s"))
    stranger.sendall(b"\x00\x00\x00\x05junk!GET / HTTP/1.1\r\n\r\n")
    time.sleep(1.6)
    assert process.poll() is None
    stranger.close()
    ours.close()
    assert ended(process)
