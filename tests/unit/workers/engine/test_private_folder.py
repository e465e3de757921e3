"""The folder of an engine's socket is this user's alone, and a link in its place harms nothing behind it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from complete_fn.errors import EngineError
from complete_fn_workers.engine.launch import private_folder


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_folder_becomes_this_users_alone(tmp_path: Path) -> None:
    new, open_to_all = tmp_path / "a" / "b", tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o755)
    for folder in (new, open_to_all):
        private_folder(folder)
        assert mode(folder) == 0o700


def test_what_is_behind_a_link_of_ones_own_keeps_its_mode(tmp_path: Path) -> None:
    behind = tmp_path / "shared"
    behind.mkdir()
    behind.chmod(0o755)
    (tmp_path / "link").symlink_to(behind)
    private_folder(tmp_path / "link")
    assert mode(behind) == 0o755


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a link to another user")
def test_a_link_of_another_user_is_refused(tmp_path: Path) -> None:
    behind = tmp_path / "mine"
    behind.mkdir()
    behind.chmod(0o755)
    link = tmp_path / "link"
    link.symlink_to(behind)
    os.chown(link, 65534, 65534, follow_symlinks=False)
    with pytest.raises(EngineError, match="belongs to another user"):
        private_folder(link)
    assert mode(behind) == 0o755
