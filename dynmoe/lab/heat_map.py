"""Heat maps of tables, as pictures for TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynmoe.lab.figures import as_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NUMBERS = 36
"""Cells up to which a heat map shows their values."""
MOST_TICKS = 10
"""Labels along each side of a heat map; of more, every second or third is shown."""


def heat_map(table: Tensor, rows: Sequence[str], columns: Sequence[str], title: str) -> Tensor:
    """A picture of a table for TensorBoard's `add_image`: uint8 [3, H, W]. Drawn by matplotlib.

    Up to 36 cells show their value; cells that are nan stay white. Colours go from 0, or the
    least value if that is below, to the largest.

    Args:
        table: [R, C]. rows: R names. columns: C names.
        title: stands above.
    """
    from matplotlib.figure import Figure

    values = table.detach().double().cpu()
    known = values[values.isfinite()]
    low, high = (min(0.0, float(known.min())), float(known.max())) if len(known) else (0.0, 1.0)
    high = high if high > low else low + 1.0
    numbers = values.numel() <= MOST_NUMBERS
    figure = Figure()
    axes = _place(figure, rows, columns, title, 0.42 if numbers else 0.2)
    image = axes.imshow(values.numpy(), cmap="viridis", vmin=low, vmax=high, aspect="auto")
    for axis, names in ((axes.yaxis, rows), (axes.xaxis, columns)):
        step = -(-len(names) // MOST_TICKS)
        axis.set_ticks(range(0, len(names), step), list(names)[::step], fontsize=8)
    if numbers:
        middle = (low + high) / 2
        for (i, j), value in zip(values.isfinite().nonzero().tolist(), known.tolist(), strict=True):
            color = "white" if value < middle else "black"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    else:
        figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05)
    return torch.from_numpy(as_image(figure)).permute(2, 0, 1)


def _place(
    figure: Figure, rows: Sequence[str], columns: Sequence[str], title: str, cell: float
) -> Axes:
    """Axes with cells of `cell` inches, and room for the names; long column names stand upright.

    By hand: matplotlib's own layout takes longer than the drawing.
    """
    letter = 0.075  # inches
    longest = max(map(len, columns), default=0)
    upright = longest > (5 if cell > 0.3 else 2)
    left = 0.3 + letter * max(map(len, rows), default=0)
    bottom = 0.25 + (letter * longest if upright else 0.1)
    wide = min(max(cell * len(columns), letter * len(title)), 14.0)
    high = min(cell * len(rows), 10.0)
    width, height = left + wide + 0.3, bottom + high + 0.4
    figure.set_size_inches(width, height)
    axes = figure.add_axes((left / width, bottom / height, wide / width, high / height))
    axes.set_title(title, fontsize=9)
    axes.tick_params(axis="x", rotation=90 if upright else 0)
    return axes
