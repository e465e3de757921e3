"""The protocol between a caller (the *parent*) and the engine's child process, over a Unix socket.

A frame, in either direction, is a length (4 bytes, big-endian) and that many bytes of JSON in UTF-8.

    parent to child
        {"open": {"tenant": str, "default_max_tokens": int}}   first on a connection that sends rows
        {"rows": [[number, prompt], [number, prompt, options], ...]}
                                        prompt: a string or [[role, content], ...]; `options` are `SamplingParams` by
                                        field name, `response_format`, `choices`, `priority` and `tell` (send the text
                                        as it is made), and hold for the rows after them as well
        {"count": [text, ...]}
        {"stop": true}                  the caller wants no more answers: rows under way are aborted. The reply is that
                                        of `meter` with the word "stopped", after all messages already on their way
        {"meter": true}
    child to parent
        {"ready": {"max_model_len": int, "max_num_seqs": int, "pid": int, "device": str, "skipped": float}}
                                                                               once, when the model is loaded, or
        {"failed": str}                                                        why it could not be loaded
        {"done": [[number, text, finish_reason, code, message, scores, prompt_tokens, cached_tokens, completion_tokens,
                   device_seconds, prompt_seconds], ...]}    scores: [probability or null] of choices; seconds: see
                                             `metering`; missing where the row was refused
        {"meter": [metered, idle, lost]}        device-seconds, in a message of its own or beside `done`: see `metering`
        {"text": [[number, piece, prompt_tokens, cached_tokens, completion_tokens], ...]}
                                        of rows with `tell`, as the text is made; the tokens up to this piece
        {"counts": [int, ...]}

A frame has many rows, or all answers that one engine step finished. A closed connection aborts its rows.
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
        UnicodeEncodeError: A text has a lone surrogate.
    """
    body = json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode()
    return LENGTH.pack(len(body)) + body


class RowRefused(Exception):
    """The row cannot be sent to the engine; `code` is a key of `ROW_ERRORS`."""

    def __init__(self, code: str, message: str, prompt_tokens: int = 0) -> None:
        super().__init__(message)
        self.code = code
        self.prompt_tokens = prompt_tokens

    @property
    def answer(self) -> list[Any]:
        return [None, None, self.code, str(self), None, 0, 0, 0]


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
