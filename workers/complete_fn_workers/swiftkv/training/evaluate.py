"""`compare_answers` scores a student's answers beside its teacher's, through the engine that will serve them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from complete_fn.engines.base import Engine
from complete_fn.types import Completion, CompletionRequest, SamplingParams
from complete_fn_workers.quality_scores import exact_match, is_json_object, mean, rouge_l
from complete_fn_workers.swiftkv.training.examples import TableRow

LABELS = {
    "exact_match": "answers equal to the truth",
    "rouge_l": "ROUGE-L against the truth",
    "json_valid": "valid JSON where the truth is JSON",
    "ended": "answers that ended by themselves",
    "same_as_teacher": "answers equal to the teacher's",
}


def answers_of(model: str, engine: Engine, rows: list[TableRow], max_tokens: int | None) -> list[Completion]:
    """Greedy completions in the rows' order."""
    requests = (CompletionRequest(model, row.prompt, SamplingParams(max_tokens=max_tokens)) for row in rows)
    done = dict(engine.stream(requests, tenant="evaluation"))
    return [done[position] for position in range(len(rows))]


def compare_answers(
    models: Mapping[str, str], open_engine: Callable[[str], Engine], rows: list[TableRow], max_tokens: int | None
) -> dict[str, dict[str, float]]:
    """The scores of `LABELS` for each role (`teacher`, `student`).

    Scores that need the true answer are over the rows that have one. One engine is open at a time. A row that the
    engine failed counts as an empty answer.
    """
    completions: dict[str, list[Completion]] = {}
    for role, model in models.items():
        engine = open_engine(model)
        completions[role] = answers_of(model, engine, rows, max_tokens)
        engine.close()
    texts = {role: [c.text or "" for c in found] for role, found in completions.items()}
    known = [i for i, row in enumerate(rows) if row.answer is not None]
    truth = [rows[i].answer or "" for i in known]
    as_json = [i for i in known if is_json_object(rows[i].answer or "")]
    scores: dict[str, dict[str, float]] = {}
    for role, answers in texts.items():
        judged = [answers[i] for i in known]
        scores[role] = {
            "exact_match": exact_match(judged, truth) if known else float("nan"),
            "rouge_l": mean(rouge_l(a, t) for a, t in zip(judged, truth, strict=True)),
            "json_valid": mean(is_json_object(answers[i]) for i in as_json),
            "ended": mean(c.finish_reason == "stop" for c in completions[role]),
            "same_as_teacher": exact_match(answers, texts["teacher"]),
        }
    return scores


def format_scores(found: Mapping[str, Any]) -> str:
    """The scores as aligned lines."""
    lines = [f"{found['rows']} rows"]
    if forced := found.get("forced"):
        lines += [
            f"token by token, given the truth ({forced['tokens']:,} answer tokens of {forced['rows']} rows):",
            f"  same first choice as the teacher   {forced['agreement']:.4f}",
            f"  KL(teacher || student), nats       {forced['kl']:.4f}",
            f"  whole answer right                 {forced['teacher_right']:.4f} teacher  "
            f"{forced['student_right']:.4f} student",
        ]
    if answers := found.get("answers"):
        lines.append(f"{'generated:':<37}{'teacher':>8} {'student':>8}")
        lines += [
            f"  {label:<35}{answers['teacher'][key]:8.4f} {answers['student'][key]:8.4f}"
            for key, label in LABELS.items()
            if answers["student"][key] == answers["student"][key]
        ]
    return "\n".join(lines)
