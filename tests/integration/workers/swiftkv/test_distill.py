"""From a Llama folder and a table to a distilled SwiftKV checkpoint, through the command line's own entry."""

from __future__ import annotations

# ruff: noqa: E402 - skipped before anything heavy
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import load_file

from complete_fn.engines.base import EchoEngine
from complete_fn.engines.call import Call
from complete_fn.engines.catalogue import Model
from complete_fn.errors import InputError, InvalidOptionError
from complete_fn.types import SamplingParams
from complete_fn_workers.demo_model.tokenizer import save_tokenizer, train_tokenizer
from complete_fn_workers.swiftkv import verbs
from complete_fn_workers.swiftkv.checkpoint import load_model, load_pair
from complete_fn_workers.swiftkv.cli import main
from complete_fn_workers.swiftkv.reference import States, SwiftKV
from complete_fn_workers.swiftkv.training import distill as distilling
from complete_fn_workers.swiftkv.training.activations import fit_start, lesson_of, student_states
from complete_fn_workers.swiftkv.training.convert import convert
from complete_fn_workers.swiftkv.training.distill import DistillState, Recipe, freeze_teacher, train
from complete_fn_workers.swiftkv.training.exact import Agreement, agreement
from complete_fn_workers.swiftkv.training.examples import Encoder, Example, TableRow, epoch, read_rows, teacher_answers
from complete_fn_workers.swiftkv.training.forced_scores import score_forced
from tests.random_checkpoints import TINY, random_model, write_checkpoint

