"""deploy/: valid compose file and Dockerfiles, and nothing in them that the package does not have."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from complete_fn import settings
from complete_fn.registry import VERBS

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "deploy" / "compose.yaml"
DOCKERFILES = sorted((ROOT / "deploy").glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def linted(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_compose_file_keeps_to_the_compose_specification() -> None:
    linted(sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_has_no_warning(path: Path) -> None:
    linted(str(Path(sys.executable).with_name("hadolint")), "--failure-threshold", "warning", str(path))


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_nginx_takes_the_proxy_s_configuration(tmp_path: Path) -> None:
    text = (ROOT / "deploy" / "nginx.conf").read_text()
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = ["-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-keyout", str(key), "-out", str(certificate)]
    linted("openssl", "req", "-x509", *made)
    for path in re.findall(r"ssl_certificate(?:_key)? (\S+);", text):
        text = text.replace(path, str(key if path.endswith(".key") else certificate))
    kept = "".join(f"{kind}_temp_path {tmp_path};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    text = text.replace("http {", f"http {{ access_log off; {kept}")  # a distribution's own folders need not be there
    (tmp_path / "nginx.conf").write_text(f"pid {tmp_path}/nginx.pid;\n{text}")
    linted("nginx", "-t", "-p", str(tmp_path), "-e", "stderr", "-c", str(tmp_path / "nginx.conf"))


def test_every_setting_that_the_compose_file_gives_is_one() -> None:
    given = set(re.findall(r"^    (COMPLETE_FN_\w+):", COMPOSE.read_text(), re.M))
    assert given
    assert given <= set(re.findall(r"COMPLETE_FN_\w+", settings.__doc__ or ""))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_installs_extras_and_runs_a_verb_that_exist(path: Path) -> None:
    text = path.read_text()
    for extras in re.findall(r"'\.\[([\w,]+)\]'", text):
        assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    (verb,) = re.findall(r'^CMD \["([\w-]+)"', text, re.M)
    assert verb in VERBS


def test_the_cuda_image_has_the_vllm_that_we_build_on() -> None:
    (version,) = re.findall(
        r"^FROM vllm/vllm-openai:v(\S+)$", (ROOT / "deploy/worker-cuda.Dockerfile").read_text(), re.M
    )
    assert PROJECT["optional-dependencies"]["worker"] == [f"vllm=={version}"]


def sent(name: str) -> bool:
    """Whether a file is in the context of a build: the last pattern counts that takes it or a folder it is in."""
    found = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = re.escape(line.removeprefix("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if line and not line.startswith("#") and re.fullmatch(f"{pattern}(/.*)?", name):
            found = line.startswith("!")
    return found


def test_an_image_gets_what_the_wheel_is_built_from_and_nothing_else() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = tuple(f"{name}/" for name in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    alone = {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]}
    assert {name for name in tracked if sent(name)} == {n for n in tracked if n.startswith(packages) or n in alone}


@pytest.mark.parametrize(
    "name",
    [
        ".cache/service/postgres/password",
        ".cache/service/home/internal.secret",
        ".git/config",
        ".venv/bin/python",
        ".model/model.safetensors",
        ".env",
        "deploy/.env",
        "complete_fn/server/__pycache__/app.cpython-311.pyc",
    ],
)
def test_no_image_gets_state_or_secrets(name: str) -> None:
    assert not sent(name)
