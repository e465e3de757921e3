"""What SwiftKV costs in answers: `demo-llama` and its SwiftKV forms on the same held-out rows, paired.

    python benchmarks/engines/swiftkv_quality.py --lists FOLDER --parent demo-llama
        --student '50 % skipped=demo-llama-swiftkv' --student '25 %=runs/quarter' --rows 5000 --json quality.json

Adds the parent converted without distillation and, for each student named with `+fp8`, the same with an FP8 cache.
Each row is one package of the test split (disjoint from training by source package) under all three instructions,
answered greedily by the embedded engine. Differences are student - parent in points, with a 95 % interval from the
rows' paired differences. At this size and with prompts this short SwiftKV is hardly a speed-up, which
`benchmarks/engines/swiftkv_speed.py --quick --sizes demo --prompts 64` shows.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from complete_fn.engines.catalogue import find_model
from complete_fn.engines.pool import engine_for
from complete_fn.settings import load_settings
from complete_fn.types import CompletionRequest, SamplingParams
from complete_fn_workers.demo_model.corpus import (
    AS_JSON,
    INSTRUCTIONS,
    SECTION,
    SYNOPSIS,
    Package,
    answer,
    read_index,
    split_of,
)
from complete_fn_workers.quality_scores import macro_f1, rouge_l
from complete_fn_workers.swiftkv.checkpoint import load_pair, read_config, shape_of, swiftkv_of
from complete_fn_workers.swiftkv.reference import SwiftKV
from complete_fn_workers.swiftkv.training.convert import convert
from complete_fn_workers.swiftkv.training.examples import Encoder, TableRow
from complete_fn_workers.swiftkv.training.forced_scores import score_forced

MAX_TOKENS = 96  # longer than any section, synopsis or their JSON


@dataclass(frozen=True)
class Form:
    """One line of the table: a checkpoint folder and the type of its cache."""

    name: str
    folder: Path
    cache: str = "auto"


def folder_of(model: str) -> Path:
    found = find_model(model).local_folder
    if found is None:
        raise SystemExit(f"'{model}' is not on this machine's disk.")
    return found


def answered(form: Form, prompts: list[str]) -> list[str]:
    """Greedy answers in the prompts' order; a failed row is an empty one."""
    model = replace(find_model(str(form.folder)), engine_args={"kv_cache_dtype": form.cache})
    engine = engine_for(model, load_settings())
    requests = (CompletionRequest(model.name, p, SamplingParams(max_tokens=MAX_TOKENS)) for p in prompts)
    done = {position: completion.text or "" for position, completion in engine.stream(requests, tenant="benchmark")}
    engine.close()
    return [done[position] for position in range(len(prompts))]


def valid(text: str) -> bool:
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return isinstance(found, dict) and set(found) == {"section", "synopsis"}


def row_scores(packages: list[Package], answers: dict[str, list[str]], parents: dict[str, list[str]]) -> dict[str, Any]:
    """Per measure one value a row, in points (0 to 100)."""
    sections = [100.0 * (a == p.section) for a, p in zip(answers[SECTION], packages, strict=True)]
    synopses = [100.0 * rouge_l(a, p.synopsis) for a, p in zip(answers[SYNOPSIS], packages, strict=True)]

    def same(i: int) -> float:
        return statistics.mean(100.0 * (answers[k][i] == parents[k][i]) for k in answers)

    return {
        "section accuracy": sections,
        "synopsis ROUGE-L": synopses,
        "JSON validity": [100.0 * valid(a) for a in answers[AS_JSON]],
        "same answer as the parent": [same(i) for i in range(len(packages))],
    }


def difference(own: list[float], parents: list[float]) -> tuple[float, float]:
    """Mean paired difference and half its 95 % interval."""
    differences = [a - b for a, b in zip(own, parents, strict=True)]
    spread = statistics.stdev(differences) if len(differences) > 1 else math.nan
    return statistics.mean(differences), 1.96 * spread / math.sqrt(len(differences))


