"""Bytes of a tenant are bounded also where several processes add to them at once."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from complete_fn.errors import StorageFullError
from complete_fn.jobs.storage_quota import StorageQuota
from complete_fn.jobs.uploads import Uploads
from complete_fn.rows.object_storage import Storage
from complete_fn.store.store import Store

AT_ONCE = 6


@pytest.fixture
def uploads(store_url: str, tmp_path: Path) -> Iterator[Uploads]:
    store = Store(store_url)
    yield Uploads(store, Storage(str(tmp_path / "files")), 1 << 30, 30.0, StorageQuota(store, 10_000))
    store.close()


def test_uploads_at_once_keep_within_the_quota(uploads: Uploads) -> None:
    together = threading.Barrier(AT_ONCE)

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if not self.tell():
                together.wait(30)  # each has seen that nothing is used yet
            return super().read(size)

    def save(number: int) -> bool:
        try:
            uploads.save("acme", f"{number}.csv", "user_data", Slow(b"x" * 4_000))
        except StorageFullError:
            return False
        return True

    with ThreadPoolExecutor(AT_ONCE) as pool:
        assert sorted(pool.map(save, range(AT_ONCE))) == [False] * 4 + [True] * 2
    assert uploads.quota.state("acme") == (8_000, 10_000)
    assert len(uploads.storage.keys()) == 2


def test_what_rolls_back_is_not_counted(uploads: Uploads) -> None:
    with pytest.raises(StorageFullError, match="0 bytes are used, 20,000 more are needed, 10,000 are allowed"):
        uploads.save("acme", "a.csv", "user_data", io.BytesIO(b"x" * 20_000))
    with pytest.raises(StorageFullError):
        uploads.quota.refuse("acme", 10_001)
    uploads.quota.refuse("acme", 10_000)
    assert uploads.quota.state("acme") == (0, 10_000)
