"""The same contract for a local folder and an S3-compatible server: whole or not at all, by key, for `run` and jobs."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from complete_fn.errors import InvalidOptionError, NotFoundError, StorageError
from complete_fn.rows.allowed_paths import Allowed
from complete_fn.rows.object_storage import GuardedFile, Storage
from deploy.servers import free_port
from tests.objects import SETTINGS, object_server

MODELS = '[models.echo]\ncheckpoint = "echo"\nengine = "echo"\nmax_model_len = 40\nprices = { input = 1, output = 1 }\n'


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with object_server("complete-fn-test") as url:
        yield url


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage(str(tmp_path / "objects"))
    return Storage(f"{request.getfixturevalue('bucket')}/{tmp_path.name}")


def put(storage: Storage, key: str, content: bytes) -> None:
    with storage.writing(key) as sink:
        sink.write(content)


def got(storage: Storage, key: str) -> bytes:
    with storage.reading(key) as source:
        return source.read()


def test_objects_by_key(storage: Storage) -> None:
    put(storage, "jobs/a/one", b"1" * 100_000)
    put(storage, "jobs/a/two", b"")
    put(storage, "jobs/ab/one", b"other")
    storage.copy("jobs/a/one", "jobs/a/three")
    assert storage.keys("jobs/a") == ["jobs/a/one", "jobs/a/three", "jobs/a/two"]
    assert (got(storage, "jobs/a/three"), got(storage, "jobs/a/two")) == (b"1" * 100_000, b"")
    with storage.reading("jobs/a/one") as source:
        source.seek(99_999)
        assert source.read() == b"1"
    put(storage, "jobs/a/one", b"again")
    assert got(storage, "jobs/a/one") == b"again"
    storage.delete("jobs/a/two")
    storage.delete("jobs/a/two")
    assert not storage.exists("jobs/a/two")
    storage.delete_folder("jobs/a")
    storage.delete_folder("jobs/a")
    assert storage.keys() == ["jobs/ab/one"]
    with pytest.raises(NotFoundError, match="no 'jobs/a/one'"):
        got(storage, "jobs/a/one")


def test_what_is_not_finished_leaves_no_trace(storage: Storage) -> None:
    put(storage, "a/x", b"before")
    with pytest.raises(TypeError), storage.writing("a/x") as sink:
        sink.writelines([b"half of a " * 1_000_000, None])  # type: ignore[list-item]
    assert got(storage, "a/x") == b"before"
    assert storage.keys() == ["a/x"]


def test_a_large_object_comes_back_whole(storage: Storage) -> None:
    content = bytes(range(256)) * 80_000  # 20 MB: more than one part of an upload
    put(storage, "big", content)
    assert got(storage, "big") == content


def test_writers_at_the_same_time_leave_one_whole_object(storage: Storage) -> None:
    texts = [str(n).encode() * 50_000 for n in range(8)]
    threads = [threading.Thread(target=put, args=(storage, "k", text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got(storage, "k") in texts
    assert storage.keys() == ["k"]


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1/x", "s3://key:secret@bucket/x", "memory://x", "file::s3://b/x", "s3://", "ftp://host/x"],
)
def test_other_urls_are_refused_without_repeating_secrets(url: str) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        Storage(url)
    assert "secret@" not in str(caught.value)


def test_a_server_that_is_not_there_is_an_error_of_ours(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((StorageError, NotFoundError)) as caught:
        put(Storage("s3://no-such-bucket-here/x"), "k", b"x")
    assert SETTINGS["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)


def test_nothing_is_said_of_objects_while_the_server_is_away(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    storage = Storage(f"{bucket}/away")
    storage.fs = type(storage.fs)(skip_instance_cache=True, use_listings_cache=False)
    for ask in (storage.exists, storage.keys, storage.delete, lambda key: got(storage, key)):
        with pytest.raises(StorageError):
            ask("k")


Run = Callable[..., int]


@pytest.fixture
def shell(open_shell: Callable[..., Run]) -> Run:
    return open_shell(MODELS)


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl", "arrow", "jsonl.gz"])
def test_run_reads_and_writes_objects(bucket: str, shell: Run, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"id": ["1", "2"], "text": ["a b", None]}), "in.parquet")
    there, back = f"{bucket}/run/in.{kind}", f"{bucket}/run/{kind}/out.parquet"
    assert shell("run", "-m", "echo", "-p", "{id}", "in.parquet", "--column", "n", "-o", there) == 0
    assert shell("run", "-m", "echo", "-p", "Say {text}", there, "-o", back) == 0
    folder = Storage(f"{bucket}/run/{kind}")
    with folder.reading("out.parquet") as source:
        found: list[Any] = pq.read_table(source).to_pylist()
    assert [row["completion"] for row in found] == ["Say a b", None]
    assert [row["n"] for row in found] == ["1", "2"]
    assert shell("run", "-m", "echo", "-p", "Say {text}", there, "-o", back) == 1
    assert "exists. Say --overwrite" in capsys.readouterr().err
    assert shell("run", "-m", "echo", "-p", "{text}", f"{bucket}/run/none.csv", "-o", "x.csv") == 1
    assert "no 'none.csv'" in capsys.readouterr().err


# -- failures ----------------------------------------------------------------------------------------------------------


class Failing:
    """An open file whose reads and writes fail as a disk's do."""

    def __init__(self, inner: Any, code: int) -> None:
        self.inner, self.code = inner, code

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def readinto(self, buffer: Any) -> int:
        raise OSError(self.code, os.strerror(self.code), "/secret/place")

    write = readinto


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE])
def test_a_disk_that_fails_in_the_middle_of_a_file_is_one_error_of_ours(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    with storage.writing("k") as sink:
        pq.write_table(pa.table({"n": range(1000)}), sink)
    before = got(storage, "k")
    real = GuardedFile.__init__
    monkeypatch.setattr(GuardedFile, "__init__", lambda self, inner, faults: real(self, Failing(inner, code), faults))
    with pytest.raises(StorageError, match=os.strerror(code)):
        put(storage, "k", b"x" * 100_000)
    with pytest.raises(StorageError), storage.writing("k") as sink:
        pq.write_table(pa.table({"n": range(100_000)}), sink)
    with pytest.raises(StorageError):
        got(storage, "k")
    with pytest.raises(StorageError), storage.reading("k") as source:
        pq.read_table(source)
    monkeypatch.undo()
    assert (got(storage, "k"), storage.keys()) == (before, ["k"])


def test_what_a_caller_does_wrong_with_a_file_stays_the_callers(storage: Storage) -> None:
    put(storage, "k", b"no table")
    with pytest.raises(pa.ArrowInvalid), storage.reading("k") as source:
        pq.read_table(source)
    with pytest.raises(OSError, match="the caller's"), storage.writing("other"):
        raise OSError("the caller's")
    assert storage.keys() == ["k"]


def test_a_file_under_a_root_fails_as_the_storage_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Allowed(str(tmp_path), ("a", "b.csv"))
    with place.writing() as sink:
        sink.write(b"before")
    real = GuardedFile.__init__
    monkeypatch.setattr(GuardedFile, "__init__", lambda self, inner, faults: real(self, Failing(inner, 28), faults))
    with pytest.raises(StorageError), place.writing() as sink:
        sink.write(b"x" * 100_000)
    with pytest.raises(StorageError), place.reading() as source:
        source.read()
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.csv"]
    assert (tmp_path / "a" / "b.csv").read_bytes() == b"before"
    with pytest.raises(StorageError), Allowed(str(tmp_path / "gone"), ("b.csv",)).writing():
        pass
