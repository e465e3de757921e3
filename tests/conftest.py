"""Fixtures for all tests: a tiny random Llama on disk, and one embedded engine that serves it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from complete_fn.cli import main as cli
from complete_fn.engines.catalogue import Model
from complete_fn.settings import Settings
from deploy.servers import Postgres, Redis, running

CONTEXT, VOCABULARY, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD, MIDDLE = 1024, 600, 64, 2, 2, 1, 32, 128
TEXT = [
    "Name the section of the package and write a one-line synopsis that a person would accept.",
    "The quick brown fox jumps over the lazy dog while the package manager installs a text editor.",
    "An instruction that many rows share is cached once, and the rows differ only in what comes after it.",
]


def write_tiny_llama(folder: Path, seed: int = 0) -> Path:
    """A Llama with random float32 weights and a byte-level BPE tokenizer: its answers mean nothing, but are exact."""
    import numpy as np
    from safetensors.numpy import save_file

    from complete_fn_workers.demo_model.tokenizer import save_tokenizer, train_tokenizer

    tokenizer = train_tokenizer(TEXT * 3, VOCABULARY)
    save_tokenizer(tokenizer, folder, CONTEXT)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": MIDDLE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": tokenizer.token_to_id("<|begin_of_text|>"),
        "eos_token_id": tokenizer.token_to_id("<|eot_id|>"),
    }
    (folder / "config.json").write_text(json.dumps(config))
    # What a checkpoint recommends must never reach our requests.
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 1.7, "top_k": 3, "max_new_tokens": 5}))
    draw = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "self_attn.q_proj.weight"] = (HEADS * HEAD, HIDDEN)
        shapes[prefix + "self_attn.k_proj.weight"] = (KV_HEADS * HEAD, HIDDEN)
        shapes[prefix + "self_attn.v_proj.weight"] = (KV_HEADS * HEAD, HIDDEN)
        shapes[prefix + "self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD)
        shapes[prefix + "mlp.gate_proj.weight"] = shapes[prefix + "mlp.up_proj.weight"] = (MIDDLE, HIDDEN)
        shapes[prefix + "mlp.down_proj.weight"] = (HIDDEN, MIDDLE)
    weights = {name: (draw.standard_normal(shape) * 0.3).astype(np.float32) for name, shape in shapes.items()}
    norms = [
        f"model.layers.{n}.{which}_layernorm.weight" for n in range(LAYERS) for which in ("input", "post_attention")
    ]
    weights |= {name: np.ones(HIDDEN, np.float32) for name in [*norms, "model.norm.weight"]}
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """For `-n 2 --dist loadgroup`: one process runs a whole file, and one runs all tests that share an engine."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        has_engine = item.get_closest_marker("engine") is not None or "needs_vllm" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("engine" if has_engine else str(item.path)))


@pytest.fixture(scope="session")
def make_tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Call it for another tiny Llama: `make_tiny_model(seed=1)`."""
    return lambda seed=0: write_tiny_llama(tmp_path_factory.mktemp("tiny-llama"), seed)


@pytest.fixture(scope="session")
def tiny_model(make_tiny_model: Callable[..., Path]) -> Path:
    """Folder of a tiny random Llama: 2 layers, context 1,024, vocabulary 600, float32."""
    return make_tiny_model()


@pytest.fixture(scope="session")
def tiny_entry(tiny_model: Path) -> Model:
    """The tiny Llama as a catalogue entry."""
    arguments: dict[str, Any] = {"max_num_seqs": 16, "max_num_batched_tokens": 1024}
    return Model("tiny", str(tiny_model), default_max_tokens=24, engine_args=arguments)


@pytest.fixture
def open_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[..., int]]:
    """Makes a `complete-fn` of the test's own: its catalogue, folder and state, windows of so many rows."""

    def opened(models: str, window: int | None = None) -> Callable[..., int]:
        (tmp_path / "models.toml").write_text(models)
        monkeypatch.setenv("COMPLETE_FN_MODELS", str(tmp_path / "models.toml"))
        monkeypatch.setenv("COMPLETE_FN_HOME", str(tmp_path / "home"))
        if window is not None:
            monkeypatch.setattr("complete_fn.rows.readers.WINDOW_ROWS", window)
        monkeypatch.chdir(tmp_path)
        return lambda *given: cli.main([str(g) for g in given])

    return opened


@pytest.fixture(scope="session")
def needs_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("the embedded engine is not installed: complete-fn setup-engine")


@pytest.fixture(scope="session")
def engine(needs_vllm: None, tiny_entry: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The embedded engine with the tiny Llama, one for the whole session. Tests that kill it start their own."""
    from complete_fn_workers.engine.client import open_engine

    opened = open_engine(tiny_entry, Settings(tmp_path_factory.mktemp("home"), None, None))
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def engine_home(needs_vllm: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder for tests that ask catalogue models by name; their engines are shared by the whole session."""
    return tmp_path_factory.mktemp("engine-home")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL of the session's own. Whoever restarts it takes `servers.running(Postgres)` instead."""
    with running(Postgres) as server:
        yield server


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Redis]:
    """A Redis of the session's own. Whoever restarts it takes `servers.running(Redis)` instead."""
    with running(Redis) as server:
        yield server


@pytest.fixture
def postgres_url(postgres: Postgres) -> Iterator[str]:
    """URL of a new, empty database."""
    with postgres.database() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a new store may be: a contract test runs once on each kind."""
    if request.param == "sqlite":
        return str(tmp_path / "home" / "state.sqlite3")
    return str(request.getfixturevalue("postgres_url"))
