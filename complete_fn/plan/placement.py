"""Which worker gets which part: a subtree of the prefix tree stays with the worker that is warm for it, until the
difference of loads costs more than to compute its prefix again. Pure; the store asks it when a worker claims a part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Waiting:
    """A part that waits: parts of one job with `subtree` next to each other are neighbours in its prefix tree.

    `shared` are the tokens that its first prompt has in common with the part before it.
    """

    id: int
    job: str
    number: int
    tokens: int
    shared: int


@dataclass
class Loads:
    """Tokens that each worker has in hand, counted up when a part is given and down when it is done or taken away."""

    tokens: dict[str, int] = field(default_factory=dict)
    warm: dict[str, tuple[str, int]] = field(default_factory=dict)  # worker -> (job, number) of its last part
    recomputed: int = 0  # tokens computed again because a part went to a worker that was not warm for it

    def join(self, worker: str) -> None:
        self.tokens.setdefault(worker, 0)

    def leave(self, worker: str) -> None:
        self.tokens.pop(worker, None)
        self.warm.pop(worker, None)

    def give(self, worker: str, part: Waiting) -> None:
        if self.warm.get(worker) != (part.job, part.number - 1):
            self.recomputed += part.shared
        self.tokens[worker] = self.tokens.get(worker, 0) + part.tokens
        self.warm[worker] = (part.job, part.number)

    def done(self, worker: str, part: Waiting) -> None:
        if worker in self.tokens:
            self.tokens[worker] = max(0, self.tokens[worker] - part.tokens)


def place(part: Waiting, loads: Loads) -> str | None:
    """The worker to give a part to: the warm one, unless another's load is less by more than what is shared; None
    without workers."""
    if not loads.tokens:
        return None
    least = min(sorted(loads.tokens), key=lambda w: loads.tokens[w])
    for worker, last in loads.warm.items():
        if last == (part.job, part.number - 1) and loads.tokens[worker] - loads.tokens[least] <= part.shared:
            return worker
    return least


def choose(waiting: Sequence[Waiting], worker: str, warm: Mapping[str, tuple[str, int]]) -> Waiting | None:
    """The part that an idle worker should claim: the next of its own subtree; else one that no other worker is warm
    for; else the one whose prefix costs least to compute again. Among equals the earliest.

    Args:
        warm: the last part (job, number) of each living worker.
    """
    mine = warm.get(worker)
    theirs = {last for other, last in warm.items() if other != worker}

    def cost(part: Waiting) -> tuple[int, int, int]:
        before = (part.job, part.number - 1)
        kind = 0 if before == mine else 2 if before in theirs else 1
        return kind, part.shared if kind else 0, part.id

    return min(waiting, key=cost, default=None)