pytestmark = pytest.mark.engine  # torch and transformers come with it
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "boil")
TOKENS = torch.randint(2, 512, (2, 40), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parent") / "tiny"
    write_checkpoint(random_model(TINY, None), folder, dtype=torch.bfloat16)
    save_tokenizer(train_tokenizer([" ".join(WORDS)] * 4, TINY.vocab_size), folder, TINY.max_position_embeddings)
    (folder / "LICENSE").write_text("Apache License, Version 2.0")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# tiny\n")
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    choose = random.Random(0)
    texts = [" ".join(choose.choices(WORDS, k=choose.randrange(3, 40))) for _ in range(120)]
    table = pa.table({"prompt": texts, "answer": [text.split()[0] for text in texts]})
    path = tmp_path_factory.mktemp("table") / "prompts.parquet"
    pq.write_table(table, path)
    return path


def test_a_prompt_may_hold_what_ends_lines_elsewhere(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one\u2028two\x85", "answer": "a\u2029"}\n{"prompt": "three", "answer": "b"}\n')
    assert read_rows(file, "{prompt}", "answer") == [TableRow("one\u2028two\x85", "a\u2029"), TableRow("three", "b")]


def test_prompts_may_be_those_of_a_job(tmp_path: Path) -> None:
    table = {"id": [1, 2, 3], "text": ["a", None, "c"], "completion": ["x", "y", None]}
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    found = read_rows(tmp_path / "rows.parquet", "Say {text} {{{id}}}", "completion")
    assert found == [TableRow("Say a {1}", "x"), TableRow("Say c {3}", None)]
    with pytest.raises(InputError, match="'Say it' names no column"):
        read_rows(tmp_path / "rows.parquet", "Say it", None)


@pytest.mark.parametrize("group", [1, 2, 4])
def test_conversion_keeps_the_teacher_and_starts_as_published(parent: Path, tmp_path: Path, group: int) -> None:
    convert(parent, tmp_path / "out", SwiftKV(4, group))
    made, source = load_file(tmp_path / "out/model.safetensors"), load_file(parent / "model.safetensors")
    assert all(torch.equal(made[name], tensor) for name, tensor in source.items())
    assert torch.equal(made["model.norm_swiftkv.weight"], source["model.layers.4.input_layernorm.weight"])
    at = "model.layers.{}.self_attn.{}.weight"
    for layer in range(4, 8):
        assert torch.equal(made[at.format(layer, "q_proj_swiftkv")], source[at.format(layer, "q_proj")])
    owners = {n.split(".")[2] for n in made if "k_proj_swiftkv" in n}
    assert owners == {str(i) for i in range(4, 8, group)}
    mean = sum(source[at.format(i, "v_proj")].float() for i in range(4, 4 + group)) / group
    assert torch.equal(made[at.format(4, "v_proj_swiftkv")], mean.to(torch.bfloat16))
    # The published start computed by the reference model is the same.
    by_reference = load_pair(parent, SwiftKV(4, group))
    assert torch.allclose(by_reference.student(TOKENS), load_model(tmp_path / "out").student(TOKENS), atol=1e-2)


def test_conversion_carries_licence_tokenizer_and_card(parent: Path, tmp_path: Path) -> None:
    assert main(["convert", str(parent), str(tmp_path / "out"), "--drop-teacher"]) == 0
    out = tmp_path / "out"
    assert {"LICENSE", "tokenizer.json", "PARENT_README.md", "README.md"} <= {p.name for p in out.iterdir()}
    assert "license: apache-2.0" in (out / "README.md").read_text()
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["num_key_value_layers"], config["swiftkv"]) == ("llama_swiftkv", 4, True)
    assert not any("layers.6.self_attn.q_proj." in name for name in load_file(out / "model.safetensors"))


def test_lossless_conversion_computes_what_the_parent_does(parent: Path, tmp_path: Path) -> None:
    assert main(["convert", str(parent), str(tmp_path / "out"), "--lossless"]) == 0
    student, plain = load_model(tmp_path / "out"), load_model(parent)
    assert student.kept_layers == 7
    assert torch.allclose(student.student(TOKENS), plain(TOKENS), atol=1e-5)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num-key-value-layers", "8"], "use 1 to 7"),
        (["--key-value-group-size", "3"], "must divide the 4 later layers"),
    ],
)
def test_impossible_layers(parent: Path, tmp_path: Path, argv: list[str], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        main(["convert", str(parent), str(tmp_path / "out"), *argv])
    assert list(tmp_path.iterdir()) == []


def test_a_llama_licence_asks_for_a_llama_name(parent: Path, tmp_path: Path) -> None:
    licensed = write_checkpoint(random_model(TINY, None), tmp_path / "licensed")
    (licensed / "LICENSE").write_text("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT")
    convert(licensed, tmp_path / "Llama-mine", SwiftKV(4))
    (licensed / "model.safetensors").unlink()  # the name is looked at before any tensor and any row
    with pytest.raises(InputError, match="Llama-mine"):
        convert(licensed, tmp_path / "mine", SwiftKV(4))
    with pytest.raises(InputError, match="Llama-mine"):
        main(["distill", str(licensed), str(tmp_path / "mine"), "--prompts", str(tmp_path / "none.parquet")])
    assert not (tmp_path / "mine.partial").exists()


def examples_from(parent: Path, prompts: Path) -> list[Example]:
    return Encoder(parent).encoded(read_rows(prompts, "{prompt}", "answer"), TINY.max_position_embeddings)


def test_examples_end_with_the_end_of_turn_and_batches_hold_each_once(parent: Path, prompts: Path) -> None:
    encoder = Encoder(parent)
    examples = examples_from(parent, prompts)
    rows = read_rows(prompts, "{prompt}", "answer")
    for row, example in zip(rows, examples, strict=True):
        assert encoder.tokenizer.decode(example.ids[example.start :]) == f"{row.answer}<|eot_id|>"
        assert encoder.tokenizer.decode(example.ids[: example.start]) == encoder.rendered(row.prompt)
    seen = []
    for batch in epoch(examples, 1024, seed=5):
        assert batch.tokens.numel() <= 1024
        for ids, judged, real in zip(batch.tokens, batch.answer, batch.real, strict=True):
            seen.append((ids[real].tolist(), int(judged.nonzero()[0])))
    assert sorted(seen) == sorted((e.ids, e.start) for e in examples)


def run_of(parent: Path, folder: Path, **recipe: Any) -> DistillState:
    model = load_pair(parent, SwiftKV(4, 2))
    state = DistillState(folder, freeze_teacher(model, torch.float32), Recipe(lr=1e-3, batch_tokens=1024, **recipe))
    state.model = model  # type: ignore[attr-defined]
    return state


@pytest.mark.parametrize("more", [{}, {"memory_gib": 1.0}, {"memory_gib": 1e-6}])
def test_training_moves_only_the_student_and_brings_it_nearer(
    parent: Path, prompts: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    examples = examples_from(parent, prompts)
    state = run_of(parent, tmp_path, epochs=4, **more)
    model = state.model  # type: ignore[attr-defined]
    frozen = {n: p.clone() for n, p in model.named_parameters() if "swiftkv" not in n}
    assert {n.split(".")[-2] for n in state.trained} == {
        "norm_swiftkv", "q_proj_swiftkv", "k_proj_swiftkv", "v_proj_swiftkv",
    }  # fmt: skip
    before = score_forced(model, examples, 1024)
    train(model, state, examples, report=lambda _: None)
    after = score_forced(model, examples, 1024)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert after.kl < 0.9 * before.kl
    assert after.teacher_right == before.teacher_right
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_student_at_some_positions_is_the_student_there(parent: Path, prompts: Path) -> None:
    model = load_pair(parent, SwiftKV(4, 2))
    batch = next(epoch(examples_from(parent, prompts), 1024, seed=5))
    lesson = lesson_of(model, batch)
    judged = batch.answer[:, 1:]
    assert int(lesson.real.sum()) == int(judged.sum())
    with torch.no_grad():
        h, rotary = model.early(batch.tokens)
        for found, whole in (
            (student_states(model, lesson), model.student_late(h, rotary)),
            (States(lesson.last, lesson.before_last), model.teacher_late(h, rotary)),
        ):
            for mine, all_of_it in zip(found, whole, strict=True):
                torch.testing.assert_close(mine, all_of_it[:, :-1][judged])


@pytest.mark.parametrize("group", [1, 2])
def test_a_fitted_start_is_as_near_as_a_linear_map_can_be(parent: Path, prompts: Path, group: int) -> None:
    model = load_pair(parent, SwiftKV(4, group))
    examples = examples_from(parent, prompts)

    def off() -> float:
        """Squared distance of the student's keys and values from the mean of the teacher's in their group."""
        total = 0.0
        with torch.no_grad():
            for batch in epoch(examples, 1024, seed=1):
                h, rotary = model.early(batch.tokens)
                x = model.norm_swiftkv(h)[batch.real]
                wanted = []
                for layer, attention in zip(model.late_layers, model.late_attentions, strict=True):
                    own = layer.input_layernorm(h)[batch.real]
                    wanted.append(torch.cat([attention.k_proj(own), attention.v_proj(own)], -1))
                    h = layer(h, *rotary)
                for at, own in enumerate(a for a in model.late_attentions if a.owner):
                    made = torch.cat([own.k_proj_swiftkv(x), own.v_proj_swiftkv(x)], -1)
                    total += float((made - torch.stack(wanted[at * group : (at + 1) * group]).mean(0)).pow(2).sum())
        return total

    published = off()
    fit_start(model, epoch(examples, 1024, seed=0))
    fitted = off()
    assert fitted < published
    with torch.no_grad():
        model.late_attentions[0].k_proj_swiftkv.weight.mul_(1.05)
    assert off() > fitted


@pytest.mark.parametrize("more", [{}, {"memory_gib": 1.0}])
def test_an_interrupted_run_goes_on_to_the_same_weights(
    parent: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    examples = examples_from(parent, prompts)
    whole = run_of(parent, tmp_path / "whole", epochs=2, **more)
    train(whole.model, whole, examples, report=lambda _: None)  # type: ignore[attr-defined]

    cut = run_of(parent, tmp_path / "cut", epochs=2, **more)
    taken, real = [], distilling.take_step

    def interrupted(*arguments: Any) -> None:
        if len(taken) == 5:
            raise KeyboardInterrupt
        taken.append(1)
        real(*arguments)

    monkeypatch.setattr(distilling, "take_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(cut.model, cut, examples, report=lambda _: None)  # type: ignore[attr-defined]
    monkeypatch.setattr(distilling, "take_step", real)
    again = run_of(parent, tmp_path / "cut", epochs=2, **more)
    assert again.resume()
    assert again.progress.batches == 5 < sum(1 for _ in epoch(examples, 1024, 0))
    train(again.model, again, examples, report=lambda _: None)  # type: ignore[attr-defined]
    assert all(torch.equal(p, again.trained[name]) for name, p in whole.trained.items())
    with pytest.raises(InputError, match="another lr"):
        DistillState(tmp_path / "cut", again.trained, Recipe(lr=5e-3, batch_tokens=1024, epochs=2)).resume()


def test_distil_writes_a_checkpoint_with_its_figures(parent: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "student"
    argv = ["distill", str(parent), str(out), "--prompts", str(prompts), "--epochs", "2", "--lr", "1e-3"]
    assert main([*argv, "--batch-tokens", "1024", "--held-out", "20"]) == 0
    report = json.loads((out / "distill.json").read_text())
    assert report["held_out_after"]["kl"] < report["held_out_before"]["kl"]
    stored = load_file(out / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert "model.layers.4.self_attn.q_proj.weight" not in stored
    assert torch.equal(stored["model.layers.0.mlp.up_proj.weight"], load_file(parent / "model.safetensors")["model.layers.0.mlp.up_proj.weight"])  # fmt: skip  # noqa: E501
    served = score_forced(load_pair(parent, None, out), examples_from(parent, prompts)[5::6], 1024)
    assert served.kl == pytest.approx(report["held_out_after"]["kl"], rel=0.05)


class Closing(EchoEngine):
    """Counts how often it was closed."""

    closed = 0

    def close(self) -> None:
        self.closed += 1


def test_missing_answers_are_the_teachers_and_asked_for_once(tmp_path: Path) -> None:
    rows = [TableRow("one", None), TableRow("two", "given"), TableRow("one", None), TableRow("three " * 50, None)]
    engine = Closing(context=20)
    journal, call = tmp_path / "run/answers.jsonl", Call(Model("teacher", "teacher", engine="echo"))
    made = teacher_answers(rows, lambda: engine, call, journal)
    assert made == [TableRow("one", "one"), TableRow("two", "given"), TableRow("one", "one")]
    assert engine.closed == 1
    assert [request.prompt for request in engine.requests] == ["one", "three " * 50]
    assert teacher_answers(rows[:3], lambda: pytest.fail("opened for nothing"), call, journal) == made


def test_answers_of_another_teacher_or_length_are_not_taken_for_this_ones(tmp_path: Path) -> None:
    journal, rows = tmp_path / "answers.jsonl", [TableRow("one two", None)]
    journal.write_text('{"prompt": "one two", "answer": "by whom?"}\n')  # as it was written once
    first = Call(Model("t", "first", engine="echo"))
    calls = (
        first,
        Call(Model("t", "second", engine="echo")),
        replace(first, sampling=SamplingParams(max_tokens=1)),
        first,
    )
    engine, asked = Closing(), []
    for call in calls:
        made = teacher_answers(rows, lambda: engine, call, journal)
        assert made == [TableRow("one two", "one" if call.sampling.max_tokens else "one two")]
        asked.append(len(engine.requests))
    assert asked == [1, 2, 3, 3]


def test_a_student_is_no_teacher(prompts: Path, parent: Path, tmp_path: Path) -> None:
    student = tmp_path / "student"
    convert(parent, student, SwiftKV(4))
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"prompt": "the quick"}\n')
    distill = ["distill", str(student), str(tmp_path / "out"), "--prompts", str(bare)]
    with pytest.raises(InputError, match="--answers-by with the plain Llama the parent was made from"):
        main(distill)
    with pytest.raises(InputError, match=r"--answers-by '.*student' is in SwiftKV form"):
        main([*distill, "--answers-by", str(student)])
    with pytest.raises(InputError, match=r"--teacher '.*student' is in SwiftKV form"):
        main(["eval", str(student), "--teacher", str(student), "--prompts", str(prompts)])


def test_a_run_begun_anew_forgets_its_answers(
    parent: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verbs, "distil", lambda *_: {})
    journal = tmp_path / "out.run/answers.jsonl"
    journal.parent.mkdir()
    for more in ([], ["--restart"]):
        journal.write_text("")
        assert main(["distill", str(parent), str(tmp_path / "out"), "--prompts", str(prompts), *more]) == 0
        assert journal.exists() is not bool(more)


def test_a_table_without_the_column_names_what_it_has(prompts: Path) -> None:
    argv = ["eval", "x", "--teacher", "y", "--prompts", str(prompts), "--prompt", "Say {text}"]
    with pytest.raises(InputError, match="no column 'text'"):
        main(argv)


def test_a_quantised_checkpoint_is_not_read_as_weights(parent: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(
        random_model(TINY, SwiftKV(4)), tmp_path / "fp8", quantization_config={"quant_method": "fp8"}
    )
    for load in (lambda: load_model(folder), lambda: load_pair(folder, None), lambda: load_pair(parent, None, folder)):
        with pytest.raises(InputError, match=r"fp8' is quantised \(fp8\)"):
            load()


@pytest.mark.parametrize(("off", "worst"), [(0.0, 0.0), (math.nan, math.inf)])
def test_no_number_is_no_agreement(off: float, worst: float) -> None:
    model, prompt = random_model(TINY, None), [5, 6, 7]
    with torch.no_grad():
        row = model.logits(model(torch.tensor([prompt])))[0, -1].log_softmax(-1)
    token = int(row.argmax())
    given = {token: SimpleNamespace(logprob=float(row[token]) + off)}
    answer = SimpleNamespace(outputs=[SimpleNamespace(token_ids=[token], logprobs=[given])])
    found = agreement(model, [prompt], [answer])
    assert found == Agreement(1, 1, pytest.approx(worst, abs=1e-5))
    assert found.exact is not bool(off)
    assert not Agreement(0, 0, 0.0).exact
