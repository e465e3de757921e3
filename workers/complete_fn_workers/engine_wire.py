"""What a parent and the engine's child process say to each other over a Unix socket.

One frame, either way, is a length (4 bytes, big-endian) and that many bytes of JSON in UTF-8.

    parent to child
        {"open": {"tenant": str, "default_max_tokens": int}}   first on a connection that sends rows
        {"rows": [[number, prompt], [number, prompt, options], ...]}
                                        prompt: a string or [[role, content], ...]; `options` are `SamplingParams` by
                                        field name and `response_format`, and hold for the rows after them as well
        {"count": [text, ...]}
    child to parent
        {"ready": {"max_model_len": int, "max_num_seqs": int, "pid": int}}     once, when the model is loaded, or
        {"failed": str}                                                        why it could not be
        {"done": [[number, text, finish_reason, code, message, prompt_tokens, cached_tokens, completion_tokens], ...]}
        {"counts": [int, ...]}

Rows travel many to a frame, answers as many as one engine step finished. A closed connection aborts its rows.
"""

from __future__ import annotations

import json
import struct
from typing import Any

LENGTH = struct.Struct(">I")
RECEIVE_BYTES = 1 << 18


def pack(message: dict[str, Any]) -> bytes:
    """One frame.

    Raises:
        UnicodeEncodeError: a text has a lone surrogate.
    """
    body = json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode()
    return LENGTH.pack(len(body)) + body


class Frames:
    """Cuts a stream of bytes into messages."""

    def __init__(self) -> None:
        self.buffer = bytearray()

    def feed(self, received: bytes) -> list[dict[str, Any]]:
        self.buffer += received
        messages: list[dict[str, Any]] = []
        start = 0
        while len(self.buffer) - start >= LENGTH.size:
            end = start + LENGTH.size + LENGTH.unpack_from(self.buffer, start)[0]
            if len(self.buffer) < end:
                break
            messages.append(json.loads(self.buffer[start + LENGTH.size : end]))
            start = end
        del self.buffer[:start]
        return messages
