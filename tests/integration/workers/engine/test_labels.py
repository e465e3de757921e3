"""Labels on the real engine: scores against a plain computation of the same model, one token, the demo's accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from complete_fn.engines.catalogue import Model, find_model
from complete_fn.settings import Settings
from complete_fn.types import Completion, CompletionRequest
from complete_fn_workers.engine.client import open_engine

pytestmark = pytest.mark.engine
LABELS = ("utils", "doc", "text", "the", "them", "therefore", "libs", "libdevel")
PROMPTS = [f"Name the section: {what}" for what in ("a text editor", "fox", "the lazy dog jumps", "x" * 200, "")]


def ask(engine: Any, prompts: list[str], labels: tuple[str, ...]) -> list[Completion]:
    requests = [CompletionRequest("tiny", p, choices=labels) for p in prompts]
    answers = dict(engine.stream(requests, "me"))
    return [answers[n] for n in range(len(prompts))]


def of_transformers(folder: Path) -> Callable[[list[int]], Any]:
    """The model by transformers: log-probabilities of what follows some tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return lambda ids: torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], -1)


def of_swiftkv(folder: Path) -> Callable[[list[int]], Any]:
    """The same of a SwiftKV model, by the plain one in PyTorch."""
    import torch

    from complete_fn_workers.swiftkv.checkpoint import load_model

    model = load_model(folder)
    return lambda ids: torch.log_softmax(model.logits(model.student(torch.tensor([ids])))[0, -1], -1)


def swiftkv_demo(folder: Path) -> Path:
    """The demonstration model converted, its prompt tokens through 4 layers: it answers nonsense, but exactly."""
    from complete_fn_workers.swiftkv.cli import main

    demo = find_model("demo-llama").local_folder
    assert demo is not None
    assert main(["convert", str(demo), str(folder), "--num-key-value-layers", "4", "--drop-teacher"]) == 0
    return folder


def exact(tokenizer: Any, after: Callable[[list[int]], Any], prompt: str, labels: tuple[str, ...]) -> list[float]:
    """Each label's probability by the definition, every place computed: no search, no engine."""
    turn = [{"role": "user", "content": prompt}]
    rendered = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    start = tokenizer.encode(rendered, add_special_tokens=False)
    tokens = [[*tokenizer.encode(label, add_special_tokens=False), tokenizer.eos_token_id] for label in labels]
    found = []
    for own in tokens:
        score = 1.0
        for depth, token in enumerate(own):
            ways = {other[depth] for other in tokens if other[:depth] == own[:depth]}
            if len(ways) > 1:
                logits = after(start + own[:depth])
                score *= math.exp(logits[token]) / sum(math.exp(logits[way]) for way in ways)
        found.append(score)
    return found


@pytest.mark.parametrize("kind", ["llama", pytest.param("swiftkv", marks=pytest.mark.long)])
def test_scores_are_the_models_and_the_answer_is_the_likeliest_label(
    kind: str, needs_vllm: None, tiny_model: Path, tmp_path: Path
) -> None:
    """In float32, for vLLM would round the weights of the session's engine to bfloat16."""
    import torch
    from transformers import AutoTokenizer

    folder = tiny_model if kind == "llama" else swiftkv_demo(tmp_path / "swiftkv")
    arguments = {"dtype": "float32", "enforce_eager": True, "max_num_batched_tokens": 1024, "block_size": 32}
    model = Model("tiny", str(folder), max_model_len=1024, default_max_tokens=24, engine_args=arguments)
    opened = open_engine(model, Settings(tmp_path / "home", None, None))
    try:
        answers = ask(opened, PROMPTS, LABELS)
    finally:
        opened.close()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    after = (of_transformers if kind == "llama" else of_swiftkv)(folder)
    with torch.no_grad():
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            expected = dict(zip(LABELS, exact(tokenizer, after, prompt, LABELS), strict=True))
            assert sum(expected.values()) == pytest.approx(1.0)
            assert (answer.error, answer.text) == (None, max(LABELS, key=expected.__getitem__))
            assert answer.scores is not None
            known = {label: score for label, score in answer.scores.items() if score is not None}
            assert answer.text in known
            assert known == pytest.approx({label: expected[label] for label in known}, rel=1e-3)


def test_labels_with_first_tokens_of_their_own_take_one_token(engine: Any) -> None:
    for answer in ask(engine, PROMPTS, ("utils", "doc", "libs")):
        assert (answer.usage.completion_tokens, answer.finish_reason) == (1, "stop")
        assert answer.scores is not None
        assert sum(s or 0.0 for s in answer.scores.values()) == pytest.approx(1.0, abs=1e-4)


def test_a_prompt_without_room_for_a_label_is_too_long(engine: Any) -> None:
    (answer,) = ask(engine, ["package " * 2000], ("utils", "doc"))
    assert answer.error is not None
    assert answer.error.code == "prompt_too_long"


def test_rows_with_and_without_labels_share_the_engine(engine: Any) -> None:
    from complete_fn.types import SamplingParams

    free = [CompletionRequest("tiny", p, SamplingParams(max_tokens=5)) for p in PROMPTS]
    mixed = [r for p, f in zip(PROMPTS, free, strict=True) for r in (f, CompletionRequest("tiny", p, choices=LABELS))]
    answers = dict(engine.stream(mixed, "me"))
    alone = dict(engine.stream(free, "me"))
    assert [answers[2 * n].text for n in range(len(free))] == [alone[n].text for n in range(len(free))]
    assert all(answers[2 * n + 1].text in LABELS for n in range(len(free)))
