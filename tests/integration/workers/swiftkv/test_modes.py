"""The same exactness under engine modes that need processes of their own: compiled, several processes, two ranks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from complete_fn_workers.swiftkv.reference import SwiftKV
from complete_fn_workers.swiftkv.training.exact import agreement, ask, random_prompts, serve
from tests.random_checkpoints import TINY, random_model, write_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
CHECK = "complete_fn_workers.swiftkv.training.exact"
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
long = pytest.mark.long


def check(folder: Path, environment: dict[str, str], **settings: Any) -> str:
    """Run `complete-fn swiftkv check` in its own process; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", CHECK, str(folder), "--set", json.dumps(settings)],
        env=os.environ | ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("group", [2, pytest.param(1, marks=long)])
def test_ngram_speculation(tmp_path: Path, group: int) -> None:
    folder = write_checkpoint(random_model(TINY, SwiftKV(4, group)), tmp_path / "m")
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    printed = check(folder, {}, speculative_config=drafts, max_num_batched_tokens=100)
    drafted = re.search(r"(\d+) tokens drafted", printed)
    assert drafted is not None, printed
    assert int(drafted[1]) > 100


@long
@pytest.mark.parametrize("group", [1, 2])
def test_several_processes(tmp_path: Path, group: int) -> None:
    folder = write_checkpoint(random_model(TINY, SwiftKV(4, group)), tmp_path / "m")
    check(folder, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}, max_num_batched_tokens=200)


@long
@pytest.mark.parametrize("processes", ["0", "1"])
def test_compiled(tmp_path: Path, processes: str) -> None:
    folder = write_checkpoint(random_model(TINY, SwiftKV(4, 2)), tmp_path / "m")
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": processes}
    check(folder, environment, enforce_eager=False, max_num_batched_tokens=200)


@long
def test_two_tensor_parallel_ranks(tmp_path: Path) -> None:
    folder = write_checkpoint(random_model(TINY, SwiftKV(4, 2)), tmp_path / "m")
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    check(folder, environment, tensor_parallel_size=2, max_num_batched_tokens=300)


@long
def test_fp8_cache_differs_from_the_reference_no_more_than_plain_llama_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FP8 keys and values are rounded, so nothing is exact; SwiftKV must not add to that."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    prompts = random_prompts((1, 33, 200, 777), TINY.vocab_size, seed=5)
    worst = []
    for name, swiftkv in (("plain", None), ("swiftkv", SwiftKV(4, 2))):
        model = random_model(TINY, swiftkv)
        llm = serve(write_checkpoint(model, tmp_path / name), kv_cache_dtype="fp8", max_num_batched_tokens=100)
        found = agreement(model, prompts, ask(llm, prompts))
        worst.append(found.worst)
    plain, swiftkv_worst = worst
    assert 0.001 < swiftkv_worst < 2 * plain
