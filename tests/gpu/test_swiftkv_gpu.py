"""SwiftKV on a CUDA device: exact in float32, eager and with graphs, under both model runners."""

from __future__ import annotations

# ruff: noqa: E402 - skipped before anything heavy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from complete_fn_workers.swiftkv.reference import SwiftKV
from tests.random_checkpoints import TINY, random_model, write_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CHECK = "complete_fn_workers.swiftkv.training.exact"


@pytest.mark.parametrize("second_runner", ["0", "1"])
@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("group", [1, 2])
def test_exact(tmp_path: Path, group: int, eager: bool, second_runner: str) -> None:
    folder = write_checkpoint(random_model(TINY, SwiftKV(4, group)), tmp_path / "m")
    # Of the CUDA backends only this one takes float32.
    settings: dict[str, Any] = {"attention_backend": "TRITON_ATTN", "enforce_eager": eager}
    settings["max_num_batched_tokens"] = 300
    done = subprocess.run(
        [sys.executable, "-m", CHECK, str(folder), "--set", json.dumps(settings)],
        env=os.environ | {"VLLM_USE_V2_MODEL_RUNNER": second_runner},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
