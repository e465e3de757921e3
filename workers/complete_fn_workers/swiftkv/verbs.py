"""The verbs of `complete-fn swiftkv` parse options, do the work and print a few lines."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from complete_fn.engines.base import Engine
from complete_fn.engines.call import Call
from complete_fn.engines.catalogue import Model, find_model
from complete_fn.errors import InputError, InvalidOptionError
from complete_fn.types import SamplingParams
from complete_fn_workers.swiftkv.checkpoint import load_pair, read_config, refuse_as_teacher, swiftkv_of
from complete_fn_workers.swiftkv.reference import SwiftKV
from complete_fn_workers.swiftkv.training.activations import fit_start
from complete_fn_workers.swiftkv.training.convert import convert, licence_of, refuse_layers, refuse_name, write_student
from complete_fn_workers.swiftkv.training.distill import DistillState, Recipe, freeze_teacher, train
from complete_fn_workers.swiftkv.training.evaluate import compare_answers, format_scores
from complete_fn_workers.swiftkv.training.examples import Encoder, Example, TableRow, epoch, read_rows, teacher_answers
from complete_fn_workers.swiftkv.training.forced_scores import score_forced


def add_layers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-key-value-layers", type=int, help="K: layers that prompt tokens run through (default: half)"
    )
    parser.add_argument(
        "--key-value-group-size", type=int, default=1, help="G: later layers sharing a cache (AcrossKV)"
    )
    parser.add_argument("--lossless", action="store_true", help="K = layers - 1, which changes no answer")


def layers_of(a: argparse.Namespace, parent: Path) -> SwiftKV:
    """K and G from the options, or from a SwiftKV folder's config."""
    config = read_config(parent)
    layers, stored = config["num_hidden_layers"], swiftkv_of(config)
    if stored is not None:
        if a.num_key_value_layers or a.lossless or a.key_value_group_size != 1:
            raise InvalidOptionError(f"'{parent}' is in SwiftKV form: its K and G are settled.")
        return stored
    kept = layers - 1 if a.lossless else a.num_key_value_layers or layers // 2
    chosen = SwiftKV(kept, a.key_value_group_size)
    refuse_layers(chosen, layers)
    return chosen


