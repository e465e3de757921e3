"""Two workers with real engines, and faults all the time: results, order, codes and bill are those of a quiet run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.chaos import FAULTS, Chaos, committed_usage, site

MOST_JOBS = 6
LONG_ROWS, LONG_PAUSES = 40_000, (5.0, 15.0)  # benchmarks/callers/chaos_run_batch.py takes the same
REAL = """
[models.tiny]
checkpoint = '{folder}'
max_model_len = 200
engine_args = {{ max_num_seqs = 16, max_num_batched_tokens = 1024, dtype = 'float32' }}  # bfloat16: by the batch
prices = {{ input = 1, cached_input = 1, output = 2 }}
"""


def texts(rows: int) -> list[str]:
    """Each its own; every fiftieth is too long for the model."""
    return [f"row number {n}" + " and so on" * (300 if n % 50 == 49 else n % 7) for n in range(rows)]


def plain(rows: list[dict[str, Any]]) -> list[tuple[int, str | None, str | None]]:
    """Of each row: id, text, error code."""

    def code(row: dict[str, Any]) -> str | None:
        error = row["completion_details"]["error"]
        return None if error is None else str(error["code"])

    return [(row["id"], row["completion"], code(row)) for row in rows]


def put_through(
    home: Path, models: str, rows: int, tokens: int, pauses: tuple[float, float], limit: float, ties: int = 0
) -> None:
    """A quiet run, and runs under faults until each kind was thrown: every one must end as the quiet one did.

    Args:
        ties: texts of a run that may differ.
    """
    settings = {"COMPLETE_FN_MEMORY": "0.25"}
    options = {"max_tokens": tokens, "cache": "off"}
    with site(home / "quiet", models, settings) as found:
        job = found.submit(found.upload(texts(rows)), "quiet", "tiny", options)
        state, quiet_seconds = found.finished(job, limit)
        quiet = plain(found.results(job))
    assert [n for n, _, _ in quiet] == list(range(rows))
    with site(home / "chaos", models, settings) as found:
        file = found.upload(texts(rows))
        jobs: list[str] = []

        def submit_again() -> str:
            """Under the key of the job that runs."""
            return found.submit(file, f"job {len(jobs) - 1}", "tiny", options)

        seconds = 0.0
        with Chaos(found, "tiny", pauses, submit_again):
            while set(found.faults) != set(FAULTS) and len(jobs) < MOST_JOBS:
                jobs.append(found.submit(file, f"job {len(jobs)}", "tiny", options))
                now, took = found.finished(jobs[-1], limit)
                seconds += took
                assert now["rows"] == state["rows"]
        assert submit_again() == jobs[-1]
        results = [found.results(job) for job in jobs]
        count, kinds = sum(found.faults.values()), dict(found.faults)
        print(f"quiet {quiet_seconds:.0f} s; {len(jobs)} under {count} faults {seconds:.0f} s: {kinds}")
        assert set(found.faults) == set(FAULTS)
        for result in results:
            pairs = list(zip(plain(result), quiet, strict=True))
            assert [(mine[0], mine[2]) for mine, _ in pairs] == [(its[0], its[2]) for _, its in pairs]
            others = [(mine, its) for mine, its in pairs if mine != its]
            assert len(others) <= ties, others
        used = [row["completion_details"]["usage"] for result in results for row in result]
        billed = committed_usage(found)
        assert billed["cached_input"] == sum(u["prompt_tokens"] for u in used)
        assert billed["output"] == sum(u["completion_tokens"] for u in used)


@pytest.mark.long
@pytest.mark.engine
@pytest.mark.timeout(3600)
def test_a_job_of_minutes_on_real_engines_under_faults_ends_as_a_quiet_one(
    needs_vllm: None, tmp_path: Path, tiny_model: Path
) -> None:
    # Sums of float32 differ by the batch in their last bits: one token in a million is another of two as likely ones.
    put_through(tmp_path, REAL.format(folder=tiny_model), LONG_ROWS, 32, LONG_PAUSES, 3000, ties=LONG_ROWS // 10_000)
