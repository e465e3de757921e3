"""SwiftKV on vLLM gives the reference model's answers, in float32, under every way vLLM may cut and reuse the work."""

from __future__ import annotations

# ruff: noqa: E402 - the environment comes first
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # at this size threads only wait for each other

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from complete_fn_workers.demo_model.tokenizer import save_tokenizer, train_tokenizer
from complete_fn_workers.swiftkv.reference import Llama, SwiftKV
from complete_fn_workers.swiftkv.training.exact import LENGTHS, agreement, ask, random_prompts, serve
from tests.random_checkpoints import TINY, random_model, write_checkpoint

pytestmark = pytest.mark.engine

VOCABULARY = TINY.vocab_size


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Llama]]:
    """(engine, reference model) of a random checkpoint; each engine configuration is loaded once."""
    folder = tmp_path_factory.mktemp("swiftkv")
    tokenizer = train_tokenizer(["the quick brown fox {} jumps: over, the lazy dog"] * 4, VOCABULARY)

    @cache
    def checkpoint(kept: int, group: int) -> tuple[Path, Llama]:
        model = random_model(TINY, SwiftKV(kept, group))
        path = write_checkpoint(model, folder / f"{kept}-{group}")
        save_tokenizer(tokenizer, path, TINY.max_position_embeddings)
        return path, model

    @cache
    def loaded(kept: int, group: int, settings: str) -> Any:
        return serve(checkpoint(kept, group)[0], **json.loads(settings))

    def engine(group: int = 1, **settings: Any) -> tuple[Any, Llama]:
        return loaded(4, group, json.dumps(settings, sort_keys=True)), checkpoint(4, group)[1]

    return engine


PLAIN: dict[str, Any] = {"max_num_batched_tokens": 512, "skip_tokenizer_init": False, "disable_log_stats": False}


def model_of(llm: Any) -> Any:
    (model,) = llm.apply_model(lambda whole: whole.model)
    return model


@contextmanager
def counted(llm: Any) -> Iterator[Counter[str]]:
    """Tokens that pass the first and the last layer."""
    seen: Counter[str] = Counter()
    layers = model_of(llm).layers
    first = layers[0].mlp.register_forward_pre_hook(lambda _m, args: seen.update(early=len(args[0])))
    last = layers[-1].mlp.register_forward_pre_hook(lambda _m, args: seen.update(late=len(args[0])))
    try:
        yield seen
    finally:
        first.remove()
        last.remove()


def assert_exact(model: Llama, prompts: list[list[int]], answers: list[Any]) -> None:
    found = agreement(model, prompts, answers)
    assert found.exact, found


@pytest.mark.parametrize("group", [1, 2, 4])
def test_prompt_lengths_across_block_and_chunk_edges_in_one_mixed_batch(engines: Any, group: int) -> None:
    llm, model = engines(group, **PLAIN)
    prompts = random_prompts(LENGTHS, VOCABULARY, seed=group)
    assert_exact(model, prompts, ask(llm, prompts))


def test_single_requests(engines: Any) -> None:
    llm, model = engines(**PLAIN)
    for prompt in random_prompts((1, 32, 33, 600), VOCABULARY, seed=11):
        assert_exact(model, [prompt], ask(llm, [prompt]))


def test_prompt_tokens_do_not_pass_the_later_layers(engines: Any) -> None:
    llm, _ = engines(**PLAIN)
    prompts = random_prompts((1, 40, 512, 513, 1999), VOCABULARY, seed=12)
    with counted(llm) as seen:
        ask(llm, prompts, max_tokens=6)
    answered = 6 * len(prompts)
    assert seen["early"] == sum(map(len, prompts)) + answered - len(prompts)
    # One token of each completed prompt and every decoded one; chunks that complete no prompt send none.
    assert seen["late"] == answered


def test_prefix_cache_hits(engines: Any) -> None:
    llm, model = engines(**PLAIN)
    shared, *tails = random_prompts((640, 1, 30, 32, 33, 100), VOCABULARY, seed=13)
    prompts = [shared + tail for tail in tails]
    assert_exact(model, prompts[:1], ask(llm, prompts[:1]))
    answers = ask(llm, prompts)
    assert [a.num_cached_tokens for a in answers] == [640] * len(prompts)
    assert_exact(model, prompts, answers)


def test_a_lost_cache_entry_is_noticed(engines: Any) -> None:
    llm, model = engines(**PLAIN)
    prompts = random_prompts((100,), VOCABULARY, seed=14)
    owner = model_of(llm).owners[1]
    whole = owner.keys_values

    def without_one(positions: Any, x: Any) -> Any:
        keys, values = whole(positions, x)
        values[positions == 17] = 0
        return keys, values

    owner.keys_values = without_one
    try:
        damaged = agreement(model, prompts, ask(llm, prompts))
    finally:
        owner.keys_values = whole
        llm.reset_prefix_cache()
    assert damaged.worst > 1e-3
    assert_exact(model, prompts, ask(llm, prompts))


