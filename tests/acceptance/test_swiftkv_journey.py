"""The README's way from a Llama folder and a file of prompts to a served, evaluated SwiftKV model, in its own verbs."""

from __future__ import annotations

# ruff: noqa: E402 - skipped before anything heavy
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from complete_fn_workers.demo_model.tokenizer import save_tokenizer, train_tokenizer
from tests.random_checkpoints import TINY, random_model, write_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.long, pytest.mark.timeout(900)]

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "boil")


def verb(folder: Path, *argv: str) -> str:
    """Run `complete-fn` in `folder`, with state of its own; returns its standard output."""
    environment = os.environ | {"XDG_DATA_HOME": str(folder / "state"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(Path(sys.executable).with_name("complete-fn")), *argv],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{argv}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


def test_convert_distill_with_the_teachers_answers_evaluate_and_serve(tmp_path: Path) -> None:
    parent = write_checkpoint(random_model(TINY, None), tmp_path / "tiny", dtype=torch.bfloat16)
    save_tokenizer(train_tokenizer([" ".join(WORDS)] * 4, TINY.vocab_size), parent, TINY.max_position_embeddings)
    choose = random.Random(2)
    prompts = [" ".join(choose.choices(WORDS, k=choose.randrange(3, 30))) for _ in range(60)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"text": p}) + "\n" for p in prompts))
    table = ("--prompts", "prompts.jsonl", "--prompt", "{text}")

    verb(tmp_path, "swiftkv", "convert", "tiny", "converted")
    answers = ("--answers-by", "./tiny", "--max-answer-tokens", "12")
    training = ("--epochs", "8", "--lr", "1e-3", "--batch-tokens", "1024", "--held-out", "10")
    printed = verb(tmp_path, "swiftkv", "distill", "converted", "student", *table, *answers, *training)
    report = json.loads(printed)
    assert report["held_out_after"]["kl"] < report["held_out_before"]["kl"]
    assert (tmp_path / "student" / "loss.png").is_file()

    made = [json.loads(line) for line in (tmp_path / "student.run" / "answers.jsonl").read_text().splitlines()]
    assert {note["prompt"] for note in made} == set(prompts)
    (tmp_path / "answered.jsonl").write_text("".join(json.dumps(note) + "\n" for note in made))
    scores = ("--prompts", "answered.jsonl", "--max-tokens", "12", "--json", "scores.json")
    verb(tmp_path, "swiftkv", "eval", "student", "--teacher", "tiny", *scores)
    found = json.loads((tmp_path / "scores.json").read_text())
    # The truth of this table is the teacher's own greedy answer, which the engine gives again (bfloat16: nearly).
    assert found["answers"]["teacher"]["exact_match"] > 0.9
    assert 0 < found["answers"]["student"]["rouge_l"] <= 1
    assert found["forced"]["agreement"] > 0.2

    run = ("run", "--model", "./student", "--prompt", "{text}", "prompts.jsonl", "-o", "out.jsonl", "--limit", "5")
    verb(tmp_path, *run, "--max-tokens", "12")  # random weights may never end an answer
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 5
