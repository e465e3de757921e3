"""A table's prompts and answers become token rows, and these become batches by length."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from complete_fn.engines.base import Engine
from complete_fn.engines.call import Call
from complete_fn.errors import InputError
from complete_fn.prompts.templates import render_column, template_fields, unpack
from complete_fn.types import CompletionRequest

# Few lengths, because a compiled model is compiled once for each.
LENGTHS = (64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)


@dataclass(frozen=True)
class TableRow:
    """One row of the table. If `answer` is None, the teacher writes it."""

    prompt: str
    answer: str | None


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and its answer. The answer begins at `start` and ends with the end-of-turn token."""

    ids: list[int]
    start: int


def read_rows(path: Path, template: str, answer: str | None) -> list[TableRow]:
    """The rows of a Parquet or JSONL file. Rows with a NULL field or an empty prompt are left out.

    Args:
        template: the prompt with its columns in braces, as in `complete-fn run`.

    Raises:
        InputError: The file cannot be read or lacks a column, or the template names no column.
        InvalidOptionError: The template cannot be used.
    """
    if not path.is_file():
        raise InputError(f"'{path}' is no file.")
    fields = template_fields(template)
    if not fields:
        raise InputError(f"--prompt {template!r} names no column. Write it in braces: '{{text}}'.")
    wanted = [*fields, *([answer] if answer else [])]
    try:
        if path.suffix == ".parquet":
            have = pq.read_schema(path).names
            table = pq.read_table(path, columns=[name for name in wanted if name in have])
        else:
            lines = [json.loads(line) for line in path.read_text().split("\n") if line.strip()]
            table = pa.table({name: [line.get(name) for line in lines] for name in set().union(*lines) & set(wanted)})
    except (pa.ArrowException, ValueError, OSError) as error:
        raise InputError(f"'{path}' cannot be read as Parquet or JSONL: {error}") from error
    missing = [name for name in wanted if name not in table.column_names]
    if missing:
        raise InputError(f"'{path}' has no column {missing[0]!r}; it has {', '.join(table.column_names) or 'none'}.")
    answers = table[answer].to_pylist() if answer else [None] * len(table)
    prompts = render_column(template, {name: table[name] for name in fields}, len(table)).to_pylist()
    return [TableRow(str(unpack(p)), a) for p, a in zip(prompts, answers, strict=True) if p]


def teacher_answers(
    rows: list[TableRow], open_engine: Callable[[], Engine], call: Call, journal: Path
) -> list[TableRow]:
    """`rows` with missing answers written by the teacher, greedily. Each answer is noted in `journal` when it is done.

    After an interruption only the answers that the journal lacks are made; answers of another checkpoint or with other
    limits do not count. Rows that the engine fails are left out. The engine is closed at the end, because the training
    may need its memory.
    """
    by = call.fingerprint.hex()
    known: dict[str, str] = {}
    if journal.is_file():
        lines = (line for line in journal.read_text().splitlines() if line.endswith("}"))
        known = {note["prompt"]: note["answer"] for note in map(json.loads, lines) if note.get("by") == by}
    asked = list(dict.fromkeys(row.prompt for row in rows if row.answer is None and row.prompt not in known))
    if asked:
        journal.parent.mkdir(parents=True, exist_ok=True)
        requests = (CompletionRequest(call.model.name, prompt, call.sampling) for prompt in asked)
        with journal.open("a") as notes, closing(open_engine()) as engine:
            for position, done in engine.stream(requests, tenant="distill"):
                if done.text is not None and done.error is None:
                    known[asked[position]] = done.text
                    notes.write(json.dumps({"by": by, "prompt": asked[position], "answer": done.text}) + "\n")
                    notes.flush()
    made = (TableRow(row.prompt, row.answer if row.answer is not None else known.get(row.prompt)) for row in rows)
    return [row for row in made if row.answer is not None]


class Encoder:
    """A checkpoint's tokenizer and chat template, as the engine applies them to one user message."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        # A huge model_max_length, so that the tokenizer does not warn of long rows: `encoded` leaves them out.
        self.tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), model_max_length=10**9)
        if self.tokenizer.eos_token is None:
            raise InputError(f"The tokenizer of '{folder}' names no eos_token, so an answer's end cannot be taught.")

    def rendered(self, prompt: str) -> str:
        if not self.tokenizer.chat_template:
            return prompt
        text: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        return text

    def ids(self, texts: list[str]) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        return found

    def encoded(self, rows: Iterable[TableRow], longest: int) -> list[Example]:
        """The rows as examples. Rows without an answer, or longer than `longest` tokens, are left out."""
        answered = [row for row in rows if row.answer is not None]
        plain = "" if self.tokenizer.chat_template else self.tokenizer.bos_token or ""
        prompts = self.ids([plain + self.rendered(row.prompt) for row in answered])
        answers = self.ids([f"{row.answer}{self.tokenizer.eos_token}" for row in answered])
        pairs = zip(prompts, answers, strict=True)
        return [Example(p + a, len(p)) for p, a in pairs if len(p) + len(a) <= longest]


@dataclass(frozen=True)
class TokenBatch:
    """`tokens` int64, `answer` bool and `real` bool, each [rows, length]. `real` is False in the padding behind a row.

    `answer[r, t]` says that token t must be predicted, so it is judged at the output of position t - 1.
    """

    tokens: torch.Tensor
    answer: torch.Tensor
    real: torch.Tensor

    def to(self, device: str | torch.device) -> TokenBatch:
        return TokenBatch(*(t.to(device) for t in vars(self).values()))


def batch_of(examples: list[Example], length: int, prompt_share: float, choose: torch.Generator) -> TokenBatch:
    tokens = torch.zeros(len(examples), length, dtype=torch.long)
    answer = torch.zeros(len(examples), length, dtype=torch.bool)
    real = torch.zeros(len(examples), length, dtype=torch.bool)
    for i, example in enumerate(examples):
        end, start = len(example.ids), example.start
        tokens[i, :end] = torch.tensor(example.ids)
        real[i, :end] = True
        answer[i, start:end] = True
        if prompt_share:
            answer[i, 1:start] = torch.rand(start - 1, generator=choose) < prompt_share
    return TokenBatch(tokens, answer, real)


def epoch(examples: list[Example], batch_tokens: int, seed: int, prompt_share: float = 0.0) -> Iterator[TokenBatch]:
    """All examples once, shuffled, with rows of similar length in a batch. The same seed gives the same sequence."""
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    choose = torch.Generator().manual_seed(seed)
    waiting: dict[int, list[Example]] = {}
    for position in order:
        example = examples[position]
        length = next((n for n in LENGTHS if len(example.ids) <= n), len(example.ids))
        rows = waiting.setdefault(length, [])
        rows.append(example)
        if (len(rows) + 1) * length > batch_tokens:
            yield batch_of(rows, length, prompt_share, choose)
            waiting[length] = []
    for length, rows in sorted(waiting.items()):
        if rows:
            yield batch_of(rows, length, prompt_share, choose)
