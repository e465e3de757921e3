"""The engine's child process: `python -m complete_fn_workers.engine`. `launch` starts one for each model."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

from complete_fn_workers.engine.connections import EngineConnections
from complete_fn_workers.engine.loop import EngineLoop
from complete_fn_workers.engine.machine import allow_tiles


def load(spec: dict[str, Any]) -> Any:
    """Load vLLM with the model. vLLM is imported only here: a caller that gives up is noticed while it loads."""
    from vllm import LLMEngine

    from complete_fn_workers.engine.config import vllm_config

    return LLMEngine.from_vllm_config(vllm_config(spec), disable_log_stats=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="complete_fn_workers.engine", description=__doc__)
    parser.add_argument("--listener", type=int, required=True, help="descriptor of the listening socket")
    parser.add_argument("--parent", type=int, required=True, help="descriptor of the first connection")
    parser.add_argument("--socket", type=Path, required=True, help="path of the listening socket")
    parser.add_argument("--lock", type=Path, required=True, help="the file that a connecting parent locks")
    args = parser.parse_args(argv)
    spec = json.loads(sys.stdin.readline())  # the EngineSpec: it may hold secrets, and every user can read arguments
    allow_tiles()
    listener, parent = socket.socket(fileno=args.listener), socket.socket(fileno=args.parent)
    connections = EngineConnections(listener, parent, (args.socket, args.lock))
    try:
        loop = EngineLoop(connections, load(spec))
    except BaseException as error:
        traceback.print_exc()
        connections.greet({"failed": f"{type(error).__name__}: {error}"})
        connections.drained(1.0)
        return 1
    connections.greet(loop.greeting)
    loop.run()
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # skips atexit hooks: the reading thread still runs
