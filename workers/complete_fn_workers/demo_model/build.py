"""`make model`: fetch Debian's package index, train demo-llama, distil its SwiftKV form, evaluate, cut the sample."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from complete_fn_workers.demo_model.card import write_card
from complete_fn_workers.demo_model.corpus import Package, read_index, split_of
from complete_fn_workers.demo_model.evaluate import evaluate, first_sentence_baseline, svm_baseline
from complete_fn_workers.demo_model.student import make_student, score_student
from complete_fn_workers.demo_model.train import train

SAMPLE_ROWS = 2_000


def fetch_index(folder: Path) -> None:
    """Let apt download the package index of this machine's Debian release. This needs no root.

    Raises:
        RuntimeError: This machine has no apt, or apt failed; the message has apt's words.
    """
    if shutil.which("apt-get") is None:
        raise RuntimeError(
            "The demo model is trained on Debian's package index: run this on Debian (apt-get is missing)."
        )
    for name in ("lists/partial", "cache", "state"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    options = {
        "Acquire::Languages": "en",
        "Dir::State": folder / "state",
        "Dir::State::Lists": folder / "lists",
        "Dir::Cache": folder / "cache",
        "Dir::State::status": "/dev/null",
    }
    command = ["apt-get", *(x for k, v in options.items() for x in ("-o", f"{k}={v}")), "update"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"apt-get update failed: {done.stderr.strip()[-500:]}")


def snapshot(lists: Path) -> str:
    """Release and date of the index, from its InRelease files."""
    found = []
    for path in sorted(lists.glob("*InRelease")):
        head = path.read_text("utf-8", "replace")[:2000]
        fields = dict(re.findall(r"^(Suite|Date): (.*)$", head, re.M))
        found.append(f"{fields.get('Suite', '?')} of {fields.get('Date', '?')}")
    return "; ".join(found)


def held_out(packages: list[Package]) -> list[Package]:
    return [p for p in packages if split_of(p.source) == "test"]


def write_sample(packages: list[Package], path: Path) -> None:
    """Write every third held-out package, at most 2,000, as Parquet."""
    chosen = held_out(packages)[::3][:SAMPLE_ROWS]
    columns = ("package", "source", "section", "maintainer", "synopsis", "description")
    table = pa.table({c: pa.array([getattr(p, c) for p in chosen], pa.string()) for c in columns})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd")


def write_split(packages: list[Package], path: Path) -> None:
    """Write the source packages that are kept from training, one per line: `test name` or `validation name`."""
    sources = sorted({p.source for p in packages})
    path.write_text("".join(f"{split_of(s)} {s}\n" for s in sources if split_of(s) != "train"))


def score(packages: list[Package], model: Path, with_svm: bool) -> dict[str, float]:
    """The model's scores on the held-out packages and the baselines beside them."""
    test = held_out(packages)
    with tempfile.TemporaryDirectory() as home:
        found = asdict(evaluate(str(model), test, Path(home)))
    found["first_sentence_rouge_l"] = first_sentence_baseline(test)
    if with_svm:
        train_part = [p for p in packages if split_of(p.source) == "train"]
        found["svm_accuracy"], found["svm_macro_f1"] = svm_baseline(train_part, test)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for index, checkpoint, split, sample")
    parser.add_argument("--minutes", type=float, default=95.0, help="training minutes at most")
    parser.add_argument("--student-minutes", type=float, default=20.0, help="minutes of distilling at most")
    parser.add_argument("--skip-training", action="store_true", help="only evaluate the checkpoints in --out")
    a = parser.parse_args()
    lists, model, student = a.out / "index" / "lists", a.out / "demo-llama", a.out / "demo-llama-swiftkv"
    if not any(lists.glob("*_Packages*")):
        fetch_index(a.out / "index")
    packages = read_index(lists)
    if not a.skip_training:
        train(packages, model, max_tokens=120_000_000, max_minutes=a.minutes, lr=4e-3, seed=17)
    write_sample(packages, a.out / "packages.parquet")
    write_split(packages, model / "split.txt")
    scores = score(packages, model, with_svm=True)
    write_card(model, scores, snapshot(lists), len(packages))
    if not a.skip_training:
        make_student(packages, model, student, a.student_minutes, [])
    score_student(packages, scores, student)
    print((model / "README.md").read_text() + (student / "README.md").read_text())


if __name__ == "__main__":
    main()
