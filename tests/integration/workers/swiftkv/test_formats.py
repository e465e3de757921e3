"""Checkpoints as Snowflake publishes them and as we write them are loaded into the right places."""

from __future__ import annotations

# ruff: noqa: E402 - the environment comes first
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from safetensors.torch import load_file, save_file

from complete_fn_workers.swiftkv.checkpoint import load_model, write_tensors
from complete_fn_workers.swiftkv.reference import Llama, SwiftKV
from complete_fn_workers.swiftkv.training.exact import agreement, ask, random_prompts, serve
from tests.random_checkpoints import TINY, random_model, write_checkpoint

pytestmark = pytest.mark.engine

PROMPTS = random_prompts((1, 33, 300), TINY.vocab_size, seed=7)
SMALL: dict[str, Any] = {"num_gpu_blocks_override": 40, "max_model_len": 512, "max_num_batched_tokens": 128}
Tensors = dict[str, Any]


def assert_served_exactly(folder: Path) -> None:
    found = agreement(load_model(folder), PROMPTS, ask(serve(folder, **SMALL), PROMPTS))
    assert found.exact, found


@pytest.mark.parametrize("keep_teacher", [True, False], ids=["published", "ours"])
def test_with_and_without_the_teachers_unused_projections(tmp_path: Path, keep_teacher: bool) -> None:
    folder = write_checkpoint(random_model(TINY, SwiftKV(4, 2)), tmp_path / "m", keep_teacher)
    stored = load_file(folder / "model.safetensors")
    assert ("model.layers.5.self_attn.q_proj.weight" in stored) == keep_teacher
    assert "model.layers.4.self_attn.k_proj_swiftkv.weight" in stored
    assert "model.layers.5.self_attn.k_proj_swiftkv.weight" not in stored
    assert_served_exactly(folder)


def fuse(tensors: Tensors, parts: tuple[str, ...], whole: str) -> Tensors:
    """Join the named projections of each layer, as some tools store them."""
    out = dict(tensors)
    for name in tensors:
        if f".{parts[0]}." in name and all(name.replace(parts[0], part) in out for part in parts):
            names = [name.replace(parts[0], part) for part in parts]
            out[name.replace(parts[0], whole)] = torch.cat([out.pop(n) for n in names])
    return out


def test_fused_projections_in_shards(tmp_path: Path) -> None:
    model = random_model(TINY, SwiftKV(4, 2))
    separate = write_checkpoint(model, tmp_path / "m") / "model.safetensors"
    tensors = load_file(separate)
    tensors = fuse(tensors, ("q_proj", "k_proj", "v_proj"), "qkv_proj")
    tensors = fuse(tensors, ("k_proj_swiftkv", "v_proj_swiftkv"), "kv_proj_swiftkv")
    tensors = fuse(tensors, ("gate_proj", "up_proj"), "gate_up_proj")
    separate.unlink()
    write_tensors(tensors.items(), tmp_path / "m", shard_bytes=300_000)
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 3
    found = agreement(model, PROMPTS, ask(serve(tmp_path / "m", **SMALL), PROMPTS))
    assert found.exact, found


def test_tied_embeddings(tmp_path: Path) -> None:
    model = random_model(TINY, SwiftKV(4))
    model.lm_head = None
    folder = write_checkpoint(model, tmp_path / "m")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert_served_exactly(folder)


def test_llama_3_positions(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = random_model(TINY, SwiftKV(4))
    folder = write_checkpoint(model, tmp_path / "m", rope_theta=500_000.0, rope_scaling=rope)
    assert_served_exactly(folder)
    plain = agreement(model, PROMPTS, ask(serve(folder, **SMALL), PROMPTS))
    assert plain.worst > 0.1, "the scaling made no difference"


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(random_model(TINY, SwiftKV(4)), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm_swiftkv.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="norm_swiftkv"):
        serve(folder, **SMALL)


FP8 = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "float",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}


def to_fp8(folder: Path) -> Path:
    """Quantise a checkpoint's linear layers per output channel, as compressed-tensors stores them."""
    tensors: Tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "_proj" not in name:
            tensors[name] = weight
            continue
        scale = weight.float().abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
        tensors[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
        tensors[name.replace(".weight", ".weight_scale")] = scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": FP8}))
    return folder


def test_fp8_weights_with_the_last_layer_skipped_are_plain_fp8_llama(tmp_path: Path) -> None:
    plain = random_model(TINY, None, seed=3)
    student = Llama(TINY, SwiftKV(TINY.num_hidden_layers - 1), tied=False)
    student.load_state_dict(plain.state_dict(), strict=False)
    student.initialise_student()
    answers = []
    for name, model in (("plain", plain), ("student", student)):
        folder = to_fp8(write_checkpoint(model, tmp_path / name, dtype=torch.bfloat16))
        answers.append(ask(serve(folder, **SMALL, dtype="bfloat16"), PROMPTS, max_tokens=1))
    for one, other in zip(*answers, strict=True):
        first, second = one.outputs[0].logprobs[0], other.outputs[0].logprobs[0]
        shared = first.keys() & second.keys()
        assert len(shared) >= 4
        # bfloat16 rounds sums over 1 row and over 128 rows differently; a misplaced scale is off by whole units.
        assert max(abs(first[i].logprob - second[i].logprob) for i in shared) < 0.15
