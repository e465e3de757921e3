"""`draw_curves` draws loss curves as a PNG with Pillow, because one picture needs no plotting library."""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image, ImageDraw

WIDTH, HEIGHT, MARGIN = 900, 480, 60
COLOURS = ("#1f6feb", "#d1461f", "#2e8b57")

Curve = list[tuple[float, float]]


def smoothed(curve: Curve, weight: float = 0.95) -> Curve:
    out, level = [], curve[0][1]
    for i, (x, y) in enumerate(curve):
        share = min(weight, i / (i + 1))
        level = share * level + (1 - share) * y
        out.append((x, level))
    return out


def draw_curves(curves: dict[str, Curve], path: Path, x_label: str) -> None:
    """Write `curves` (name -> points, y above 0, drawn smoothed on a logarithmic axis) to `path` as PNG."""
    lines = {name: smoothed(curve) for name, curve in curves.items() if curve}
    points = [point for line in lines.values() for point in line if point[1] > 0]
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    if points:
        right = max(x for x, _ in points) or 1.0
        low, high = (math.log10(f(y for _, y in points)) for f in (min, max))
        low, high = low - 0.05, high + 0.05

        def at(x: float, y: float) -> tuple[float, float]:
            share = (math.log10(y) - low) / (high - low)
            return MARGIN + x / right * (WIDTH - 2 * MARGIN), HEIGHT - MARGIN - share * (HEIGHT - 2 * MARGIN)

        for step in range(6):
            y = 10 ** (low + (high - low) * step / 5)
            pen.line((at(0, y), at(right, y)), fill="#dddddd")
            pen.text((4, at(0, y)[1] - 6), f"{y:.3g}", fill="black")
            x = right * step / 5
            pen.text((at(x, y)[0] - 10, HEIGHT - MARGIN + 8), f"{x:.3g}", fill="black")
        for colour, (name, line) in zip(COLOURS, lines.items(), strict=False):
            pen.line([at(x, y) for x, y in line if y > 0], fill=colour, width=2)
            pen.text((WIDTH - 200, MARGIN + 16 * list(lines).index(name) - 40), name, fill=colour)
    pen.text((WIDTH / 2 - 30, HEIGHT - 24), x_label, fill="black")
    image.save(path)
