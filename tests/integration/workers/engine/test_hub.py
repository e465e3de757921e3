"""A Hub id with a revision, from the Hub's cache on this machine, without network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine
COMMIT = "0123456789abcdef0123456789abcdef01234567"
USER = f"""
import json
from pathlib import Path
from complete_fn.engines.catalogue import Model
from complete_fn.settings import load_settings
from complete_fn.types import CompletionRequest, SamplingParams
from complete_fn_workers.engine.client import open_engine

model = Model("hub", "owner/tiny-llama", revision="{COMMIT}", engine_args={{"max_num_seqs": 4}})
engine = open_engine(model, load_settings())
counts = engine.count_tokens(["Name the section"])
started = engine.pid
(row,) = engine.stream([CompletionRequest("hub", "Name the section", SamplingParams(max_tokens=3))], "me")
print(json.dumps([counts, started, row[1].finish_reason, row[1].usage.completion_tokens]))
engine.close()
"""


def test_hub_id_is_served_from_the_cache(needs_vllm: None, tiny_model: Path, tmp_path: Path) -> None:
    cached = tmp_path / "hub" / "models--owner--tiny-llama"
    shutil.copytree(tiny_model, cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    place = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "COMPLETE_FN_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", USER], env={**os.environ, **place}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (tokens,), started, reason, length = json.loads(done.stdout)
    assert tokens > 0
    assert started is None, "counting tokens started the engine"
    assert (reason, length) == ("length", 3)
