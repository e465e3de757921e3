"""Classification in as few tokens as possible: labels form a tree of tokens, and a search finds the likeliest label.

A *place* is a node of the tree at which labels diverge. A label's probability is the product, over its places, of its
token's probability among the tokens that continue a label there; constrained decoding draws from these probabilities.
One step of the engine scores all tokens of one place, so labels that differ in their first token take one step. If
several labels share the likeliest continuation, the search asks the place where they diverge next. No label behind
another place can win, because none is likelier than the path to its place. So the result is the exact argmax.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from complete_fn_workers.engine.wire import RowRefused


@dataclass(frozen=True, slots=True)
class LabelPlace:
    """A place where labels diverge: their numbers, the tokens they share, and the place behind each next token.

    A place with one label has no next tokens.
    """

    labels: tuple[int, ...]
    path: tuple[int, ...] = ()
    ways: Mapping[int, LabelPlace] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        """Tokens before the deepest place where labels diverge."""
        return max([len(self.path), *(way.depth for way in self.ways.values() if way.ways)])


def grow_tree(labels: Mapping[int, Sequence[int]], depth: int = 0) -> LabelPlace:
    """The place where labels diverge that share `depth` tokens. No label's tokens may begin another label's."""
    numbers = tuple(labels)
    if len(labels) == 1:
        return LabelPlace(numbers)
    first, *others = labels.values()
    while all(tokens[depth] == first[depth] for tokens in others):
        depth += 1
    ways: dict[int, dict[int, Sequence[int]]] = {}
    for number, tokens in labels.items():
        ways.setdefault(tokens[depth], {})[number] = tokens
    return LabelPlace(numbers, tuple(first[:depth]), {token: grow_tree(way, depth + 1) for token, way in ways.items()})


def label_tree(tokens: Sequence[Sequence[int]], names: Sequence[str], end: int | None) -> LabelPlace:
    """The tree of labels given as tokens. `end`, the token that ends an answer, tells a label from a longer one.

    Raises:
        RowRefused: Two labels have the same tokens, a label contains the end token, or a label begins another one and
            the model has no end token.
    """
    seen: dict[tuple[int, ...], str] = {}
    for ids, name in zip(map(tuple, tokens), names, strict=True):
        if ids in seen:
            why = f"The labels {seen[ids]!r} and {name!r} are the same to the model's tokenizer. Rename one."
            raise RowRefused("invalid_request", why)
        if end in ids:
            why = f"The label {name!r} has the model's token that ends an answer in it. Rename it."
            raise RowRefused("invalid_request", why)
        seen[ids] = name
    if end is None:
        for ids, name in seen.items():
            if longer := next((n for other, n in seen.items() if other[: len(ids)] == ids and n != name), None):
                why = f"The label {name!r} begins {longer!r}, and the model has no token that ends an answer."
                raise RowRefused("invalid_request", f"{why} Rename one.")
    return grow_tree({n: (*ids, *([] if end is None else [end])) for n, ids in enumerate(seen)})


class LabelSearch:
    """The search for one row's label. `tell` it the log-probabilities of `place.ways` until it has the answer."""

    def __init__(self, tree: LabelPlace) -> None:
        self.scores: list[float | None] = [None] * len(tree.labels)
        self.steps = 0
        self.open: list[tuple[float, tuple[int, ...], LabelPlace]] = [(0.0, tree.labels, tree)]

    @property
    def place(self) -> LabelPlace:
        """The likeliest place so far: the next place to ask, or the answer's."""
        return self.open[0][2]

    @property
    def answer(self) -> int | None:
        return None if self.place.ways else self.place.labels[0]

    def tell(self, logprobs: Mapping[int, float]) -> None:
        """`logprobs` by token, for every token of `place.ways`."""
        surprise, _, place = heapq.heappop(self.open)
        self.steps += 1
        top = max(logprobs[token] for token in place.ways)
        weights = {t: math.exp(logprobs[t] - top) if top > -math.inf else 1.0 for t in place.ways}
        total = sum(weights.values())
        for token, way in place.ways.items():
            share = weights[token] / total
            behind = surprise - math.log(share) if share else math.inf
            heapq.heappush(self.open, (behind, way.labels, way))
            if not way.ways:
                self.scores[way.labels[0]] = math.exp(-behind)
