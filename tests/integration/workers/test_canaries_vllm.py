"""Canaries: what the engine and SwiftKV read of vLLM's insides is still there; else, what is missing is named.

Of vLLM, and of ours that imports it, only what can hardly go is imported at the top: a test that cannot be imported
names nothing.
"""

from __future__ import annotations

# ruff: noqa: E402 - skipped before anything heavy
import dataclasses
import inspect
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

import transformers
import vllm

import complete_fn_workers
from complete_fn_workers.engine import vllm_internals
from complete_fn_workers.engine.launch import EngineSpec, engine_environment
from tests.canaries import Need, complaint, find, imports_of, needs_in

pytestmark = [pytest.mark.engine, pytest.mark.canary]

NEEDS = needs_in(vllm_internals.__doc__ or "")
OFFERED = list(imports_of("vllm", Path(complete_fn_workers.__file__ or "").parent))
VERSION = vllm.__version__
ATTENTION = "vllm.v1.attention.backend"


@pytest.mark.parametrize("need", [*NEEDS, *OFFERED], ids=str)
def test_vllm_still_has(need: Need) -> None:
    missing = complaint("vLLM", VERSION, need)
    assert not missing, missing


CONFIG_READER = (
    "swiftkv/serving/config.py",
    "to refuse a configuration that cannot be",
    "transformers documents no hook.",
)


@pytest.mark.parametrize("name", ["__post_init__", "validate_architecture"])
def test_transformers_still_has(name: str) -> None:
    need = Need("transformers:LlamaConfig", name, *CONFIG_READER)
    missing = complaint("transformers", transformers.__version__, need)
    assert not missing, missing
    assert f"no LlamaConfig.{name}," in (complaint("transformers", "99.0", need, type("LlamaConfig", (), {})) or "")


def new_request() -> Any:
    return find("vllm.v1.request:Request")("a", [1, 2, 3], vllm.SamplingParams(max_tokens=4), None)


def test_a_new_request_has_computed_nothing_and_knows_its_prompt() -> None:
    request = new_request()
    assert vllm_internals.computed_tokens(request) == 0
    assert vllm_internals.prompt_tokens(request) == 3
    assert vllm_internals.cached_tokens(vllm_internals.prefill_of(request)) == 0


def test_vllm_gives_away_the_same_prefill_counts_that_the_meter_holds() -> None:
    request = new_request()
    held = vllm_internals.prefill_of(request)
    held.set(num_prompt_tokens=3, num_local_cached_tokens=2, num_external_cached_tokens=0)
    assert request.take_prefill_stats() is held
    assert vllm_internals.cached_tokens(held) == 2


def test_adding_a_request_returns_an_id() -> None:
    """By which the scheduler knows it, and the meter finds it."""
    assert inspect.signature(vllm.LLMEngine.add_request).return_annotation in (str, "str")


def test_a_prompt_of_tokens_carries_its_tenant() -> None:
    from vllm.inputs import tokens_input

    made = tokens_input([1, 2], cache_salt="acme")
    assert (made["type"], made["prompt_token_ids"], made["cache_salt"]) == ("token", [1, 2], "acme")


def test_the_environment_variables_that_are_set_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("VLLM_")]:  # an engine in this process sets some too
        monkeypatch.delenv(name)
    spec = EngineSpec("model", None, None, {"tensor_parallel_size": 2}, None)
    ours = {name for name in engine_environment(spec) if name.startswith("VLLM_")}
    assert len(ours) >= 3
    unknown = ours - set(vllm.envs.environment_variables)
    assert not unknown, f"vLLM {VERSION} does not know {unknown}, which engine/launch.py sets."


def test_the_operator_that_writes_the_cache_is_registered() -> None:
    import vllm.model_executor.layers.attention.attention  # noqa: F401 - registers it

    reader = "swiftkv/serving/model.py"
    why = f"vLLM {VERSION} has no operator unified_kv_cache_update, which {reader} needs to write the cache."
    assert hasattr(torch.ops.vllm, "unified_kv_cache_update"), why


