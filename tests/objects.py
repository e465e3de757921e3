"""An S3-compatible server of the tests' own, on a port of its own, with credentials in the environment only."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from deploy.servers import free_port

SETTINGS = {
    "AWS_ACCESS_KEY_ID": "test-key",
    "AWS_SECRET_ACCESS_KEY": "test-secret-of-nobody",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextmanager
def object_server(bucket: str) -> Iterator[str]:
    """Gives s3://bucket; the environment names the server meanwhile."""
    import fsspec
    import s3fs

    # A process of its own: vLLM looks through all modules that are loaded, and Flask's proxies do not bear it.
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    before = dict(os.environ)
    os.environ.update(SETTINGS, AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")
    try:
        wait_for(port)
        s3fs.S3FileSystem.clear_instance_cache()
        fsspec.filesystem("s3").mkdir(bucket)
        yield f"s3://{bucket}"
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.terminate()
        server.wait(30)
        os.environ.clear()
        os.environ.update(before)


def wait_for(port: int, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            httpx.get(f"http://127.0.0.1:{port}/", timeout=5)
            return
        except httpx.TransportError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
