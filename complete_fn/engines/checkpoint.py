"""The identity of a checkpoint: a digest of its content, the same on every machine."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path

from complete_fn.engines.catalogue import Model
from complete_fn.errors import EngineError

CHECKPOINT_FILES = (".json", ".safetensors", ".jinja", ".model")
SMALL = 64 * 1024 * 1024  # weights up to this size are hashed whole
BLOCK, MOST_HEADER = 4096, 100_000_000  # bytes; the format bounds the header so


def checkpoint_digest(model: Model) -> str:
    """The checkpoint's identity: content of a local folder, the same on every machine; else id, revision and URL.

    Raises:
        EngineError: the folder is not on this machine.
    """
    folder = model.local_folder
    if model.is_absent:
        raise EngineError(f"Model {model.name!r}: its folder {model.checkpoint} is not on this machine.")
    if folder is None or model.engine != "embedded":
        return f"{model.engine}|{model.checkpoint}|{model.revision}|{model.url}"
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in CHECKPOINT_FILES):
        stat = path.stat()
        digest.update(f"{path.name}\n{content_digest(path, stat.st_size, stat.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


@lru_cache(maxsize=256)
def content_digest(path: Path, size: int, written_ns: int) -> str:
    """A query engine asks for the checkpoint's identity at every call: an unchanged file is read once.

    Of large weights the header (https://github.com/huggingface/safetensors#format) and of each tensor the first, middle
    and last 4 KiB: training, merging or quantising changes every part of the tensors that it changes.
    """
    if size <= SMALL or path.suffix != ".safetensors":
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, MOST_HEADER))
        try:
            tensors = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
            ranges = sorted((int(low), int(high)) for low, high in (t["data_offsets"] for t in tensors))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EngineError(f"{path} is no whole safetensors file. Copy or download it again.") from error
        digest = hashlib.sha256(header + size.to_bytes(8, "little"))
        for low, high in ranges:
            for at in (low, (low + high) // 2, max(low, high - BLOCK)):
                file.seek(8 + length + at)
                digest.update(file.read(min(BLOCK, high - at)))
    return digest.hexdigest()
