"""`mismatch` tells why an answer breaks a JSON schema. Checks that may take long run in a child process with a limit.

The child (`python -m complete_fn.engines.answer_check`) reads JSON lines [answer, schema]. For each line it writes one
JSON line: the reason why the answer breaks the schema, or null.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections import Counter
from functools import lru_cache
from typing import Any

from complete_fn.host import renew_in_child
from complete_fn.prompts.schema_rules import SchemaSteps, steps_of

QUICK_STEPS = 200_000  # steps of a check in this process at most: about a second
CHECK_SECONDS = 2.0  # limit of a check in the child; an ordinary answer takes a thousandth of it
START_SECONDS = 30.0  # that the child may take to start
PATIENCE = 3  # a schema whose checks have overrun so often gets no more checks: its answers are refused
TOO_LONG = "Checking the answer against the response_format took longer than {seconds:g} s. A plainer schema is needed."


def mismatch(text: str, response_format: str) -> str | None:
    """The reason why the answer breaks the schema, or None if it satisfies the schema."""
    if is_quick(text, steps_of(response_format)):
        return mismatch_here(text, response_format)
    return CHECKER.mismatch(text, response_format)


def is_quick(text: str, steps: SchemaSteps) -> bool:
    """Whether a check in this process certainly ends soon. A step takes about 5 us for each value of the answer."""
    values = 1 + len(text) // 4
    pairs = values**2 if steps.has_unique else 0
    return not steps.is_recursive and not steps.has_pattern and steps.total * values + pairs <= QUICK_STEPS


def mismatch_here(text: str, response_format: str) -> str | None:
    """As `mismatch`, in this process and without a time limit."""
    try:
        value = json.loads(text)
        broken = next(validator(response_format).iter_errors(value), None)
    except ValueError as error:
        return f"The answer is not JSON: {error}."
    except RecursionError:
        return "The answer is nested too deeply to be checked."
    if broken is None:
        return None
    where = "/".join(str(step) for step in broken.absolute_path) or "the top"
    return f"The answer breaks the response_format at {where}: {broken.message[:300]}."


@lru_cache(maxsize=64)
def validator(response_format: str) -> Any:
    import jsonschema
    import referencing

    # With an empty registry, a reference outside the schema is an error and never a request over the network.
    return jsonschema.Draft202012Validator(json.loads(response_format), registry=referencing.Registry())


class AnswerChecker:
    """Keeps one child process. It starts at the first check, and again after a check that was ended."""

    def __init__(self, seconds: float = CHECK_SECONDS) -> None:
        self.seconds = seconds
        self.overruns: Counter[str] = Counter()
        self.after_fork()
        renew_in_child(self)

    def after_fork(self) -> None:
        """A forked process starts a child of its own. Its lock is new: a thread of the parent may hold the old one."""
        self.lock = threading.Lock()
        self.child: subprocess.Popen[str] | None = None

    def mismatch(self, text: str, response_format: str) -> str | None:
        """As `mismatch_here`, but a check that takes too long counts as a mismatch."""
        too_long = TOO_LONG.format(seconds=self.seconds)
        with self.lock:
            if self.overruns[response_format] >= PATIENCE:
                return too_long
            answered, why = self.ask(json.dumps([text, response_format]))
            if not answered:
                self.overruns[response_format] += 1
            return why if answered else too_long

    def ask(self, line: str) -> tuple[bool, str | None]:
        """(whether the child answered in time, its answer)"""
        child = self.started_child()
        assert child.stdin is not None
        assert child.stdout is not None
        ending = threading.Timer(self.seconds, child.kill)
        ending.start()
        try:
            child.stdin.write(line + "\n")
            child.stdin.flush()
            reply = child.stdout.readline()
        except OSError:  # the child was killed
            reply = ""
        finally:
            ending.cancel()
        if not reply:
            self.close()
            return False, None
        why: str | None = json.loads(reply)
        return True, why

    def started_child(self) -> subprocess.Popen[str]:
        if self.child is not None and self.child.poll() is None:
            return self.child
        self.child = subprocess.Popen(
            [sys.executable, "-P", "-m", "complete_fn.engines.answer_check"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # so that Ctrl-C reaches this process only
        )
        assert self.child.stdout is not None
        starting = threading.Timer(START_SECONDS, self.child.kill)
        starting.start()
        self.child.stdout.readline()  # wait until the child is ready: its imports do not count as checking
        starting.cancel()
        return self.child

    def close(self) -> None:
        """End the child, if there is one."""
        child, self.child = self.child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # unwritten bytes have no reader any more
                pipe.close()


CHECKER = AnswerChecker()


def main() -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        text, response_format = json.loads(line)
        if hasattr(signal, "alarm"):  # ends this process even if the parent, which would kill it, is gone
            signal.alarm(int(CHECK_SECONDS) + 8)
        print(json.dumps(mismatch_here(text, response_format)), flush=True)
        if hasattr(signal, "alarm"):
            signal.alarm(0)


if __name__ == "__main__":
    main()