def fields_of(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def undecided(kind: Any) -> set[str]:
    """Fields of a step's description of which we do not say whether they change when tokens are left out."""
    read = {need.name for need in NEEDS if need.owner.endswith(":CommonAttentionMetadata")}
    return fields_of(kind) - read - vllm_internals.UNCHANGED_FIELDS


def test_no_field_of_a_steps_description_is_new() -> None:
    common = find(f"{ATTENTION}:CommonAttentionMetadata")
    new = undecided(common)
    assert not new, f"vLLM {VERSION} has CommonAttentionMetadata.{new}, new to vllm_internals.reduce_queries."
    assert fields_of(common) >= vllm_internals.UNCHANGED_FIELDS


def test_a_new_field_of_a_steps_description_is_seen() -> None:
    newer = dataclasses.make_dataclass("CommonAttentionMetadata", ["seq_lens", "causal", "row_scales"])
    assert undecided(newer) == {"row_scales"}


def description(lengths: list[int], cached: list[int]) -> Any:
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    reached = torch.tensor([new + old for new, old in zip(lengths, cached, strict=True)], dtype=torch.int32)
    return find(f"{ATTENTION}:CommonAttentionMetadata")(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=reached,
        seq_lens_cpu_upper_bound=reached,
        num_reqs=len(lengths),
        num_actual_tokens=sum(lengths),
        max_query_len=max(lengths),
        max_seq_len=int(reached.max()),
        block_table_tensor=torch.arange(2 * len(lengths)).view(-1, 2),
        slot_mapping=torch.arange(sum(lengths)),
    )


def test_a_step_is_described_without_the_tokens_that_are_left_out() -> None:
    whole = description([5, 1, 3], [0, 7, 2])
    queries = vllm_internals.read_queries(whole)
    assert (queries.starts.tolist(), queries.longest, queries.reached.tolist()) == ([0, 5, 6, 9], 5, [5, 8, 5])
    reduced = vllm_internals.reduce_queries(whole, torch.tensor([0, 2]), torch.tensor([1, 1]))
    assert reduced.query_start_loc.tolist() == reduced.query_start_loc_cpu.tolist() == [0, 1, 2]
    assert (reduced.num_reqs, reduced.num_actual_tokens, reduced.max_query_len) == (2, 2, 1)
    assert reduced.seq_lens.tolist() == [5, 5]
    assert reduced.block_table_tensor.tolist() == [[0, 1], [4, 5]]
    assert reduced.slot_mapping is whole.slot_mapping


class Metadata:
    """What a backend notes of a step."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


@cache
def skipping_builder() -> Any:
    """SwiftKV's, over the least that vLLM asks of a backend."""
    from complete_fn_workers.swiftkv.serving.attention import skipping_backend

    base: Any = find(f"{ATTENTION}:AttentionMetadataBuilder")

    class Builder(base):  # type: ignore[misc]
        def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any, **more: Any) -> None:
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)
            self.more = more

        def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Metadata:
            return Metadata(common_prefix_len, common_attn_metadata, fast_build)

    backend = type("Backend", (find(f"{ATTENTION}:AttentionBackend"),), {"get_builder_cls": lambda: Builder})
    return skipping_backend(backend).get_builder_cls()


def test_vllm_may_call_the_builder_by_position_and_by_keyword() -> None:
    """`build_for_cudagraph_capture` names the arguments, a backend may be given a block table's width."""
    model = SimpleNamespace(hf_config=SimpleNamespace(swiftkv_skip_prefill=True))
    config = SimpleNamespace(model_config=model, speculative_config=None)
    builder = skipping_builder()(None, ["layer"], config, torch.device("cpu"), block_table_width=4)
    assert builder.more == {"block_table_width": 4}
    decoding = description([1, 1], [3, 4])
    assert builder.build_for_cudagraph_capture(decoding).arguments == (0, decoding, False)
    assert builder.build(2, decoding, True).arguments == (2, decoding, True)
    prefill = description([5, 1], [0, 4])
    built = builder.build(common_prefix_len=2, common_attn_metadata=prefill)
    assert built.swiftkv_kept.indices.tolist() == [4, 5]
    assert built.arguments[0] == 0
    assert built.arguments[1].num_actual_tokens == 2


def test_graphs_are_captured_for_uniform_batches_at_most() -> None:
    levels = find(f"{ATTENTION}:AttentionCGSupport")
    assert vllm_internals.at_most_uniform(levels.ALWAYS) is levels.UNIFORM_BATCH
    assert vllm_internals.at_most_uniform(levels.NEVER) is levels.NEVER


def renamed(ours: Any, theirs: Any) -> set[str]:
    """Parameters of a method that we override and that vLLM calls by another name."""
    mine, base = (list(inspect.signature(method).parameters) for method in (ours, theirs))
    return {name for name, own in zip(base, mine, strict=False) if own not in (name, "rest", "more")}


def watcher(name: str) -> Any:
    return find(f"complete_fn_workers.swiftkv.serving.limits:{name}")


@pytest.mark.parametrize(
    ("ours", "base"),
    [
        (lambda: watcher("PromptWatcher"), "vllm.v1.sample.logits_processor:LogitsProcessor"),
        (lambda: watcher("V2PromptWatcher"), "vllm.v1.worker.gpu.sample.logits_processor:LogitsProcessor"),
        (skipping_builder, f"{ATTENTION}:AttentionMetadataBuilder"),
    ],
    ids=["first runner", "second runner", "attention"],
)
def test_methods_that_we_override_have_vllms_parameters(ours: Callable[[], Any], base: str) -> None:
    kind, theirs = ours(), find(base)
    overridden = [name for name in vars(kind) if name in vars(theirs) and inspect.isroutine(getattr(kind, name))]
    assert len(overridden) > 1
    for name in overridden:
        assert not renamed(getattr(kind, name), getattr(theirs, name)), f"vLLM {VERSION}: {base}.{name}"


def test_a_renamed_parameter_is_seen() -> None:
    def ours(self: Any, common_prefix_len: int, common: Any, fast_build: bool = False) -> None: ...

    assert renamed(ours, find(f"{ATTENTION}:AttentionMetadataBuilder").build) == {"common_attn_metadata"}
