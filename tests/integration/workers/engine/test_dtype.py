"""The number format of an engine on a CPU: float32 where the CPU would only emulate the checkpoint's own."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from complete_fn.engines.catalogue import find_model

pytestmark = pytest.mark.engine
CONFIG = json.loads((find_model("demo-llama").local_folder or Path()).joinpath("config.json").read_text())


def chosen(folder: Path, monkeypatch: pytest.MonkeyPatch, native: bool, memory: int, **fields: Any) -> str:
    from complete_fn_workers.engine import config

    monkeypatch.setattr(config, "computes_bfloat16", lambda: native)
    monkeypatch.setattr(config, "memory_bytes", lambda: memory)
    (folder / "config.json").write_text(json.dumps(CONFIG | fields))
    return config.cpu_dtype({"checkpoint": str(folder), "revision": None})


def test_float32_only_where_bfloat16_is_emulated_and_the_weights_fit(
    needs_vllm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.platforms import CpuArchEnum, current_platform

    monkeypatch.setattr(type(current_platform), "get_cpu_architecture", lambda *_: CpuArchEnum.X86)
    assert chosen(tmp_path, monkeypatch, native=False, memory=8 << 30) == "float32"
    assert chosen(tmp_path, monkeypatch, native=True, memory=8 << 30) == "auto"
    assert chosen(tmp_path, monkeypatch, native=False, memory=1 << 20) == "auto"
    assert chosen(tmp_path, monkeypatch, native=False, memory=8 << 30, num_hidden_layers=4000) == "auto"
    fp8 = {"quant_method": "fp8"}
    assert chosen(tmp_path, monkeypatch, native=False, memory=8 << 30, quantization_config=fp8) == "auto"
    monkeypatch.setattr(type(current_platform), "get_cpu_architecture", lambda *_: CpuArchEnum.ARM)
    assert chosen(tmp_path, monkeypatch, native=False, memory=8 << 30) == "auto"


@pytest.mark.parametrize("dimensions", [{}, {"hidden_size": 8, "vocab_size": 9, "intermediate_size": [4, 6]}])
def test_a_model_of_other_dimensions_is_left_as_it_is(
    needs_vllm: None, dimensions: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.platforms import CpuArchEnum, current_platform

    from complete_fn_workers.engine import config

    monkeypatch.setattr(type(current_platform), "get_cpu_architecture", lambda *_: CpuArchEnum.X86)
    monkeypatch.setattr(config, "computes_bfloat16", lambda: False)
    odd = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**dimensions))
    monkeypatch.setattr(config, "checkpoint_config", lambda *_: odd)
    assert config.cpu_dtype({"checkpoint": "odd", "revision": None}) == "auto"


def test_swiftkv_checkpoints_are_read_too(needs_vllm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import CpuArchEnum, current_platform

    monkeypatch.setattr(type(current_platform), "get_cpu_architecture", lambda *_: CpuArchEnum.X86)
    own = json.loads((find_model("demo-llama-swiftkv").local_folder or Path()).joinpath("config.json").read_text())
    assert chosen(tmp_path, monkeypatch, native=False, memory=8 << 30, **own) == "float32"


def test_the_bound_on_weights_holds_for_what_ships() -> None:
    pytest.importorskip("vllm", reason="the embedded engine is not installed: complete-fn setup-engine")
    from transformers import LlamaConfig

    from complete_fn_workers.engine.config import most_weights

    folder = find_model("demo-llama").local_folder or Path()
    stored = (folder / "model.safetensors").stat().st_size // 2  # bfloat16
    bound = most_weights(LlamaConfig.from_pretrained(folder))
    assert stored <= 1.01 * bound
    assert bound <= 2.5 * stored
