"""`complete-fn swiftkv` has the verbs `convert`, `distill`, `eval` and `check`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from complete_fn.cli.main import Parser
from complete_fn.errors import InvalidOptionError
from complete_fn_workers.swiftkv import verbs

VERBS: dict[str, Callable[[argparse.ArgumentParser, list[str]], int]] = {
    "convert": verbs.convert_verb,
    "distill": verbs.distill_verb,
    "eval": verbs.eval_verb,
}

USAGE = """complete-fn swiftkv <verb> ...

  convert   a Llama checkpoint in SwiftKV form, with the published start
  distill   train the new parameters on your prompts
  eval      the student beside its teacher: agreement, KL, accuracy, ROUGE-L, JSON validity
  check     vLLM's answers beside the reference model's, token by token

`complete-fn swiftkv <verb> --help` lists a verb's options."""


def main(argv: list[str]) -> int:
    """Run one verb.

    Returns:
        0: done. 3: `check` found a difference.

    Raises:
        RequestError: The verb, its options or its files cannot be used.
    """
    if argv[:1] == ["check"]:
        from complete_fn_workers.swiftkv.training.exact import main as check

        return check(argv[1:])
    if argv[:1] in ([], ["--help"], ["-h"]):
        print(USAGE)
        return 0
    if argv[0] not in VERBS:
        raise InvalidOptionError(f"There is no verb {argv[0]!r}. `complete-fn swiftkv --help` lists all.")
    return VERBS[argv[0]](Parser(prog=f"complete-fn swiftkv {argv[0]}"), argv[1:])
