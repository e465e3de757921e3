"""Planning: order, duplicates, parts, and answers back in the caller's order."""

from __future__ import annotations

import itertools

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from complete_fn.planning import BatchPlan, make_plan
from complete_fn.planning.parts import cut_parts
from complete_fn.prompts.templates import escape

# What reaches the planner is escaped: a leading NUL is the mark of packed messages and fields.
prompt_lists = st.lists(st.none() | st.text(max_size=12).map(escape), max_size=40)


def texts(plan: BatchPlan) -> list[str]:
    return [t for _, batch in plan.texts() for t in batch]


@given(prompt_lists)
def test_scatter_of_the_planned_prompts_gives_the_prompts_back(prompts: list[str | None]) -> None:
    plan = make_plan(pa.array(prompts, pa.string()))
    assert plan.scatter(pa.array(texts(plan), pa.large_string())).to_pylist() == prompts


@given(prompt_lists)
def test_distinct_prompts_are_each_once_and_in_byte_order(prompts: list[str | None]) -> None:
    plan = make_plan(pa.array(prompts, pa.string()))
    assert texts(plan) == sorted({p for p in prompts if p is not None}, key=lambda p: p.encode())


@given(prompt_lists)
def test_copies_count_the_rows_that_ask(prompts: list[str | None]) -> None:
    plan = make_plan(pa.array(prompts, pa.string()))
    for text, copies in zip(texts(plan), plan.copies().tolist(), strict=True):
        assert prompts.count(text) == copies


@given(prompt_lists)
def test_what_may_not_be_merged_is_asked_for_every_row(prompts: list[str | None]) -> None:
    plan = make_plan(pa.array(prompts, pa.string()), mergeable=False)
    assert sorted(texts(plan)) == sorted(p for p in prompts if p is not None)
    numbered = pa.array(range(len(plan.first)))
    assert sorted(x for x in plan.scatter(numbered).to_pylist() if x is not None) == list(range(len(plan.first)))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_any_string_type_and_any_chunks_plan_alike(kind: pa.DataType) -> None:
    chunks = pa.chunked_array([pa.array(["b", None], kind), pa.array([], kind), pa.array(["a", "b"], kind)])
    plan = make_plan(chunks)
    assert texts(plan) == ["a", "b"]
    assert plan.scatter(pa.array(["A", "B"])).to_pylist() == ["B", None, "A", "B"]


def test_duplicates_are_found_across_the_comparison_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    import complete_fn.planning.duplicates as duplicates

    monkeypatch.setattr(duplicates, "WINDOW", 3)
    plan = make_plan(pa.array([str(n // 4) for n in range(40)]))
    assert sorted(texts(plan)) == sorted({str(n // 4) for n in range(40)})


@given(st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=60), st.integers(1, 50))
def test_parts_cover_the_work_and_keep_their_bound(prompts: list[str], bound: int) -> None:
    from complete_fn.planning.parts import estimated_tokens

    plan = cut_parts(make_plan(pa.array(prompts)), part_tokens=bound)
    parts, tokens = plan.parts.tolist(), estimated_tokens(plan)
    assert parts[0] == 0
    assert parts[-1] == len(plan.first)
    assert parts == sorted(set(parts))
    for low, high in itertools.pairwise(parts):
        assert high - low == 1 or tokens[low:high].sum() <= bound + tokens[low:high].max()


def test_an_empty_column_is_a_plan_without_work() -> None:
    for column in (pa.array([], pa.string()), pa.array([None, None], pa.string())):
        plan = make_plan(column)
        assert texts(plan) == []
        assert plan.scatter(pa.array([], pa.string())).to_pylist() == [None] * len(column)
