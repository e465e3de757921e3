"""`make service`: API, worker processes, Redis and PostgreSQL on this machine, without containers.

State stays in the folder given (default .cache/service) and is there again at the next start. COMPLETE_FN_DATABASE or
COMPLETE_FN_BROKER in the environment take the place of the server started here.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from complete_fn.ports import parse_port
from deploy.servers import Postgres, Redis, kept

READY_SECONDS = 120
TRY = """
The service is up: {url}  (API: {url}/docs, figures: {url}/metrics). No engine runs until there is work.

  # The first chat wakes a worker: 503 with Retry-After until its engine is there, which curl heeds.
  curl -s --retry 20 {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{{"model": "demo-llama-swiftkv",
    "messages": [{{"role": "user", "content": "Name the section: A library for reading ZIP files."}}]}}'

  export COMPLETE_FN_URL={url}
  .venv/bin/complete-fn jobs submit sql/examples/packages.parquet -m demo-llama-swiftkv \\
      -p 'Name the section: {{description}}' -o /tmp/sections.parquet
  curl -s {url}/v1/usage

State is in {folder}. Ctrl-C ends it all.
"""


def ready(url: str, service: subprocess.Popen[bytes]) -> bool:
    """Wait until the API accepts work. False: it ended before."""
    until = time.monotonic() + READY_SECONDS
    while service.poll() is None and time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=2):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    return False


def end(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=parse_port, default=8000)
    parser.add_argument("--workers", default="0..1", help="worker processes: at least..at most (default: 0..1)")
    parser.add_argument("--folder", type=Path, default=Path(".cache/service"), help="where the state is kept")
    a = parser.parse_args()
    signal.signal(signal.SIGTERM, end)
    folder = a.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "COMPLETE_FN_HOME": str(folder / "home")}
    command = [str(Path(sys.executable).with_name("complete-fn")), "serve", "--port", str(a.port)]
    with ExitStack() as stack:
        if "COMPLETE_FN_DATABASE" not in environment:
            environment["COMPLETE_FN_DATABASE"] = stack.enter_context(kept(Postgres, folder / "postgres")).url
        if "COMPLETE_FN_BROKER" not in environment:
            environment["COMPLETE_FN_BROKER"] = stack.enter_context(kept(Redis, folder / "redis")).url
        service = subprocess.Popen([*command, "--workers", a.workers], env=environment)
        try:
            url = f"http://127.0.0.1:{a.port}"
            if ready(url, service):
                print(TRY.format(url=url, folder=folder), flush=True)
            return service.wait()
        except KeyboardInterrupt:
            service.send_signal(signal.SIGTERM)
            return service.wait(60)


if __name__ == "__main__":
    sys.exit(main())
