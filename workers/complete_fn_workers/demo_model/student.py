"""`demo-llama` is distilled into demo-llama-swiftkv, on its own training packages, and both are scored."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from complete_fn_workers.demo_model.corpus import AS_JSON, SECTION, SYNOPSIS, Package, split_of
from complete_fn_workers.demo_model.evaluate import evaluate
from complete_fn_workers.swiftkv.cli import main as swiftkv

CARD = Path(__file__).with_name("student.md")
PACKAGES, PROMPTS = 44_000, 33_000
RECIPE = [
    *("--lr", "5e-3", "--batch-tokens", "16384", "--epochs", "99", "--held-out", "600", "--limit", str(PROMPTS)),
    *("--start", "fitted", "--memory-gib", "4", "--max-answer-tokens", "128"),
]  # the best of several recipes, see benchmarks/figures.md


def write_prompts(packages: Sequence[Package], path: Path) -> None:
    """Write shuffled prompts about training packages, without answers: the teacher writes the answers.

    The prompts ask for a synopsis of each package, a JSON object of every second and the section of every fourth. A
    longer answer teaches more, and sections are learnt soonest.
    """
    chosen = [p for p in packages if split_of(p.source) == "train"]
    random.Random(1).shuffle(chosen)
    prompts: list[str] = []
    for number, package in enumerate(chosen[:PACKAGES]):
        kinds = [SYNOPSIS, *([AS_JSON] if number % 2 == 0 else []), *([SECTION] if number % 4 == 1 else [])]
        prompts += [kind + package.description for kind in kinds]
    random.Random(2).shuffle(prompts)
    pq.write_table(pa.table({"prompt": prompts}), path)


def make_student(packages: Sequence[Package], parent: Path, out: Path, minutes: float, options: Sequence[str]) -> None:
    """Distil `parent` into the new folder `out`, on answers that `parent` writes.

    Args:
        options: further options of `complete-fn swiftkv distill`.
    """
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.parquet"
        write_prompts(packages, prompts)
        given = ["--prompts", str(prompts), "--minutes", str(minutes), "--answers-by", str(parent), *RECIPE, *options]
        swiftkv(["distill", str(parent), str(out), *given])


def score_student(packages: Sequence[Package], parent_scores: Mapping[str, float], out: Path) -> None:
    """Write the student's scores.json and its card."""
    test = [p for p in packages if split_of(p.source) == "test"]
    with tempfile.TemporaryDirectory() as home:
        found = asdict(evaluate(str(out), test, Path(home)))
    made = json.loads((out / "distill.json").read_text())
    layers = json.loads((out / "config.json").read_text())
    text = CARD.read_text().format(
        kept=layers["num_key_value_layers"],
        layers=layers["num_hidden_layers"],
        trained_parameters=made["trained_parameters"],
        minutes=made["minutes"],
        tokens=made["tokens"] / 1e6,
        **{name: made["recipe"][name] for name in ("lr", "batch_tokens")},
        **found,
        **{f"parent_{name}": value for name, value in parent_scores.items()},
    )
    (out / "PARENT_README.md").unlink(missing_ok=True)  # the parent's folder, with its card, ships beside this one
    (out / "README.md").write_text(text)
    (out / "scores.json").write_text(json.dumps(found, indent=2) + "\n")
