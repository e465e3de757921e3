"""What the engine is asked for a row and what is made of its answer, with vLLM's names stubbed."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer

import complete_fn_workers
from complete_fn.engines.tokenizer import count_with

DEMO = Path(complete_fn_workers.__path__[0]) / "models" / "demo-llama" / "tokenizer.json"


class Record(SimpleNamespace):
    """vLLM's parameters, as they were given."""


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Any:
    vllm, sampling = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    vars(vllm).update(SamplingParams=Record)
    vars(sampling).update(RequestOutputKind=SimpleNamespace(FINAL_ONLY=2, CUMULATIVE=0), StructuredOutputsParams=Record)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", sampling)
    monkeypatch.delitem(sys.modules, "complete_fn_workers.engine.rows", raising=False)
    module = importlib.import_module("complete_fn_workers.engine.rows")
    yield module
    sys.modules.pop("complete_fn_workers.engine.rows")


def reader(rows: Any, tokenizer: Tokenizer | None = None) -> Any:
    """Of a model without a chat template."""
    backend = tokenizer or Tokenizer.from_file(str(DEMO))
    return rows.PromptReader(
        SimpleNamespace(backend_tokenizer=backend, chat_template=None, bos_token_id=0, eos_token_id=3)
    )


def output(ids: list[int], logprobs: list[dict[int, Any]]) -> SimpleNamespace:
    outcome = SimpleNamespace(finish_reason="length", logprobs=logprobs, token_ids=[7])
    return SimpleNamespace(outputs=[outcome], prompt_token_ids=ids, num_cached_tokens=0)


def test_rows_of_one_kind_are_scored_by_their_own_labels_tokens(rows: Any) -> None:
    """Behind white space a base model writes a label without the space before it."""
    prompts, sampling = reader(rows), rows.Sampling({"choices": ["utils", "doc"]})
    for prompt in ("Name the section:", "Name the section:\n"):
        asked = rows.request_of(prompts, prompt, sampling, 1024, 24)
        assert asked.params.logprob_token_ids == list(asked.search.place.ways)
        scores = {token: SimpleNamespace(logprob=-1.0) for token in asked.params.logprob_token_ids}
        assert asked.take(output(asked.ids, [scores]))[0] == "utils"
    assert len(sampling.of_labels) == 2


def test_a_row_without_the_labels_probabilities_says_why(rows: Any) -> None:
    """vLLM gives none where it guesses tokens ahead by n-grams."""
    asked = rows.request_of(reader(rows), "Name the section:", rows.Sampling({"choices": ["utils", "doc"]}), 1024, 24)
    text, reason, code, message, scores, *tokens = asked.take(output(asked.ids, []))
    assert (text, reason, code, scores) == (None, None, "invalid_request", None)
    assert "speculative_config" in message
    assert tokens == [len(asked.ids), 0, 1]


def test_prompts_are_neither_cut_nor_filled_whatever_the_tokenizers_file_says(rows: Any, tmp_path: Path) -> None:
    stored = json.loads(DEMO.read_text("utf-8"))
    stored["truncation"] = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    stored["padding"] = {
        "strategy": {"Fixed": 32},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    }
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(stored), "utf-8")
    texts = ["Name the section of the package " * 12, "x", "no<|eot_id|>x"]
    prompts = reader(rows, Tokenizer.from_file(str(file)))
    assert prompts.count(texts) == count_with(file, texts) == reader(rows).count(texts)
    assert len(prompts.token_ids(texts[0])) > 16
    special = Tokenizer.from_file(str(file))
    special.encode_special_tokens = True
    assert reader(rows, special).count(texts)[2] > prompts.count(texts)[2]
