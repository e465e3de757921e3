"""A checkpoint's identity is a digest of its content, the same on every machine."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path

from complete_fn.engines.catalogue import Model
from complete_fn.errors import EngineError

CHECKPOINT_FILES = (".json", ".safetensors", ".jinja", ".model")
SMALL = 64 * 1024 * 1024  # bytes; weights up to this size are hashed whole
BLOCK, MOST_HEADER = 4096, 100_000_000  # bytes; the safetensors format sets the bound of the header


def checkpoint_digest(model: Model) -> str:
    """The checkpoint's identity: a digest of a local folder's content, or else engine, id, revision and URL.

    Raises:
        EngineError: The checkpoint's folder is not on this machine.
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
    """A digest of a file's content. An unchanged file is read once: a query engine asks at every call.

    The digest of large weights covers the header (https://github.com/huggingface/safetensors#format) and the first,
    middle and last 4 KiB of each tensor: training, merging or quantising a tensor changes every part of it.
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
