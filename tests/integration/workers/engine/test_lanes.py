"""The embedded engine for people who wait: text as it is made, rows that overtake bulk, rows that are left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from complete_fn.types import INTERACTIVE, Completion, CompletionRequest, SamplingParams, Usage

pytestmark = pytest.mark.engine


def told(prompt: str, pieces: list[str], **sampling: Any) -> CompletionRequest:
    return told_to(lambda piece, _: pieces.append(piece), prompt, **sampling)


def told_to(tell: Callable[[str, Usage], None], prompt: str, **sampling: Any) -> CompletionRequest:
    return CompletionRequest("tiny", prompt, SamplingParams(**sampling), None, INTERACTIVE, tell)


def test_the_pieces_are_the_text(engine: Any) -> None:
    pieces: list[str] = []
    ((_, answer),) = engine.stream([told("Name the section", pieces, max_tokens=40)], "me")
    ((_, untold),) = engine.stream([CompletionRequest("tiny", "Name the section", SamplingParams(max_tokens=40))], "me")
    assert len(pieces) > 5
    assert answer.text is not None
    assert answer.text.startswith("".join(pieces))
    assert (answer.text, answer.usage.completion_tokens) == (untold.text, untold.usage.completion_tokens)


def test_each_piece_comes_with_the_tokens_up_to_it(engine: Any) -> None:
    usages: list[Usage] = []
    ((_, answer),) = engine.stream(
        [told_to(lambda _, usage: usages.append(usage), "Name the section", max_tokens=40)], "me"
    )
    taken = [usage.completion_tokens for usage in usages]
    assert taken == sorted(set(taken))
    assert 1 <= taken[0] < taken[-1] <= answer.usage.completion_tokens
    assert {usage.prompt_tokens for usage in usages} == {answer.usage.prompt_tokens}


def test_a_stop_text_is_never_told(engine: Any) -> None:
    ((_, whole),) = engine.stream([told("The quick brown fox", [], max_tokens=60)], "me")
    stop = whole.text[len(whole.text) // 2 :][:4]
    pieces: list[str] = []
    ((_, answer),) = engine.stream([told("The quick brown fox", pieces, max_tokens=60, stop=(stop,))], "me")
    assert stop not in answer.text
    assert answer.text.startswith("".join(pieces))


def test_somebody_who_waits_overtakes_bulk_rows(engine: Any) -> None:
    rows, done, begun = 64, [0], threading.Event()  # 16 run at once
    requests = [CompletionRequest("tiny", f"package {n}", SamplingParams(max_tokens=32)) for n in range(rows)]

    def bulk() -> None:
        for _ in engine.stream(requests, "me"):
            done[0] += 1
            begun.set()

    thread = threading.Thread(target=bulk)
    thread.start()
    assert begun.wait(200)
    ((_, answer),) = engine.stream([told("Name the section", [], max_tokens=1)], "me")
    before = done[0]
    thread.join()
    assert answer.error is None
    assert before < 32  # first come, first served: the rows that run, and those that waited before it
    assert done[0] == rows


def test_a_row_that_is_left_behind_is_aborted(engine: Any) -> None:
    class Left:
        abandoned = False

        def __iter__(self) -> Iterator[CompletionRequest]:
            yield CompletionRequest("tiny", "Name it", SamplingParams(max_tokens=600), None, INTERACTIVE, self.tell)

        def tell(self, piece: str, usage: Usage) -> None:
            self.abandoned = True

    found: list[tuple[int, Completion]] = list(engine.stream(Left(), "me"))
    assert found == []
    ((_, answer),) = engine.stream([told("Name the section", [], max_tokens=2)], "me")
    assert answer.usage.completion_tokens == 2
