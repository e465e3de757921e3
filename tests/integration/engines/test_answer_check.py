"""Answers are checked in a process that a time limit ends, where a check may take long."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator

import pytest

from complete_fn.engines import answer_check
from complete_fn.engines.answer_check import PATIENCE, AnswerChecker, is_quick, mismatch, mismatch_here
from complete_fn.engines.structured_output import checked
from complete_fn.prompts.schema_rules import SchemaSteps, steps_of
from complete_fn.types import Completion, CompletionRequest

TREE = json.dumps({"type": "object", "properties": {"l": {"$ref": "#"}, "n": {"type": "integer"}}})
# Each level of the answer is checked twice as often as the one above it.
DOUBLING = json.dumps({"allOf": [{"items": {"$ref": "#"}}, {"items": {"$ref": "#"}}]})
DEEP = "[" * 60 + "]" * 60


@pytest.fixture
def checker() -> Iterator[AnswerChecker]:
    found = AnswerChecker(seconds=0.5)
    yield found
    found.close()


@pytest.fixture
def hurried(checker: AnswerChecker, monkeypatch: pytest.MonkeyPatch) -> AnswerChecker:
    monkeypatch.setattr(answer_check, "CHECKER", checker)
    return checker


def test_the_child_says_what_a_check_here_would_say(checker: AnswerChecker) -> None:
    for text in ("{", "{}", '{"l": {"l": {"n": "x"}}}', '{"n": 3}', "[]", "[" * 100_000):
        assert checker.mismatch(text, TREE) == mismatch_here(text, TREE)


def test_a_check_that_takes_too_long_ends_and_the_next_one_is_right(checker: AnswerChecker) -> None:
    assert "took longer than 0.5 s" in str(checker.mismatch(DEEP, DOUBLING))
    assert checker.mismatch('{"n": 3}', TREE) is None
    assert "breaks the response_format at n" in str(checker.mismatch('{"n": "x"}', TREE))


def test_a_schema_is_given_up_after_some_answers(checker: AnswerChecker) -> None:
    for _ in range(PATIENCE):
        checker.mismatch(DEEP, DOUBLING)
    children = checker.child
    assert "took longer" in str(checker.mismatch("[]", DOUBLING))
    assert checker.child is children


def test_a_row_of_such_a_schema_is_a_schema_mismatch(hurried: AnswerChecker) -> None:
    request = CompletionRequest("m", "p", response_format=DOUBLING)
    row = checked(Completion(DEEP, finish_reason="stop"), request)
    assert row.error is not None
    assert row.error.code == "schema_mismatch"
    assert hurried.child is None


def test_a_pattern_that_never_ends_is_ended_too(hurried: AnswerChecker) -> None:
    found = mismatch(json.dumps("a" * 40 + "b"), json.dumps({"pattern": "^(a+)+$"}))
    assert "took longer" in str(found)


def test_one_slow_check_holds_the_others_no_longer_than_its_limit(hurried: AnswerChecker) -> None:
    slow = threading.Thread(target=mismatch, args=(DEEP, DOUBLING))
    slow.start()
    assert mismatch('{"n": 3}', TREE) is None
    slow.join(20)
    assert not slow.is_alive()


@pytest.mark.parametrize(
    ("schema", "text", "is_here"),
    [
        ({"type": "object"}, "{}", True),
        ({"type": "object"}, "x" * 10_000, True),
        ({"uniqueItems": True}, "[1, 2, 3]", True),
        ({"uniqueItems": True}, "[{}, " * 10_000, False),
        ({"properties": {f"f{n}": {"type": "string"} for n in range(400)}}, "x" * 10_000, False),
        ({"pattern": "a"}, "{}", False),
    ],
)
def test_what_ends_soon_is_checked_in_this_process(schema: dict[str, object], text: str, is_here: bool) -> None:
    assert is_quick(text, SchemaSteps(schema)) is is_here


def test_a_recursive_schema_is_checked_in_the_child() -> None:
    assert not is_quick("{}", steps_of(TREE))


def test_the_child_of_a_parent_that_is_gone_ends(checker: AnswerChecker) -> None:
    checker.mismatch("{}", TREE)
    child = checker.child
    assert child is not None
    assert child.stdin is not None
    child.stdin.close()
    assert child.wait(20) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_checks_by_a_child_of_its_own(checker: AnswerChecker) -> None:
    checker.mismatch("{}", TREE)
    with checker.lock:  # as a thread of the parent may hold it
        pid = os.fork()
        if not pid:
            found = checker.mismatch('{"n": "x"}', TREE)
            checker.close()
            os._exit(0 if found == mismatch_here('{"n": "x"}', TREE) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert checker.mismatch('{"n": 3}', TREE) is None
