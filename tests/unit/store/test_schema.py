"""The schema: migrations make what the tables say, several first openers are safe, a newer store is refused."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from complete_fn.errors import StoreError, StoreLostError
from complete_fn.settings import load_settings
from complete_fn.store import job_tables
from complete_fn.store.backends import masked
from complete_fn.store.schema import HEAD, configuration
from complete_fn.store.store import Store
from complete_fn.store.tables import metadata

OPENER = """
import sys, time
from complete_fn.store.store import Store
from complete_fn.types import Asker
while time.time() < float(sys.argv[2]):
    pass
store = Store(sys.argv[1])
store.finish(store.begin(Asker(), "m", "USD", "example"), "done")
"""


def test_migrations_make_what_the_tables_say(store_url: str) -> None:
    store = Store(store_url)
    assert job_tables.jobs.metadata is metadata
    with store.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
        assert ScriptDirectory.from_config(configuration(connection)).get_heads() == [HEAD]
    store.close()


def test_processes_that_open_a_new_store_at_once(store_url: str) -> None:
    command = [sys.executable, "-c", OPENER, store_url, str(time.time() + 2)]
    openers = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(4)]
    for opener in openers:
        _, errors = opener.communicate(timeout=120)
        assert (opener.returncode, errors.decode()) == (0, "")
    with Store(store_url).read() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM attempts WHERE status = 'done'")).scalar() == 4


def test_a_current_store_is_opened_without_alembic(store_url: str) -> None:
    Store(store_url).close()
    code = (
        "import sys; from complete_fn.store.store import Store; Store(sys.argv[1]); assert 'alembic' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, store_url], check=True, timeout=120)


def test_a_newer_store_is_refused(store_url: str) -> None:
    store = Store(store_url)
    with store.write() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9001'"))
    store.close()
    with pytest.raises(StoreError, match=r"has schema 9001, and this complete-fn knows only up to 0005\. Update"):
        Store(store_url)


def test_a_store_from_before_the_first_release_is_refused(store_url: str) -> None:
    store = Store(store_url)
    with store.write() as connection:
        connection.execute(sa.text("DROP TABLE alembic_version"))
    store.close()
    with pytest.raises(StoreError, match=r"before the first release\. Move it away"):
        Store(store_url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://me:secret@host/x", r"mysql://me:\*\*\*@host/x cannot be used\. It must be"),
        ("postgresql://me:secret@127.0.0.1:1/x", r"postgresql://me:\*\*\*@127\.0\.0\.1:1/x cannot be used: .*refused"),
        ("postgresql://me@127.0.0.1:1/x?password=secret", r"password=\.\.\. cannot be used"),
        ("postgresql://me:secret@host:port/x", "The database URL cannot be read"),
    ],
)
def test_a_database_that_cannot_be_used_is_named_without_its_password(url: str, message: str) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        Store(url)
    assert "secret" not in str(caught.value)


def test_a_wrong_password_is_told_at_once(postgres_url: str) -> None:
    url = sa.make_url(postgres_url).set(password="wr0ng")
    with pytest.raises(StoreError, match="authentication failed") as caught:
        Store(url.render_as_string(hide_password=False))
    assert not isinstance(caught.value, StoreLostError)
    assert "wr0ng" not in str(caught.value)
    assert masked(url) in str(caught.value)


def test_the_environment_names_the_database(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPLETE_FN_DATABASE", postgres_url)
    settings = load_settings()
    assert settings.store == postgres_url
    assert sa.make_url(postgres_url).password not in repr(settings)
