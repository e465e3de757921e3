"""The parts of the embedded engine that need no engine: frames, places, allocator, checks of answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from complete_fn.engines.structured_output import checked
from complete_fn.settings import Settings
from complete_fn.types import Completion, CompletionRequest, Message
from complete_fn_workers.engine import launch
from complete_fn_workers.engine.allocator import KEEP_MEMORY, allocator_environment, find_tcmalloc
from complete_fn_workers.engine.launch import EngineSpec, engine_environment, engine_key, engine_place, thread_binding
from complete_fn_workers.engine.link import is_sendable
from complete_fn_workers.engine.machine import available_cores, computes_bfloat16, memory_bytes
from complete_fn_workers.engine.wire import Frames, pack

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@settings(deadline=None)
@given(st.lists(st.dictionaries(TEXTS, TEXTS, max_size=3), max_size=5), st.integers(1, 9))
def test_frames_survive_any_cut(messages: list[dict[str, str]], size: int) -> None:
    stream = b"".join(pack(m) for m in messages)
    frames = Frames()
    received = [m for at in range(0, len(stream), size) for m in frames.feed(stream[at : at + size])]
    assert received == messages
    assert not frames.buffer


def test_lone_surrogate_cannot_be_packed_and_is_found_before() -> None:
    with pytest.raises(UnicodeEncodeError):
        pack({"rows": [[0, "a\ud800"]]})
    assert not is_sendable(CompletionRequest("m", "a\ud800"))
    assert not is_sendable(CompletionRequest("m", (Message("user", "fine"), Message("user", "\udfff"))))
    assert not is_sendable(CompletionRequest("m", ()))
    assert is_sendable(CompletionRequest("m", ""))


def spec(folder: Path) -> EngineSpec:
    return EngineSpec(str(folder), None, None, {"max_num_seqs": 4}, None)


def test_key_tells_engines_apart(tmp_path: Path) -> None:
    home = Settings(tmp_path, None, None)
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1")
    first = spec(tmp_path)
    key = engine_key(first, home)
    assert key == engine_key(spec(tmp_path), home)
    assert key != engine_key(replace(first, engine_args={"max_num_seqs": 5}), home)
    assert key != engine_key(replace(first, kv_cache_gib=2.0), home)
    time.sleep(0.01)
    weights.write_bytes(b"2")
    assert key != engine_key(first, home), "a checkpoint trained anew must not be answered by the old engine"


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json", "generation_config.json"])
def test_an_edited_chat_template_or_default_is_another_engine(name: str, tmp_path: Path) -> None:
    home = Settings(tmp_path / "home", None, None)
    for file in ("config.json", name):
        (tmp_path / file).write_text("{}")
    key = engine_key(spec(tmp_path), home)
    (tmp_path / name).write_text('{"a": 1}')
    assert key != engine_key(spec(tmp_path), home)


def test_another_version_has_an_engine_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Settings(tmp_path / "home", None, None)
    (tmp_path / "config.json").write_text("{}")
    key = engine_key(spec(tmp_path), home)
    monkeypatch.setattr("complete_fn_workers.engine.launch.__version__", "0.0.1")
    assert key != engine_key(spec(tmp_path), home)


def test_folders_are_private_even_if_they_were_not(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "home" / "engines").mkdir(parents=True)
    (tmp_path / "home" / "engines").chmod(0o755)
    place = engine_place(spec(tmp_path), Settings(tmp_path / "home", None, None))
    assert place.folder.stat().st_mode & 0o077 == 0
    assert len(os.fsencode(place.socket)) <= 100


def test_the_childs_spec_is_on_no_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """engine_args may hold an hf_token, and every user can list the command lines of all."""
    (tmp_path / "config.json").write_text("{}")
    given = replace(spec(tmp_path), engine_args={"hf_token": "hf_4711"})
    place = engine_place(given, Settings(tmp_path / "home", None, None))
    assert "hf_4711" not in " ".join(launch.child_command(place, 3, 4))
    child_code = "import sys; print(sys.stdin.readline(), end='', flush=True); print(repr(sys.stdin.read()))"
    monkeypatch.setattr(launch, "child_command", lambda *_: [sys.executable, "-c", child_code])
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: name)
    link, child = launch.start_engine(place)
    assert child.wait(30) == 0
    link.close()
    line, rest = place.log.read_text().splitlines()
    assert (json.loads(line), rest) == (asdict(given), "''")
    monkeypatch.setattr(launch, "child_command", lambda *_: [sys.executable, "-c", "import sys; sys.exit(3)"])
    huge = replace(place, spec=replace(given, engine_args={"hf_token": "x" * 1_000_000}))
    link, child = launch.start_engine(huge)  # which ends before it has read
    assert child.wait(30) == 3
    link.close()


def test_ranks_share_the_cpus() -> None:
    shares = [share.split(",") for share in thread_binding(2).split("|")]
    cpus = [cpu for share in shares for cpu in share]
    assert len(shares) == 2
    assert len(set(cpus)) == len(cpus) or len(cpus) == 2  # one CPU only: both ranks sit on it


def test_users_own_allocator_is_left_alone() -> None:
    assert allocator_environment({"LD_PRELOAD": "/opt/libjemalloc.so.2"}) == {}
    assert allocator_environment({"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}) == {}


def test_allocator_without_and_with_tcmalloc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import complete_fn_workers.engine.allocator as allocator

    monkeypatch.setattr(allocator, "LIBRARY_FOLDERS", (str(tmp_path),))
    assert find_tcmalloc() is None
    assert allocator_environment({}) == {"GLIBC_TUNABLES": KEEP_MEMORY}
    library = tmp_path / "x86_64-linux-gnu" / "libtcmalloc_minimal.so.4"
    library.parent.mkdir()
    library.touch()
    assert allocator_environment({"LD_PRELOAD": "/a.so"}) == {"LD_PRELOAD": f"{library}:/a.so"}


def test_childs_environment_keeps_vllm_inside_and_local_models_offline(tmp_path: Path) -> None:
    environment = engine_environment(spec(tmp_path))
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert int(environment["OMP_NUM_THREADS"]) == available_cores()
    assert "VLLM_CPU_OMP_THREADS_BIND" not in environment
    assert memory_bytes() > 1 << 28


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 fma\n\nprocessor : 1\nflags\t\t: fpu avx2 fma\n", False),
        ("flags\t\t: fpu avx512f avx512_vnni\n", False),
        ("flags\t\t: fpu avx512f avx512_bf16\n", True),
        ("flags\t\t: fpu avx2 amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16\n", True),
    ],
)
def test_bfloat16_is_read_from_the_cpus_flags(
    cpuinfo: str, expected: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import complete_fn_workers.engine.machine as machine

    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert computes_bfloat16(), "no file, no finding"
    machine.CPUINFO.write_text(cpuinfo)
    assert computes_bfloat16() == expected


def test_answers_are_checked_against_the_schema() -> None:
    schema = json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    good, broken, cut = Completion('{"a": 1}', "stop"), Completion('{"a": "x"}', "stop"), Completion('{"a', "length")
    request = CompletionRequest("m", "p", response_format=schema)
    assert checked(good, request) is good
    assert checked(broken, CompletionRequest("m", "p")) is broken
    for bad, words in ((broken, "at a"), (cut, "cut by max_tokens")):
        found = checked(bad, request)
        assert found.error is not None
        assert found.error.code == "schema_mismatch"
        assert words in found.error.message
        assert found.text == bad.text


SLOW_READER = """
import socket, time, pathlib, tempfile
from complete_fn_workers.engine.connections import EngineConnections
from complete_fn_workers.engine.wire import Frames

folder = pathlib.Path(tempfile.mkdtemp())
listener = socket.socket(socket.AF_UNIX)
listener.bind(str(folder / "s"))
listener.listen()
ours, theirs = socket.socketpair()
connections = EngineConnections(listener, theirs, (folder / "s", folder / "l"))
(connection,) = connections.open
began = time.monotonic()
for n in range(40):
    connections.send(connection, {"done": [n, "x" * 100_000]})
assert time.monotonic() - began < 1.0, "a parent that does not read stalls the engine"
assert connection.unsent, "the socket took it all: the test shows nothing"
frames, numbers = Frames(), []
while len(numbers) < 40:
    numbers += [m["done"][0] for m in frames.feed(ours.recv(1 << 20))]
assert numbers == list(range(40))
ours.close()
time.sleep(5)
print("still here")
"""


def test_parent_that_does_not_read_stalls_nobody_and_the_child_ends_when_alone() -> None:
    done = subprocess.run([sys.executable, "-c", SLOW_READER], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("", "")
