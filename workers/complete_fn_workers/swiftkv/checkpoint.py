"""Hugging Face checkpoint folders are read and written one tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from complete_fn.errors import InputError
from complete_fn_workers.swiftkv.reference import Llama, LlamaShape, RopeScaling, SwiftKV

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 * 2**30
NOT_CARRIED = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", INDEX, "*.index.json", "config.json", ".*")


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a Llama or SwiftKV-Llama checkpoint.

    Raises:
        InputError: The folder has no config.json, or a model of another family.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"'{folder}' is no checkpoint folder: it has no config.json.")
    config: dict[str, Any] = json.loads(path.read_text())
    family = config.get("model_type")
    if family not in ("llama", "llama_swiftkv"):
        raise InputError(f"'{folder}' holds a {family!r} model; SwiftKV is made from 'llama' checkpoints here.")
    for bias in ("attention_bias", "mlp_bias"):
        if config.get(bias):
            raise InputError(f"'{folder}' has {bias}: true; only Llamas without biases are supported.")
    return config


def refuse_quantised(folder: Path, config: dict[str, Any]) -> None:
    """Refuse quantised weights: without their scales the model would compute nonsense."""
    if (found := config.get("quantization_config")) is not None:
        kind = found.get("quant_method") if isinstance(found, dict) else found
        raise InputError(f"'{folder}' is quantised ({kind}), which is not read here. Name its full-precision parent.")


def shape_of(config: dict[str, Any]) -> LlamaShape:
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return LlamaShape(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        max_position_embeddings=config.get("max_position_embeddings", 2048),
    )


def swiftkv_of(config: dict[str, Any]) -> SwiftKV | None:
    if config["model_type"] != "llama_swiftkv":
        return None
    return SwiftKV(config["num_key_value_layers"], config.get("key_value_group_size", 1))


def scaling_of(config: dict[str, Any]) -> RopeScaling | None:
    """Llama 3's stretched positions, if the config has them.

    Raises:
        InputError: The config has another kind of RoPE scaling.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise InputError(f"RoPE scaling {kind!r} is not supported by the reference model; 'default' and 'llama3' are.")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return RopeScaling(**{name: rope[name] for name in names})


def refuse_as_teacher(folder: Path, option: str) -> None:
    """Refuse a SwiftKV folder: the engine answers with its student, even if the folder has kept the teacher."""
    path = folder / "config.json"
    if path.is_file() and json.loads(path.read_text()).get("model_type") == "llama_swiftkv":
        raise InputError(
            f"{option} '{folder}' is in SwiftKV form: the engine answers with its student. Name the plain Llama it was "
            "made from."
        )


class TensorFolder:
    """The tensors of a folder's safetensors files, by name. A tensor is read from disk when it is used."""

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise InputError(f"'{folder}' has no .safetensors file. Other formats are never loaded: convert it first.")
        opened: list[Any] = [safe_open(path, framework="pt") for path in files]
        self.home = {name: file for file in opened for name in file.keys()}  # noqa: SIM118

    def __contains__(self, name: str) -> bool:
        return name in self.home

    def names(self) -> list[str]:
        return list(self.home)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.home:
            raise InputError(f"The checkpoint has no tensor '{name}'.")
        tensor: torch.Tensor = self.home[name].get_tensor(name)
        return tensor


def write_tensors(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write one `model.safetensors`, or shards of at most `shard_bytes` with an index. Holds one shard in memory."""
    shards: list[tuple[Path, list[str]]] = []
    total = 0
    for number, shard in enumerate(in_shards(tensors, shard_bytes), 1):
        path = folder / f"shard-{number:05d}.partial"
        save_file(shard, path, metadata={"format": "pt"})
        shards.append((path, list(shard)))
        total += sum(t.numel() * t.element_size() for t in shard.values())
    if len(shards) == 1:
        shards[0][0].replace(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(shards, 1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path.replace(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def in_shards(tensors: Iterable[tuple[str, torch.Tensor]], limit: int) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        more = tensor.numel() * tensor.element_size()
        if shard and size + more > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.contiguous()
        size += more
    if shard:
        yield shard


def carry_files(parent: Path, folder: Path) -> list[str]:
    """Copy all files except weights and config: tokenizer, generation config, licence, notices. Returns their names."""
    carried = []
    for path in sorted(parent.iterdir()):
        if path.is_file() and not any(path.match(pattern) for pattern in NOT_CARRIED):
            shutil.copyfile(path, folder / path.name)
            carried.append(path.name)
    return carried


def load_model(folder: Path) -> Llama:
    """The reference model of a checkpoint, in float32.

    If a SwiftKV checkpoint lacks the teacher's projections, they become zeros, and `forward` must not be used.

    Raises:
        InputError: The folder is no checkpoint, or a quantised one.
    """
    config = read_config(folder)
    refuse_quantised(folder, config)
    stored = swiftkv_of(config)
    model = empty_model(config, stored)
    copy_tensors(model, TensorFolder(folder), lambda name: stored is None or not is_teachers(name, stored))
    return model


def load_pair(parent: Path, swiftkv: SwiftKV | None, student: Path | None = None) -> Llama:
    """Teacher and student in one float32 model. `parent` is a plain Llama, or a SwiftKV folder that kept its teacher.

    The student comes from:

    1. the folder `student`;
    2. else `parent`, if it is in SwiftKV form;
    3. else the published start, with `swiftkv`'s sizes.

    Raises:
        InputError: `parent` lacks the teacher's projections, no SwiftKV form is given, or a folder is quantised.
    """
    own = read_config(parent)
    form = read_config(student) if student else own
    refuse_quantised(parent, own)
    refuse_quantised(student or parent, form)
    stored = swiftkv_of(form)
    model = empty_model(own, stored or swiftkv)
    if model.swiftkv is None:
        raise InputError(f"'{student or parent}' is no SwiftKV checkpoint. Convert it: `complete-fn swiftkv convert`.")
    tensors = TensorFolder(parent)
    last = own["num_hidden_layers"] - 1
    if f"model.layers.{last}.self_attn.q_proj.weight" not in tensors:
        raise InputError(f"'{parent}' has no teacher: it was written without. Name its parent instead.")
    copy_tensors(model, tensors, lambda name: True, skip_student=stored is None or student is not None)
    if student is not None:
        copy_tensors(model, TensorFolder(student), lambda name: True, only_student=True)
    elif stored is None:
        model.initialise_student()
    return model


def empty_model(config: dict[str, Any], swiftkv: SwiftKV | None) -> Llama:
    return Llama(shape_of(config), swiftkv, bool(config.get("tie_word_embeddings", False)), scaling_of(config))


def copy_tensors(
    model: Llama,
    tensors: TensorFolder,
    needed: Callable[[str], bool],
    skip_student: bool = False,
    only_student: bool = False,
) -> None:
    """Copy the stored tensors into the model. A tensor that is not stored must not be `needed`, and becomes zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            of_student = "_swiftkv" in name
            if (of_student and skip_student) or (only_student and not of_student):
                continue
            stored = name if name.startswith("lm_head") else f"model.{name}"
            if stored not in tensors and not needed(name):
                parameter.zero_()
            else:
                parameter.copy_(tensors[stored])


def is_teachers(name: str, swiftkv: SwiftKV) -> bool:
    """Whether a tensor is a q, k or v projection of a later layer that only the teacher uses."""
    parts = name.removeprefix("model.").split(".")
    return (
        parts[0] == "layers"
        and int(parts[1]) >= swiftkv.num_key_value_layers
        and parts[-2] in ("q_proj", "k_proj", "v_proj")
    )