def cache_bytes(form: Form) -> int:
    """Keys and values stored per token."""
    config = read_config(form.folder)
    shape, swiftkv = shape_of(config), swiftkv_of(config)
    layers = shape.num_hidden_layers
    if swiftkv is not None:
        kept = swiftkv.num_key_value_layers
        layers = kept + (layers - kept) // swiftkv.key_value_group_size
    return layers * 2 * shape.num_key_value_heads * shape.head_dim * (1 if form.cache == "fp8" else 2)


def forced_scores(form: Form, parent: Path, rows: list[TableRow]) -> dict[str, float]:
    if swiftkv_of(read_config(form.folder)) is None:
        return {"agreement": 1.0, "kl": 0.0}
    found = score_forced(load_pair(parent, None, form.folder), Encoder(parent).encoded(rows, 4096), 8192)
    return {"agreement": found.agreement, "kl": found.kl}


def measured(
    form: Form, parent: Form, packages: list[Package], parents: dict[str, list[str]], rows: list[TableRow]
) -> Any:
    if form is parent:
        answers = parents
    else:
        answers = {k: answered(form, [k + p.description for p in packages]) for k in INSTRUCTIONS}
    own, base = row_scores(packages, answers, parents), row_scores(packages, parents, parents)
    config = read_config(form.folder)
    return {
        "form": form.name,
        "rows": len(packages),
        "num_key_value_layers": config.get("num_key_value_layers", config["num_hidden_layers"]),
        "key_value_group_size": config.get("key_value_group_size", 1),
        "cache_dtype": form.cache,
        "cache_bytes_per_token": cache_bytes(form),
        "section macro-F1": 100 * macro_f1(answers[SECTION], [p.section for p in packages]),
        **{name: statistics.mean(values) for name, values in own.items()},
        "difference": {name: difference(own[name], base[name]) for name in list(own)[:3]},
        **forced_scores(form, parent.folder, rows),
    }


def line_of(row: dict[str, Any]) -> str:
    def paired(name: str) -> str:
        change, half = row["difference"][name]
        return f"{row[name]:6.2f} ({change:+.2f} ± {half:.2f})"

    return (
        f"| {row['form']:<28} | {paired('section accuracy')} | {row['section macro-F1']:5.1f} "
        f"| {paired('synopsis ROUGE-L')} | {paired('JSON validity')} | {row['same answer as the parent']:5.1f} "
        f"| {100 * row['agreement']:5.2f} | {row['kl']:.4f} | {row['cache_bytes_per_token']:,} |"
    )


HEAD = (
    "| form | section accuracy % | macro-F1 | synopsis ROUGE-L | JSON valid % | same answer % | same token % "
    "| KL, nats | cache bytes/token |\n|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lists", type=Path, required=True, help="folder with apt's Packages and Translation-en files")
    parser.add_argument("--parent", default="demo-llama")
    parser.add_argument("--student", action="append", default=[], metavar="NAME=MODEL[+fp8]")
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--forced-rows", type=int, default=600, help="packages for agreement and KL token by token")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    packages = [p for p in read_index(a.lists) if split_of(p.source) == "test"]
    packages = random.Random(0).sample(packages, min(a.rows, len(packages)))
    forced_on = packages[: a.forced_rows]
    rows = [TableRow(k + p.description, answer(k, p.section, p.synopsis)) for p in forced_on for k in INSTRUCTIONS]
    parent = Form(a.parent, folder_of(a.parent))
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "start"
        convert(parent.folder, start, SwiftKV(read_config(parent.folder)["num_hidden_layers"] // 2), keep_teacher=False)
        forms = [parent, Form("converted, not distilled", start)]
        for student in a.student:
            name, _, model = student.partition("=")
            plain = folder_of(model.removesuffix("+fp8"))
            forms.append(Form(name, plain))
            if model.endswith("+fp8"):
                forms.append(Form(f"{name}, FP8 cache", plain, "fp8"))
        parents = {k: answered(parent, [k + p.description for p in packages]) for k in INSTRUCTIONS}
        print(HEAD, flush=True)
        table = []
        for form in forms:
            table.append(measured(form, parent, packages, parents, rows))
            print(line_of(table[-1]), flush=True)
    if a.json:
        forms_used = [asdict(form) | {"folder": str(form.folder)} for form in forms]
        a.json.write_text(json.dumps({"rows": table, "forms": forms_used}, indent=2) + "\n")


if __name__ == "__main__":
    main()
