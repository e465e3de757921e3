"""Finds the running engine of a model, or starts one. Each engine has a socket; a file lock guards the two."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import importlib.util
import json
import os
import platform
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from complete_fn import __version__
from complete_fn.engines.catalogue import Model
from complete_fn.engines.checkpoint import CHECKPOINT_FILES
from complete_fn.errors import EngineError, UnknownModelError
from complete_fn.registry import missing
from complete_fn.settings import Settings, child_environment
from complete_fn_workers.engine.allocator import allocator_environment
from complete_fn_workers.engine.machine import available_cores, usable_cpus

if sys.platform == "win32":
    raise EngineError("The embedded engine needs Linux. Elsewhere use an endpoint: set the model's url.")
import fcntl

SOCKET_PATH_BYTES = 100  # the kernel's limit is 108 on Linux and 104 on macOS, with the closing zero
LOCAL_HOME = "Set COMPLETE_FN_HOME to a folder on a local disk."
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """The model and settings of one child process. Equal specs share a child."""

    checkpoint: str
    revision: str | None
    max_model_len: int | None
    engine_args: dict[str, Any]
    kv_cache_gib: float | None


@dataclass(frozen=True, slots=True)
class EnginePlace:
    """The files of one engine, all named by the hash of its spec."""

    spec: EngineSpec
    folder: Path
    log: Path
    key: str

    @property
    def socket(self) -> Path:
        return self.folder / f"{self.key}.sock"

    @property
    def lock(self) -> Path:
        return self.folder / f"{self.key}.lock"


def engine_spec(model: Model, settings: Settings) -> EngineSpec:
    """The spec of a model's engine.

    Raises:
        UnknownModelError: The model's folder lacks a file that every model has.
    """
    folder = model.local_folder
    if folder is not None:
        check_model_folder(model.name, folder)
    return EngineSpec(
        checkpoint=str(folder) if folder is not None else model.checkpoint,
        revision=None if folder is not None else model.revision,
        max_model_len=model.max_model_len,
        engine_args=dict(model.engine_args),
        kv_cache_gib=settings.kv_cache_gib,
    )


def check_model_folder(name: str, folder: Path) -> None:
    lacks = None
    if not (folder / "config.json").exists():
        lacks = "config.json"
    elif not any((folder / file).exists() for file in TOKENIZER_FILES):
        lacks = "tokenizer.json"
    elif not any(folder.glob("*.safetensors")):
        lacks = "*.safetensors (weights in other formats are not loaded: they can carry code)"
    if lacks is not None:
        raise UnknownModelError(f"Model {name!r}: the folder {str(folder)!r} has no {lacks}.")


def engine_place(spec: EngineSpec, settings: Settings) -> EnginePlace:
    key = engine_key(spec, settings)
    home = settings.home / "engines"
    folder = home
    if len(os.fsencode(home / f"{key}.sock")) > SOCKET_PATH_BYTES:
        folder = short_folder()
    private_folder(home)
    private_folder(folder)
    return EnginePlace(spec, folder, home / f"{key}.log", key)


def engine_key(spec: EngineSpec, settings: Settings) -> str:
    """A hash of everything in which two engines can differ.

    It includes size and time of the checkpoint's files, so a checkpoint that is written anew, or gets another chat
    template, has another engine. It includes our version, because another version may speak another protocol.
    """
    folder = Path(spec.checkpoint)
    files = sorted(f for f in folder.iterdir() if f.suffix in CHECKPOINT_FILES) if folder.is_dir() else []
    stamps = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    identity = [
        [getattr(spec, field) for field in spec.__slots__],
        stamps,
        str(settings.home),
        platform.node(),
        sys.prefix,
        __version__,
    ]
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]


def short_folder() -> Path:
    """A folder of this user with a path that is short enough for a socket."""
    for base in (tempfile.gettempdir(), "/tmp"):
        folder = Path(base) / f"complete-fn-{getpass.getuser()}"
        if len(os.fsencode(folder)) + 24 <= SOCKET_PATH_BYTES:
            return folder
    raise EngineError(f"No folder for the engine's socket: {tempfile.gettempdir()!r} is too long. Set TMPDIR.")


def private_folder(folder: Path) -> None:
    """Make the folder, for this user alone. A link of this user's is followed, and what it leads to stays as it is.

    Raises:
        EngineError: The folder, or a link in its place, belongs to another user, or cannot be made.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        named = folder.lstat()
        if {named.st_uid, folder.stat().st_uid} != {os.getuid()}:
            raise EngineError(f"The folder {str(folder)!r} belongs to another user. Set COMPLETE_FN_HOME or TMPDIR.")
        if named.st_mode & 0o077 and not stat.S_ISLNK(named.st_mode):
            opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)  # in case a link has come meanwhile
            try:
                os.fchmod(opened, 0o700)
            finally:
                os.close(opened)
    except OSError as error:
        raise EngineError(
            f"The folder {str(folder)!r} cannot be used: {error.strerror}. Set COMPLETE_FN_HOME."
        ) from error