def convert_verb(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    parser.add_argument("parent", type=Path, help="folder of a Llama checkpoint")
    parser.add_argument("out", type=Path, help="new folder")
    add_layers(parser)
    parser.add_argument("--drop-teacher", action="store_true", help="leave out what only distilling needs")
    a = parser.parse_args(argv)
    chosen = layers_of(a, a.parent)
    convert(a.parent, a.out, chosen, keep_teacher=not (a.drop_teacher or a.lossless))
    print(f"{a.out}: K = {chosen.num_key_value_layers}, G = {chosen.key_value_group_size}")
    return 0


def add_table(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=Path, required=True, help="Parquet or JSONL file")
    parser.add_argument("--prompt", default="{prompt}", help="template over the file's columns (default: %(default)s)")
    parser.add_argument("--answer-column", help="default: 'answer' if there is one")
    parser.add_argument("--limit", type=int, help="take only so many rows, from the front")


def table_rows(a: argparse.Namespace) -> list[TableRow]:
    """The table's rows. Without `--answer-column`, a column 'answer' has the answers if there is one."""
    if a.answer_column:
        return read_rows(a.prompts, a.prompt, a.answer_column)[: a.limit]
    try:
        return read_rows(a.prompts, a.prompt, "answer")[: a.limit]
    except InputError as error:
        if "has no column 'answer'" not in str(error):
            raise
    return read_rows(a.prompts, a.prompt, None)[: a.limit]


def add_recipe(parser: argparse.ArgumentParser) -> None:
    usual = Recipe()
    parser.add_argument("--minutes", type=float, default=math.inf, help="train at most so long")
    parser.add_argument("--tokens", type=float, default=math.inf, help="train on at most so many padded tokens")
    parser.add_argument("--epochs", type=float, default=usual.epochs)
    parser.add_argument("--lr", type=float, default=usual.lr)
    parser.add_argument("--batch-tokens", type=int, default=usual.batch_tokens)
    parser.add_argument("--temperature", type=float, default=usual.temperature)
    parser.add_argument("--hidden-loss-mult", type=float, default=usual.hidden_loss_mult)
    parser.add_argument("--kl-over", choices=["answers", "all"], default=usual.kl_over)
    parser.add_argument("--prompt-share", type=float, default=usual.prompt_share)
    parser.add_argument(
        "--start",
        choices=["published", "fitted"],
        default=usual.start,
        help="of keys and values; fitted: least squares",
    )
    parser.add_argument(
        "--memory-gib",
        type=float,
        default=usual.memory_gib,
        help="train on answer tokens alone and keep the teacher's states for later epochs in so much memory",
    )
    parser.add_argument("--seed", type=int, default=usual.seed)


def recipe_of(a: argparse.Namespace) -> Recipe:
    chosen = {f.name: getattr(a, f.name) for f in fields(Recipe) if hasattr(a, f.name)}
    if a.memory_gib and (a.prompt_share or a.kl_over == "all"):
        raise InvalidOptionError("--memory-gib trains on answers alone; leave out --prompt-share and --kl-over all.")
    return Recipe(**chosen, max_tokens=a.tokens, max_minutes=a.minutes)


def distill_verb(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    parser.add_argument("parent", type=Path, help="a Llama checkpoint, or one converted with its teacher kept")
    parser.add_argument("out", type=Path, help="new folder; the run's state is kept in OUT.run until it is removed")
    add_layers(parser)
    add_table(parser)
    add_recipe(parser)
    parser.add_argument("--answers-by", metavar="MODEL", help="let this model (name or folder) write missing answers")
    parser.add_argument("--max-answer-tokens", type=int, help="of those answers")
    parser.add_argument("--held-out", type=int, default=200, help="rows kept apart for the evaluation at the end")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile: some minutes first, then faster")
    parser.add_argument("--keep-teacher", action="store_true", help="keep what only further distilling needs")
    parser.add_argument("--restart", action="store_true", help="forget a run that was left")
    a = parser.parse_args(argv)
    if a.out.exists() and any(a.out.iterdir()):
        raise InputError(f"'{a.out}' is not empty. Name a new folder, or remove it first.")
    refuse_name(a.out.name, licence_of(a.parent))
    run = a.out.with_name(a.out.name + ".run")
    if a.restart:
        for left in ("state.pt", "answers.jsonl"):
            (run / left).unlink(missing_ok=True)
    training, held_out = examples_of(a, run)
    report = distil(a, run, training, held_out)
    print(json.dumps(report, indent=2))
    return 0


def examples_of(a: argparse.Namespace, run: Path) -> tuple[list[Example], list[Example]]:
    """(training examples, held-out examples). Every n-th row is held out, so that both have the table's mix."""
    rows = table_rows(a)
    if any(row.answer is None for row in rows) and a.answers_by:
        call = Call(teacher_of(a.answers_by), SamplingParams(max_tokens=a.max_answer_tokens))
        rows = teacher_answers(rows, lambda: engine_of(a.answers_by), call, run / "answers.jsonl")
    config = read_config(a.parent)
    context = config.get("max_position_embeddings", 2048)
    examples = Encoder(a.parent).encoded(rows, context)
    if not examples:
        teacher = f"'{a.parent}'" if swiftkv_of(config) is None else "with the plain Llama the parent was made from"
        raise InputError(
            f"No row of '{a.prompts}' has prompt and answer within {context} tokens. Name the answers' column, or let "
            f"a model write them: --answers-by {teacher}."
        )
    every = max(2, len(examples) // a.held_out) if a.held_out else len(examples) + 1
    held_out = examples[every - 1 :: every]
    return [e for i, e in enumerate(examples, 1) if i % every], held_out


def distil(a: argparse.Namespace, run: Path, training: list[Example], held_out: list[Example]) -> dict[str, Any]:
    import torch

    recipe = recipe_of(a)
    chosen = layers_of(a, a.parent)
    model = load_pair(a.parent, chosen).to(a.device)
    trained = freeze_teacher(model, torch.bfloat16)
    state = DistillState(run, trained, recipe)
    before = asdict(score_forced(model, held_out, a.batch_tokens)) if held_out else None
    if not state.resume() and recipe.start == "fitted":
        with torch.autocast(torch.device(a.device).type, torch.bfloat16):
            fit_start(model, (b.to(a.device) for b in epoch(training, recipe.batch_tokens, recipe.seed)))
    train(model, state, training, a.compile)
    after = asdict(score_forced(model, held_out, a.batch_tokens)) if held_out else None
    write_student(a.parent, a.out, chosen, trained, a.keep_teacher)
    report = {
        "parent": str(a.parent),
        **asdict(chosen),
        "recipe": {k: v for k, v in asdict(recipe).items() if v != math.inf},
        "trained_parameters": sum(p.numel() for p in trained.values()),
        "tokens": state.progress.tokens,
        "minutes": round(state.progress.seconds / 60, 2),
        "held_out_before": before,
        "held_out_after": after,
    }
    (a.out / "distill.json").write_text(json.dumps(report, indent=2) + "\n")
    (a.out / "loss.png").write_bytes((run / "loss.png").read_bytes())
    return report


def teacher_of(name: str) -> Model:
    """The model that writes the answers to learn from.

    Raises:
        InputError: The model is in SwiftKV form, so it is itself a student.
    """
    from complete_fn.settings import load_settings

    found = find_model(name, load_settings().models_file)
    if found.engine == "embedded" and found.local_folder is not None:
        refuse_as_teacher(found.local_folder, "--answers-by")
    return found


def engine_of(model: str) -> Engine:
    from complete_fn.engines.pool import engine_for
    from complete_fn.settings import load_settings

    settings = load_settings()
    return engine_for(find_model(model, settings.models_file), settings)


def eval_verb(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    parser.add_argument("student", type=Path, help="SwiftKV folder")
    parser.add_argument("--teacher", type=Path, required=True, help="the parent's folder")
    add_table(parser)
    parser.add_argument("--max-tokens", type=int, help="of an answer")
    parser.add_argument("--no-answers", action="store_true", help="token by token only: generate nothing")
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    a = parser.parse_args(argv)
    rows = table_rows(a)
    if not a.no_answers:
        refuse_as_teacher(a.teacher, "--teacher")
    found: dict[str, Any] = {"rows": len(rows)}
    examples = Encoder(a.teacher).encoded(rows, read_config(a.teacher).get("max_position_embeddings", 2048))
    if examples:
        found["forced"] = asdict(score_forced(load_pair(a.teacher, None, a.student), examples, a.batch_tokens))
    if not a.no_answers:
        models = {"teacher": str(a.teacher), "student": str(a.student)}
        found["answers"] = compare_answers(models, engine_of, rows, a.max_tokens)
    print(format_scores(found))
    if a.json:
        a.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0
