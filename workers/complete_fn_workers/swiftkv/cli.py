"""`complete-fn swiftkv convert | distill | eval | check`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from complete_fn.errors import CompleteError
from complete_fn_workers.swiftkv import verbs

USAGE = """complete-fn swiftkv <verb> ...

  convert   a Llama checkpoint in SwiftKV form, with the published start
  distill   train the new parameters on your prompts
  eval      the student beside its teacher: agreement, KL, accuracy, ROUGE-L, JSON validity
  check     vLLM's answers beside the reference model's, token by token

`complete-fn swiftkv <verb> --help` lists a verb's options."""


def main(argv: list[str]) -> int:
    """Run one verb. Exit code: 0 done, 1 the request cannot be carried out, 3 `check` found a difference."""
    known: dict[str, Callable[[argparse.ArgumentParser, list[str]], int]] = {
        "convert": verbs.convert_verb,
        "distill": verbs.distill_verb,
        "eval": verbs.eval_verb,
    }
    if argv[:1] == ["check"]:
        from complete_fn_workers.swiftkv.exact import main as check

        return check(argv[1:])
    if not argv or argv[0] not in known:
        print(USAGE, file=sys.stdout if argv in ([], ["--help"], ["-h"]) else sys.stderr)
        return 0 if argv in (["--help"], ["-h"]) else 1
    parser = argparse.ArgumentParser(prog=f"complete-fn swiftkv {argv[0]}")
    try:
        return known[argv[0]](parser, argv[1:])
    except CompleteError as error:
        print(f"complete-fn: {error}", file=sys.stderr)
        return 1