@contextlib.contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Hold the file lock. The kernel releases it when its holder dies.

    Raises:
        EngineError: The file cannot be locked; some network file systems have no locks.
    """
    with contextlib.ExitStack() as held:
        try:
            file = held.enter_context(path.open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise EngineError(f"{str(path)!r} cannot be locked: {error.strerror}. {LOCAL_HOME}") from error
        yield


def join_engine(place: EnginePlace) -> tuple[socket.socket, subprocess.Popen[bytes] | None]:
    """A connection to the place's engine, and the child if this call started it.

    Raises:
        EngineError: The child cannot be started.
        EngineMissingError: vLLM is not installed.
    """
    with hold_lock(place.lock):
        running = connect_if_running(place)
        if running is not None:
            return running, None
        return start_engine(place)


def connect_if_running(place: EnginePlace) -> socket.socket | None:
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        link.connect(str(place.socket))
    except OSError:
        link.close()
        return None
    return link


def start_engine(place: EnginePlace) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Bind the socket and start the child on it. The child inherits its first connection, so it notices when we die."""
    if importlib.util.find_spec("vllm") is None:
        raise missing("vllm")
    place.socket.unlink(missing_ok=True)
    ours, theirs = socket.socketpair()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(place.socket))
        listener.listen(64)
        with open_log(place.log) as log:
            child = subprocess.Popen(
                child_command(place, listener.fileno(), theirs.fileno()),
                pass_fds=(listener.fileno(), theirs.fileno()),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=engine_environment(place.spec),
            )
        tell_spec(child, place.spec)
    except OSError as error:
        ours.close()
        raise EngineError(
            f"The engine of {place.spec.checkpoint!r} cannot be started: {error}. {LOCAL_HOME}"
        ) from error
    finally:
        listener.close()
        theirs.close()
    return ours, child


def tell_spec(child: subprocess.Popen[bytes], spec: EngineSpec) -> None:
    """Write the spec to the child's standard input: it can hold secrets, and every user can read a command line."""
    line = json.dumps({field: getattr(spec, field) for field in spec.__slots__}) + "\n"
    assert child.stdin is not None
    with (
        contextlib.suppress(BrokenPipeError),
        child.stdin as pipe,
    ):  # a child that has already ended tells why in its log
        pipe.write(line.encode())


def child_command(place: EnginePlace, listener: int, parent: int) -> list[str]:
    files = [
        "--listener",
        str(listener),
        "--parent",
        str(parent),
        "--socket",
        str(place.socket),
        "--lock",
        str(place.lock),
    ]
    # -P: Python must not import from the user's current folder, which may have the name of one of our imports.
    return [sys.executable, "-P", "-m", "complete_fn_workers.engine", *files]


def engine_environment(spec: EngineSpec) -> dict[str, str]:
    own = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # we run a child process already; vLLM's own would cost 20 s at start
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": str(available_cores()),
        # Waiting threads that spin longer would take the cores from a second engine on this machine.
        "GOMP_SPINCOUNT": "10000",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    if Path(spec.checkpoint).is_dir():
        own["HF_HUB_OFFLINE"] = "1"
    ranks = int(spec.engine_args.get("tensor_parallel_size", 1))
    if ranks > 1:
        own["VLLM_CPU_OMP_THREADS_BIND"] = thread_binding(ranks)  # ignored on a GPU
    environment = child_environment(own)
    return {**environment, **allocator_environment(environment)}


def thread_binding(ranks: int) -> str:
    """An even share of our CPUs for each rank, in vLLM's form `0,1|2,3`. vLLM's own way needs a NUMA node per rank."""
    cpus = usable_cpus()
    share = max(1, len(cpus) // ranks)
    return "|".join(",".join(map(str, cpus[n * share : (n + 1) * share] or cpus[-1:])) for n in range(ranks))


def open_log(path: Path) -> IO[bytes]:
    """Open a new log. The previous one, perhaps of an engine that died, is kept beside it."""
    if path.exists():
        path.replace(path.with_suffix(".log.1"))
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")


def log_tail(path: Path, lines: int = 12) -> str:
    """The last lines of an engine's log, for an error message."""
    try:
        return "\n".join(path.read_text("utf-8", "replace").splitlines()[-lines:])
    except OSError:
        return ""
