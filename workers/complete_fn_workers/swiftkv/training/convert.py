"""`complete-fn swiftkv convert` writes a Llama checkpoint in SwiftKV form, with the published start."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from complete_fn.errors import InputError, InvalidOptionError
from complete_fn_workers.swiftkv.checkpoint import TensorFolder, carry_files, is_teachers, read_config, write_tensors
from complete_fn_workers.swiftkv.reference import SwiftKV, group_mean

CARD = """---
base_model: {parent}
{licence}tags: [swiftkv, complete-fn]
---

# {name}

`{parent}` in SwiftKV form (arXiv 2410.03960): layers {kept} to {last} of {layers} take keys and values from the hidden
state after layer {before}, so prompt tokens skip them. `key_value_group_size` is {group}.

Changed from the parent: config, the tensors `norm_swiftkv` and `*_proj_swiftkv` are new{dropped}. {state}
The parent's licence and notices are in this folder and bind this checkpoint too. Parent's own card: `PARENT_README.md`.
"""


def convert(parent: Path, out: Path, swiftkv: SwiftKV, keep_teacher: bool = True) -> None:
    """Write `parent` to the new folder `out` as a SwiftKV checkpoint, reading one tensor at a time.

    The start values: `norm_swiftkv` is the input norm of layer K, queries are the parent's, keys and values are the
    mean over each group. With K = layers - 1 and G = 1 the result computes exactly the parent's answers, and prompt
    tokens skip its last layer. `keep_teacher` keeps the parent's q/k/v of later layers, as published. Distilling needs
    them, serving does not.

    Raises:
        InputError: `parent` is no convertible Llama, its licence requires another name, or `out` is not empty.
        InvalidOptionError: K or G do not fit the parent.
    """
    config = read_config(parent)
    refuse_parent(parent, config)
    refuse_layers(swiftkv, config["num_hidden_layers"])
    refuse_name(out.name, licence_of(parent))
    with new_folder(out) as folder:
        write_tensors(converted(TensorFolder(parent), config["num_hidden_layers"], swiftkv, keep_teacher), folder)
        state = "Not distilled: its answers are the parent's only where nothing but the last layer is skipped."
        describe(parent, folder, out.name, config, swiftkv, keep_teacher, state)


def refuse_parent(parent: Path, config: dict[str, Any]) -> None:
    if config["model_type"] != "llama":
        raise InputError(f"'{parent}' is in SwiftKV form already.")
    if "quantization_config" in config:
        raise InputError(f"'{parent}' is quantised. Convert its full-precision parent, then quantise the result.")


def refuse_layers(swiftkv: SwiftKV, layers: int) -> None:
    kept, group = swiftkv.num_key_value_layers, swiftkv.key_value_group_size
    if not 1 <= kept < layers:
        raise InvalidOptionError(
            f"num_key_value_layers is {kept}; the model has {layers} layers: use 1 to {layers - 1}."
        )
    if group < 1 or (layers - kept) % group:
        raise InvalidOptionError(f"key_value_group_size is {group}; it must divide the {layers - kept} later layers.")


def converted(
    tensors: TensorFolder, layers: int, swiftkv: SwiftKV, keep_teacher: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    for name in tensors.names():
        if keep_teacher or not is_teachers(name, swiftkv):
            yield name, tensors[name]
    kept, group = swiftkv.num_key_value_layers, swiftkv.key_value_group_size
    # Clones: two reads of one tensor share memory, which safetensors refuses to write.
    yield "model.norm_swiftkv.weight", tensors[f"model.layers.{kept}.input_layernorm.weight"].clone()
    for layer in range(kept, layers):
        at = f"model.layers.{layer}.self_attn"
        yield f"{at}.q_proj_swiftkv.weight", tensors[f"{at}.q_proj.weight"].clone()
        if not swiftkv.is_owner(layer):
            continue
        for kind in ("k_proj", "v_proj"):
            members = (f"model.layers.{member}.self_attn.{kind}.weight" for member in range(layer, layer + group))
            yield f"{at}.{kind}_swiftkv.weight", group_mean(tensors[name].clone() for name in members)


def write_student(
    parent: Path, out: Path, swiftkv: SwiftKV, trained: Mapping[str, torch.Tensor], keep_teacher: bool
) -> None:
    """Write the folder `out`: the parent's tensors, and the `trained` ones (by reference names) in the parent's dtype.

    Raises:
        InputError: The parent's licence requires another name than that of `out`.
    """
    refuse_name(out.name, licence_of(parent))
    config, tensors = read_config(parent), TensorFolder(parent)
    dtype = tensors["model.norm.weight"].dtype

    def all_tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in tensors.names():
            if "_swiftkv" not in name and (keep_teacher or not is_teachers(name, swiftkv)):
                yield name, tensors[name]
        for name, tensor in trained.items():
            yield f"model.{name}", tensor.detach().to("cpu", dtype)

    with new_folder(out) as folder:
        write_tensors(all_tensors(), folder)
        state = "Distilled: see `distill.json` for the recipe and the figures on held-out rows."
        describe(parent, folder, out.name, config, swiftkv, keep_teacher, state)


class new_folder:
    """`with new_folder(out) as folder`: fill `folder`. It becomes `out` only if the block ends without an error."""

    def __init__(self, out: Path) -> None:
        if out.exists() and any(out.iterdir()):
            raise InputError(f"'{out}' is not empty. Name a new folder, or remove it first.")
        self.out, self.partial = out, out.with_name(out.name + ".partial")

    def __enter__(self) -> Path:
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        return self.partial

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
            return
        if self.out.exists():
            self.out.rmdir()
        self.partial.replace(self.out)


def describe(
    parent: Path,
    folder: Path,
    name: str,
    config: dict[str, Any],
    swiftkv: SwiftKV,
    keep_teacher: bool,
    state: str,
) -> None:
    """Write config and card, and copy the parent's other files."""
    carry_files(parent, folder)
    licence = licence_of(folder)
    card, base = folder / "README.md", base_of(folder)
    if card.is_file() and not (folder / "PARENT_README.md").exists():
        card.replace(folder / "PARENT_README.md")
    layers, kept = config["num_hidden_layers"], swiftkv.num_key_value_layers
    text = CARD.format(
        parent=base or parent.name,
        licence=f"license: {licence}\n" if licence else "",
        name=name,
        kept=kept,
        before=kept - 1,
        last=layers - 1,
        layers=layers,
        group=swiftkv.key_value_group_size,
        dropped="" if keep_teacher else ", later layers' q/k/v are left out",
        state=state,
    )
    card.write_text(text)
    changed = {
        "architectures": ["LlamaSwiftKVForCausalLM"],
        "model_type": "llama_swiftkv",
        "swiftkv": True,
        "num_key_value_layers": kept,
        "key_value_group_size": swiftkv.key_value_group_size,
    }
    (folder / "config.json").write_text(json.dumps(config | changed, indent=2) + "\n")


