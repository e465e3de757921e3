"""Ctrl-C at any step of a run: it ends the run, and the next one works."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# Python raises KeyboardInterrupt after a call or at a function's beginning: those are what a profiler is told of.
SCRIPT = """
import faulthandler, random, sys, threading, time
from pathlib import Path
from complete_fn import Completion, Session, Usage
faulthandler.dump_traceback_later(250, exit=True)

class Slow:
    def stream(self, requests, tenant):
        for position, request in enumerate(requests):
            time.sleep(0.001)
            yield position, Completion(request.prompt, "stop", usage=Usage(2, 0, 2))
    def count_tokens(self, texts):
        return [len(t) for t in texts]
    def close(self):
        pass

home, tries = Path(sys.argv[1]), int(sys.argv[2])
session = Session(engine=Slow(), home=home, progress=False)
draw = random.Random(5)

def run(number, strike):
    "The answers, or None where the run was interrupted; and how many steps there were, those of threading apart."
    steps, locks = 0, 0
    def step(frame, event, argument):
        nonlocal steps, locks
        if event != "c_call":
            inside = frame.f_code.co_filename == threading.__file__
            steps, locks = steps + (not inside), locks + inside
            if strike == (inside, locks if inside else steps):
                raise KeyboardInterrupt
    prompts = [f"{number} {row}" for row in range(40)]
    sys.setprofile(step)
    try:
        return session.complete("m", prompts).text.to_pylist() == prompts, steps, locks
    except KeyboardInterrupt:
        return None, steps, locks
    finally:
        sys.setprofile(None)

run(-1, None)
right, steps, locks = run(-2, None)
assert right
points = [(False, draw.randint(1, steps)) for _ in range(tries)] + [(True, n + 1) for n in range(min(locks, tries))]
interrupted = 0
for number, point in enumerate(points):
    interrupted += run(number, point)[0] is None
    assert run(number, None)[0], point
print(interrupted, len(points))
"""


@pytest.mark.parametrize("tries", [60, pytest.param(1000, marks=[pytest.mark.long])])
def test_a_run_after_an_interrupted_one_works(tries: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(tries)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    interrupted, points = map(int, done.stdout.split())
    assert interrupted > points * 0.8
