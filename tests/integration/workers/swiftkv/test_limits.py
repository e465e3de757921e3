"""What SwiftKV cannot do is refused before anything is loaded, with the setting and the remedy in the message."""

from __future__ import annotations

# ruff: noqa: E402 - skipped before anything heavy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams

from complete_fn_workers.swiftkv.reference import SwiftKV
from complete_fn_workers.swiftkv.serving.attention import select_tokens
from complete_fn_workers.swiftkv.serving.limits import PromptWatcher, V2PromptWatcher, refuse_unsupported
from complete_fn_workers.swiftkv.training.exact import SETTINGS
from tests.random_checkpoints import TINY, config_of

pytestmark = pytest.mark.engine


def refused(folder: Path, config: dict[str, Any] | None = None, **settings: Any) -> str:
    """The message with which vLLM's configuration is refused."""
    (folder / "config.json").write_text(json.dumps(config_of(TINY, SwiftKV(4)) | (config or {})))
    with pytest.raises(Exception) as caught:  # noqa: PT011 - vLLM wraps it in pydantic's
        EngineArgs(str(folder), **(SETTINGS | settings)).create_engine_config()
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"swiftkv": False}, "swiftkv: false"),
        ({"num_key_value_layers": 9}, "must lie in 1..7"),
        ({"num_key_value_layers": 8}, "nothing is left to skip"),
        ({"key_value_group_size": 3}, "must divide the 4 layers"),
        ({"attention_bias": True}, "attention_bias"),
    ],
)
def test_config(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    assert message in refused(tmp_path, config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size is 2"),
        ({"enable_lora": True}, "Merge the adapter"),
        ({"runner": "pooling"}, "generates text only"),
        ({"kv_transfer_config": {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}}, "KV connector"),
        ({"kv_sharing_fast_prefill": True}, "leave kv_sharing_fast_prefill off"),
    ],
)
def test_engine_settings(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    assert message in refused(tmp_path, **settings)


def engine_config(**changes: Any) -> Any:
    """As much of a `VllmConfig` as is looked at; for settings that vLLM itself refuses here for want of a GPU."""
    parallel = {"pipeline_parallel_size": 1, "decode_context_parallel_size": 1, "prefill_context_parallel_size": 1}
    hf_config = SimpleNamespace(num_key_value_layers=4, num_hidden_layers=8)
    made: dict[str, Any] = {
        "model_config": SimpleNamespace(hf_config=hf_config, runner_type="generate"),
        "kv_transfer_config": None,
        "parallel_config": SimpleNamespace(**(parallel | {"use_ubatching": False} | changes.pop("parallel", {}))),
        "lora_config": None,
        "cache_config": SimpleNamespace(kv_sharing_fast_prefill=False),
        "speculative_config": None,
    }
    return SimpleNamespace(**(made | changes))


@pytest.mark.parametrize("method", ["eagle", "eagle3", "mtp", "draft_model"])
def test_drafters_that_need_hidden_states(method: str) -> None:
    with pytest.raises(ValueError, match=f"'{method}'.*ngram"):
        refuse_unsupported(engine_config(speculative_config=SimpleNamespace(method=method)))
    refuse_unsupported(engine_config(speculative_config=SimpleNamespace(method="ngram")))


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"decode_context_parallel_size": 2}, "context parallelism"),
        ({"prefill_context_parallel_size": 2}, "context parallelism"),
        ({"use_ubatching": True}, "micro-batching"),
    ],
)
def test_parallelism(parallel: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refuse_unsupported(engine_config(parallel=parallel))


@pytest.mark.parametrize("watcher", [PromptWatcher, V2PromptWatcher])
def test_prompt_logprobs(watcher: Any) -> None:
    watcher.validate_params(SamplingParams(logprobs=3))
    with pytest.raises(ValueError, match="swiftkv_skip_prefill"):
        watcher.validate_params(SamplingParams(prompt_logprobs=0))


def test_the_second_runner_accepts_its_watcher() -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.worker.gpu.sample.logits_processor import build_custom_logits_processors_params_validator as build

    validate = build([f"{V2PromptWatcher.__module__}:{V2PromptWatcher.__name__}"])
    with pytest.raises(VLLMValidationError):
        validate(SamplingParams(prompt_logprobs=1))


def test_selection_is_the_tail_of_each_finished_request() -> None:
    starts = torch.tensor([0, 15, 19, 19, 28])  # 15, 4, 0 (padding) and 9 tokens
    chosen = select_tokens(starts, 1, None)
    assert (chosen.rows.tolist(), chosen.indices.tolist()) == ([0, 1, 3], [14, 18, 27])
    chosen = select_tokens(starts, 3, [False, True, True, True])
    assert (chosen.counts.tolist(), chosen.indices.tolist()) == ([3, 3], [16, 17, 18, 25, 26, 27])
    assert select_tokens(starts, 1, [False] * 4).indices.tolist() == []
