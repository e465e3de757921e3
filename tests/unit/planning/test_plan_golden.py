"""The plan of a small table as text, kept in tests/golden: execution order, fields, copies, parts.."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from complete_fn.planning import BatchPlan, TokenSizes, make_plan
from complete_fn.planning.field_order import rendered
from complete_fn.planning.parts import cut_parts
from complete_fn.planning.prefix_tree import common_tokens
from complete_fn.prompts.templates import render_column

GOLDEN = Path(__file__).parents[2] / "golden"
TEAM = "Debian Perl Group, who maintain several thousand packages of modules together"
ABOUT = "a library for the small and the large, the old and the new, with its documentation"
ROWS = [
    ("libone-perl", TEAM, f"One, {ABOUT}"),
    ("two", "Ada", f"Two, {ABOUT}"),
    ("two-doc", "Ada", f"Two, {ABOUT}"),
    ("libthree-perl", TEAM, f"Three, {ABOUT}"),
    ("two", "Ada", f"Two, {ABOUT}"),
    ("four", "Bob", None),
    ("libfive-perl", TEAM, f"Two, {ABOUT}"),
]
SIZES = TokenSizes(lambda texts: [len(t.split()) for t in texts], block=4)


def shown(plan: BatchPlan) -> str:
    """A line for each distinct prompt: its part, rows, words shared with the one before, and text."""
    copies, starts = plan.copies().tolist(), set(plan.parts.tolist())
    lines, before, part = [f"{len(plan.prompts)} rows, {plan.prompts.null_count} NULL"], "", -1
    for number, (_, (text,)) in enumerate(plan.texts(step=1)):
        said = rendered(plan, number, text) if plan.field_order is not None else text
        part += number in starts
        shared = common_tokens([hash(w) for w in before.split()], [hash(w) for w in said.split()])
        lines.append(f"part {part}, {copies[number]} x, shares {shared:2}: {said!r}")
        before = said
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("reorder", [False, True])
def test_a_plan_is_what_it_was(reorder: bool) -> None:
    names = ("package", "maintainer", "description")
    columns = {n: pa.array([r[f] for r in ROWS], pa.string()) for f, n in enumerate(names)}
    template = "Name the section.\n{package}\n{maintainer}\n{description}"
    prompts = render_column(template, columns, len(ROWS), reorder_fields=reorder)
    plan = cut_parts(make_plan(prompts, sizes=SIZES), part_tokens=180)
    assert shown(plan) == (GOLDEN / f"plan_{'reordered' if reorder else 'plain'}.txt").read_text()
