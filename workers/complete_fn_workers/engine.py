"""The engine's child process: `python -m complete_fn_workers.engine`, started by `engine_launch`, one per model.

vLLM runs inside it, in this process's main thread: take what has come, admit rows, do one step, send what is done.
Rows of all connections share the one continuously batching engine.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import traceback
from collections import defaultdict, deque
from pathlib import Path
from typing import Any, NamedTuple

from complete_fn_workers.engine_io import Connection, Connections


class Row(NamedTuple):
    """A row that waits for admission."""

    connection: Connection
    number: int
    prompt: Any
    sampling: Any


class Admitted(NamedTuple):
    """A row that vLLM has."""

    connection: Connection
    number: int
    limit: Any
    internal_id: str


class EngineLoop:
    """Feeds one vLLM engine from all connections."""

    def __init__(self, connections: Connections, llm: Any) -> None:
        from complete_fn_workers.engine_rows import PromptReader

        self.connections = connections
        self.llm = llm
        self.prompts = PromptReader(llm.get_tokenizer())
        self.context = int(llm.model_config.max_model_len)
        self.max_num_seqs = int(llm.vllm_config.scheduler_config.max_num_seqs)
        self.waiting: deque[Row] = deque()
        self.running: dict[str, Admitted] = {}
        self.done: defaultdict[Connection, list[list[Any]]] = defaultdict(list)
        self.serial = 0

    @property
    def greeting(self) -> dict[str, Any]:
        return {"ready": {"max_model_len": self.context, "max_num_seqs": self.max_num_seqs, "pid": os.getpid()}}

    def run(self) -> None:
        while True:
            self.take(block=not self.running and not self.waiting)
            # As many again as run at once: the scheduler never starves, and no burst is tokenised before a step.
            while self.waiting and len(self.running) < 2 * self.max_num_seqs:
                self.admit(self.waiting.popleft())
            if self.running:
                for output in self.llm.step():
                    self.finish(output)
            self.deliver()

    def take(self, block: bool) -> None:
        """Everything that has come; waits for the first if there is nothing else to do."""
        inbox = self.connections.inbox
        while block or not inbox.empty():
            connection, message = inbox.get()
            block = False
            if message is None:
                self.forget(connection)
            else:
                self.read(connection, message)

    def read(self, connection: Connection, message: dict[str, Any]) -> None:
        from complete_fn_workers.engine_rows import Sampling

        if "open" in message:
            connection.tenant = message["open"]["tenant"]
            connection.default_max_tokens = message["open"]["default_max_tokens"]
        for number, prompt, *options in message.get("rows", ()):
            if options:
                connection.options = Sampling(options[0])
            self.waiting.append(Row(connection, number, prompt, connection.options))
        if "count" in message:
            self.connections.send(connection, {"counts": self.prompts.count(message["count"])})

    def forget(self, connection: Connection) -> None:
        """A connection is gone: so are its rows."""
        self.waiting = deque(row for row in self.waiting if row.connection is not connection)
        gone = [key for key, row in self.running.items() if row.connection is connection]
        self.llm.abort_request([self.running.pop(key).internal_id for key in gone], internal=True)
        self.done.pop(connection, None)

    def admit(self, row: Row) -> None:
        from complete_fn_workers.engine_rows import RowRefused, answer_limit

        connection = row.connection
        try:
            ids = self.prompts.token_ids(row.prompt)
            limit = answer_limit(len(ids), self.context, row.sampling.max_tokens, connection.default_max_tokens)
            self.serial += 1
            key = str(self.serial)
            prompt = {"type": "token", "prompt_token_ids": ids, "cache_salt": connection.tenant}
            internal = self.llm.add_request(key, prompt, row.sampling.params(limit.tokens))
        except RowRefused as refusal:
            self.done[connection].append([row.number, *refusal.answer])
        except Exception as error:  # vLLM's own checks of one row come as several types
            self.done[connection].append([row.number, *RowRefused("invalid_request", str(error)).answer])
        else:
            self.running[key] = Admitted(connection, row.number, limit, internal)

    def finish(self, output: Any) -> None:
        from complete_fn_workers.engine_rows import answer_of

        row = self.running.pop(output.request_id, None)
        if row is not None:
            self.done[row.connection].append([row.number, *answer_of(output, row.limit, self.context)])

    def deliver(self) -> None:
        for connection, answers in self.done.items():
            self.connections.send(connection, {"done": answers})
        self.done.clear()


def load(spec: dict[str, Any]) -> Any:
    """vLLM with the model in it. Imported only here, so that a parent that gives up early is noticed meanwhile."""
    from vllm.v1.engine.llm_engine import LLMEngine

    from complete_fn_workers.engine_config import vllm_config

    return LLMEngine.from_vllm_config(vllm_config(spec), disable_log_stats=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="complete_fn_workers.engine", description=__doc__)
    parser.add_argument("--listener", type=int, required=True, help="descriptor of the listening socket")
    parser.add_argument("--parent", type=int, required=True, help="descriptor of the first connection")
    parser.add_argument("--socket", type=Path, required=True, help="path of the listening socket")
    parser.add_argument("--lock", type=Path, required=True, help="the file that a connecting parent locks")
    parser.add_argument("spec", type=json.loads, help="the EngineSpec as JSON")
    args = parser.parse_args(argv)
    listener, parent = socket.socket(fileno=args.listener), socket.socket(fileno=args.parent)
    connections = Connections(listener, parent, (args.socket, args.lock))
    try:
        loop = EngineLoop(connections, load(args.spec))
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
    os._exit(code)  # without atexit reports; the reading thread is still there