def base_of(folder: Path) -> str | None:
    """The parent that a copied card of ours names, else None: a conversion's student has the conversion's parent."""
    card = folder / "README.md"
    found = re.search(r"^base_model:\s*(\S+)", card.read_text(errors="replace"), re.M) if card.is_file() else None
    return found[1] if found and (folder / "PARENT_README.md").exists() else None


def licence_of(folder: Path) -> str | None:
    """The Hub's licence name from the parent's card, or `llama` if the folder has the text of a Llama licence."""
    for card in (folder / "PARENT_README.md", folder / "README.md"):
        found = re.search(r"^license:\s*(\S+)", card.read_text(errors="replace"), re.M) if card.is_file() else None
        if found:
            return found[1]
    for text in folder.glob("LICENSE*"):
        if re.search(r"llama [\d.]+ community license", text.read_text(errors="replace"), re.I):
            return "llama"
    return None


def refuse_name(name: str, licence: str | None) -> None:
    """Refuse a name that the parent's licence forbids. Call this before the work, which may take hours."""
    if licence and licence.startswith("llama") and not name.lower().startswith("llama"):
        raise InputError(
            f"The parent's licence ({licence}) asks that names of derived models begin with 'Llama'. Name the folder "
            f"'Llama-{name}' or alike."
        )
