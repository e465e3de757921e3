"""A service with room for one engine and jobs of two models: all is done, one engine at a time, with few starts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from complete_fn import EchoEngine
from complete_fn.engines.catalogue import Model
from complete_fn.service.engine_host import EngineHost
from complete_fn.service.state import ServiceState
from complete_fn.settings import Settings
from complete_fn.types import Completion, CompletionRequest
from tests.integration.server.conftest import Running, at_service
from tests.integration.server.jobs.test_server_jobs import parquet_bytes, submit, upload, wait

MODELS = "".join(f"[models.{name}]\ncheckpoint = '{name}'\nengine = 'echo'\n" for name in ("one", "two"))


class Engines:
    """What opens them, and how many are open."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.opened: list[str] = []
        self.most = 0

    def __call__(self, model: Model, settings: Settings) -> EchoEngine:
        engines = self

        class Counted(EchoEngine):
            begun = False

            def stream(self, requests: Iterable[CompletionRequest], tenant: str) -> Iterator[tuple[int, Completion]]:
                if not self.begun:
                    self.begun = True
                    engines.open.append(model.name)
                    engines.opened.append(model.name)
                    engines.most = max(engines.most, len(engines.open))
                return super().stream(requests, tenant)

            def close(self) -> None:
                if self.begun:
                    engines.open.remove(model.name)

        return Counted(64, row_seconds=0.002, remembers=False)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Engines:
    found = Engines()
    monkeypatch.setattr("complete_fn.engines.base.open_engine", found)
    monkeypatch.setenv("COMPLETE_FN_ENGINES", "1")
    monkeypatch.setattr("complete_fn.service.job_files.PART_ROWS", 20)
    return found


def test_two_tenants_with_a_model_each_share_one_place(engines: Engines, tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text(MODELS)
    with at_service(EngineHost(ServiceState(tmp_path / "home", tmp_path / "models.toml"))) as running:
        jobs = [(key, begin(running, key, model)) for key, model in keys_of(running.state)]
        with running.http(jobs[0][0]) as client:
            chat = {"model": "two", "messages": [{"role": "user", "content": "hello"}]}
            assert client.post("/v1/chat/completions", json=chat).status_code == 200
        for key, job in jobs:
            with running.http(key) as client:
                done = wait(client, job)
            assert (done["rows"]["done"], done["rows"]["failed"]) == (400, 0)
    assert engines.most == 1
    assert {"one", "two"} == set(engines.opened)
    assert len(engines.opened) <= 6  # and not with each of 40 parts


def keys_of(state: ServiceState) -> list[tuple[str, str]]:
    return [(state.keys.create(name, "ann"), name) for name in ("one", "two")]


def begin(running: Running, key: str, model: str) -> str:
    with running.http(key) as client:
        file = upload(client, parquet_bytes([{"text": f"{model} row {n}"} for n in range(400)]))
        return str(submit(client, file, model=model)["id"])
