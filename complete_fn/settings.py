"""Where state lives and what the environment says: the only module that reads `os.environ`.

COMPLETE_FN_HOME     folder of answers, ledger and engine sockets (default: the platform's user data folder)
COMPLETE_FN_MODELS   a TOML file that adds to or overrides the catalogue (default: models.toml in the config folder)
COMPLETE_FN_MEMORY   GiB that the embedded engine may take for its KV cache (default: a tenth of RAM, 1 to 8)
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import platformdirs

APP = "complete-fn"


@dataclass(frozen=True, slots=True)
class Settings:
    home: Path
    models_file: Path | None
    kv_cache_gib: float | None


def load_settings() -> Settings:
    home = os.environ.get("COMPLETE_FN_HOME")
    models = os.environ.get("COMPLETE_FN_MODELS")
    memory = os.environ.get("COMPLETE_FN_MEMORY")
    default_models = Path(platformdirs.user_config_dir(APP)) / "models.toml"
    return Settings(
        home=Path(home) if home else Path(platformdirs.user_data_dir(APP, appauthor=False)),
        models_file=Path(models) if models else default_models if default_models.exists() else None,
        kv_cache_gib=float(memory) if memory else None,
    )


def secret(name: str) -> str | None:
    """A key by the name of its environment variable; its value is never stored or logged."""
    return os.environ.get(name)


def child_environment(extra: dict[str, str]) -> dict[str, str]:
    """This process's environment with `extra` on top, for an engine process that is about to be started."""
    return {**os.environ, **extra}
