"""A checkpoint's identity: its content, the same on every machine, whatever the files' times."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from complete_fn.engines.catalogue import Model
from complete_fn.engines.checkpoint import checkpoint_digest
from complete_fn.errors import EngineError


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("complete_fn.engines.checkpoint.SMALL", 1000)


def checkpoint(folder: Path, **changed: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    tensors = {f"layer.{n}": np.arange(20_000, dtype=np.float32) + n for n in range(4)}
    save_file(tensors | changed, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def digest(folder: Path) -> str:
    return checkpoint_digest(Model("m", str(folder)))


def test_copies_on_two_machines_are_the_same_model(tmp_path: Path) -> None:
    first = checkpoint(tmp_path / "a" / "llama")
    other = shutil.copytree(first, tmp_path / "b" / "llama", copy_function=shutil.copyfile)
    assert (first / "model.safetensors").stat().st_mtime_ns != (other / "model.safetensors").stat().st_mtime_ns
    assert digest(first) == digest(other)


def test_one_changed_tensor_is_another_model(tmp_path: Path) -> None:
    first = checkpoint(tmp_path / "a")
    scaled = (np.arange(20_000, dtype=np.float32) + 2) * np.float32(1.001)
    assert digest(first) != digest(checkpoint(tmp_path / "b", **{"layer.2": scaled}))
    (first / "config.json").write_text('{"rope_theta": 1}')
    assert digest(first) != digest(checkpoint(tmp_path / "c"))


def test_half_a_file_and_a_folder_elsewhere_are_named(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "a")
    (folder / "model.safetensors").write_bytes(bytes(5_000))
    with pytest.raises(EngineError, match=r"model\.safetensors is no whole safetensors file"):
        digest(folder)
    with pytest.raises(EngineError, match="nowhere is not on this machine"):
        digest(tmp_path / "nowhere")
    assert checkpoint_digest(Model("m", "org/llama", revision="1")) == "embedded|org/llama|1|None"
