"""Heat maps for TensorBoard, drawn by Pillow: matplotlib takes 80 ms for one, this a few."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

MOST_NUMBERS = 36
"""Cells up to which a heat map shows their values."""
MOST_TICKS = 10
"""Labels along each side of a heat map; of more, every second or third is shown."""
LETTER = 7
"""pixels that a letter of the labels is wide, about"""
LINE = 16
"""pixels of a line of text"""
BAR = 90
"""pixels to the right of a map whose cells show no values: the scale of its colours"""


def heat_map(table: Tensor, rows: Sequence[str], columns: Sequence[str], title: str) -> Tensor:
    """A picture of a table for TensorBoard's `add_image`: uint8 [3, H, W].

    Up to 36 cells show their value, larger tables have a scale beside them; cells that are nan stay
    white. Colours go from 0, or the least value if that is below, to the largest.

    Args:
        table: [R, C]. rows: R names. columns: C names.
        title: stands above.
    """
    from PIL import Image, ImageDraw

    values = table.detach().double().cpu().numpy()
    known = values[np.isfinite(values)]
    low, high = (min(0.0, float(known.min())), float(known.max())) if len(known) else (0.0, 1.0)
    high = high if high > low else low + 1.0
    numbers = values.size <= MOST_NUMBERS
    cell = 42 if numbers else 20
    upright = max(map(len, columns), default=0) > (5 if numbers else 2)
    wide = max(1, min(cell * len(columns), 1400) // len(columns)) * len(columns)
    tall = max(1, min(cell * len(rows), 1000) // len(rows)) * len(rows)
    left = 14 + LETTER * max(map(len, rows), default=0)
    top = LINE + 10
    below = LETTER * max(map(len, columns)) + 12 if upright else LINE + 10
    width = left + max(wide, LETTER * len(title)) + (20 if numbers else BAR)
    image = Image.new("RGB", (width, max(top + tall + below, 101)), "white")
    cells = Image.fromarray(_colours(values, low, high))
    image.paste(cells.resize((wide, tall), Image.Resampling.NEAREST), (left, top))
    draw = ImageDraw.Draw(image)
    draw.text((left + wide // 2, 5), title, "black", _font(12), anchor="ma")
    box = (left, top, wide // len(columns), tall // len(rows))
    _label(image, draw, rows, columns, box, upright)
    if numbers:
        _write_numbers(draw, values, (low + high) / 2, box)
    else:
        _draw_scale(image, draw, low, high, (left + wide + 16, top, tall))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _colours(values: NDArray[np.float64], low: float, high: float) -> NDArray[np.uint8]:
    """Viridis of values [R, C], as uint8 [R, C, 3]; white where they are not finite."""
    known = np.isfinite(values)
    place = np.clip((np.where(known, values, low) - low) / (high - low) * 256, 0, 255).astype(int)
    colours = _viridis()[place]
    colours[~known] = 255
    return colours


def _label(
    image: Any,
    draw: ImageDraw,
    rows: Sequence[str],
    columns: Sequence[str],
    box: tuple[int, int, int, int],
    upright: bool,
) -> None:
    """Names of rows on the left and of columns below, of many every second or third.

    `box`: left and top of the map, width and height of a cell, pixels.
    """
    from PIL import Image, ImageDraw

    left, top, wide, tall = box
    for i in range(0, len(rows), -(-len(rows) // MOST_TICKS)):
        place = (left - 6, top + i * tall + tall // 2)
        draw.text(place, rows[i], "black", _font(11), anchor="rm")
    under = top + len(rows) * tall + 5
    for j in range(0, len(columns), -(-len(columns) // MOST_TICKS)):
        middle = left + j * wide + wide // 2
        if not upright:
            draw.text((middle, under), columns[j], "black", _font(11), anchor="ma")
            continue
        text = Image.new("RGB", (LETTER * len(columns[j]) + 6, LINE), "white")
        ImageDraw.Draw(text).text((text.width, 8), columns[j], "black", _font(11), anchor="rm")
        image.paste(text.rotate(90, expand=True), (middle - LINE // 2, under))


def _write_numbers(
    draw: ImageDraw, values: NDArray[np.float64], middle: float, box: tuple[int, int, int, int]
) -> None:
    """Each known value into its cell, white on dark."""
    left, top, wide, tall = box
    for i, j in zip(*np.isfinite(values).nonzero(), strict=True):
        color = "white" if values[i, j] < middle else "black"
        place = (left + j * wide + wide // 2, top + i * tall + tall // 2)
        draw.text(place, f"{values[i, j]:.2f}", color, _font(10), anchor="mm")


def _draw_scale(
    image: Any, draw: ImageDraw, low: float, high: float, place: tuple[int, int, int]
) -> None:
    """What the colours mean: a bar from the largest value down to the least.

    `place`: its left and top, and its height, pixels.
    """
    from PIL import Image

    left, top, tall = place
    strip = Image.fromarray(_viridis()[::-1, None].copy())
    image.paste(strip.resize((12, tall)), (left, top))
    for value, height in ((high, top), (low, top + tall)):
        draw.text((left + 16, height), f"{value:.3g}", "black", _font(11), anchor="lm")


@cache
def _viridis() -> NDArray[np.uint8]:
    """[256, 3] the colour map of that name."""
    from matplotlib import colormaps

    return colormaps["viridis"](np.arange(256), bytes=True)[:, :3]


@cache
def _font(size: int) -> Any:
    """The sans serif font that matplotlib brings along, in pixels."""
    from matplotlib import get_data_path
    from PIL import ImageFont

    return ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