@pytest.mark.parametrize("group", [1, 4])
def test_preemption(engines: Any, group: int) -> None:
    llm, model = engines(group, max_num_batched_tokens=300, num_gpu_blocks_override=75, disable_log_stats=False)
    prompts = random_prompts([430] * 6, VOCABULARY, seed=15)
    answers = ask(llm, prompts, max_tokens=80)
    (preempted,) = (m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    assert preempted > 0
    assert_exact(model, prompts, answers)


def test_skipping_on_and_off_are_the_same(engines: Any) -> None:
    skipping, model = engines(2, **PLAIN)
    whole, _ = engines(2, **PLAIN, hf_overrides={"swiftkv_skip_prefill": False})
    prompts = random_prompts((1, 33, 512, 900), VOCABULARY, seed=17)
    with counted(whole) as seen:
        unskipped = ask(whole, prompts)
    assert seen["late"] == seen["early"]
    for one, other in zip(ask(skipping, prompts), unskipped, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
    assert_exact(model, prompts, unskipped)


def test_prompt_logprobs_are_right_without_skipping_and_refused_with(engines: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    whole, model = engines(2, **PLAIN, hf_overrides={"swiftkv_skip_prefill": False})
    (prompt,) = random_prompts((700,), VOCABULARY, seed=18)
    (answer,) = ask(whole, [prompt], max_tokens=1, prompt_logprobs=1)
    with torch.no_grad():
        expected = model.logits(model.student(torch.tensor([prompt])))[0].log_softmax(-1)
    for position, given in enumerate(answer.prompt_logprobs[1:]):
        assert given[prompt[position + 1]].logprob == pytest.approx(
            float(expected[position, prompt[position + 1]]), abs=1e-3
        )
    skipping, _ = engines(2, **PLAIN)
    with pytest.raises(VLLMValidationError, match="swiftkv_skip_prefill"):
        ask(skipping, [prompt], prompt_logprobs=1)
    assert_exact(model, [prompt], ask(skipping, [prompt]))


def test_structured_outputs_are_the_same_as_without_skipping(engines: Any) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    skipping, _ = engines(2, **PLAIN)
    whole, _ = engines(2, **PLAIN, hf_overrides={"swiftkv_skip_prefill": False})
    prompts = random_prompts((5, 40, 600), VOCABULARY, seed=19)
    form = {"structured_outputs": StructuredOutputsParams(regex=r"\{\"a\": [1-9][0-9]{2,4}\}"), "ignore_eos": False}
    decode = skipping.get_tokenizer().decode
    texts = [
        [decode(a.outputs[0].token_ids, skip_special_tokens=True) for a in ask(llm, prompts, max_tokens=24, **form)]
        for llm in (skipping, whole)
    ]
    assert texts[0] == texts[1]
    assert all(100 <= json.loads(text)["a"] <= 99_999 for text in texts[0]), texts


def test_the_last_layer_alone_skipped_with_copied_weights_is_plain_llama(tmp_path: Path) -> None:
    plain = random_model(TINY, None, seed=3)
    student = Llama(TINY, SwiftKV(TINY.num_hidden_layers - 1), tied=False)
    student.load_state_dict(plain.state_dict(), strict=False)
    student.initialise_student()
    prompts = random_prompts((1, 33, 700, 1500), VOCABULARY, seed=20)
    by_vllm = ask(serve(write_checkpoint(plain, tmp_path / "plain")), prompts)
    assert_exact(plain, prompts, by_vllm)
    lossless = serve(write_checkpoint(student, tmp_path / "lossless", keep_teacher=False))
    with counted(lossless) as seen:
        answers = ask(lossless, prompts)
    assert seen["late"] == 8 * len(prompts) < seen["early"]
    assert_exact(plain, prompts, answers)
    assert [a.outputs[0].token_ids for a in answers] == [a.outputs[0].token_ids for a in by_vllm]


@pytest.mark.long
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("chunk", [33, 48, 100, 256, 2304])
@pytest.mark.parametrize("reuse", [True, False])
def test_chunk_sizes(engines: Any, group: int, chunk: int, reuse: bool) -> None:
    llm, model = engines(group, max_num_batched_tokens=chunk, enable_prefix_caching=reuse)
    prompts = random_prompts((*range(1, 140, 7), *LENGTHS), VOCABULARY, seed=chunk)
    assert_exact(model, prompts, ask(llm, prompts, max_tokens=12))
