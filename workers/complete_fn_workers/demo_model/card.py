"""`write_card` fills the model card `card.md` with measured scores."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

TEMPLATE = Path(__file__).with_name("card.md")


def write_card(folder: Path, scores: Mapping[str, float], snapshot: str, packages: int) -> None:
    """Write README.md and scores.json beside the checkpoint."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="np") as file:
        parameters = sum(math.prod(file.get_slice(k).get_shape()) for k in file.keys())  # noqa: SIM118
    text = TEMPLATE.read_text().format(parameters=parameters, snapshot=snapshot, packages=packages, **scores)
    (folder / "README.md").write_text(text)
    (folder / "scores.json").write_text(json.dumps(dict(scores), indent=2) + "\n")
