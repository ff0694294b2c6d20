"""How far Adam moves freshly drawn units in their first steps, for both settings of `moments`.

    python -m benchmarks.growth_moments

Trains a small MoE network on random labels, grows it, and prints the mean |update| of the fresh
units' incoming weights at each of the next steps, in learning rates, beside that of units that were
kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

from dynmoe.growth import GrowthController
from dynmoe.growth.optimizer_state import Moments
from dynmoe.growth.pruning import UtilityUnits
from dynmoe.moe import MoELayer

LR, STEPS, SHOWN = 1e-3, 500, (1, 2, 3, 5, 10, 20, 50)


def updates(moments: Moments) -> tuple[list[float], list[float]]:
    """Mean |update| / lr of fresh and of kept units at the steps SHOWN after a growth 2 -> 4."""
    torch.manual_seed(0)
    first, later = (torch.Generator().manual_seed(0) for _ in range(2))
    layer = MoELayer(64, 64, 256, num_experts=2, max_experts=4, generator=first)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), layer, nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    images, labels = torch.randn(512, 32), torch.randint(10, (512,))

    def step() -> torch.Tensor:
        before, part = layer.bank.w_in.detach().clone(), torch.randint(512, (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[part]), labels[part]).backward()
        optimizer.step()
        return (layer.bank.w_in.detach() - before).abs().mean(dim=1) / LR

    for _ in range(STEPS):
        step()
    controller = GrowthController(
        model,
        optimizer,
        granularity=2,
        moments=moments,
        pruning=UtilityUnits.Config(),
        generator=later,
    )
    controller.grow(STEPS, (images, None))
    fresh = layer.bank.segment >= 2
    sizes = [step() for _ in range(max(SHOWN))]
    return (
        [float(sizes[i - 1][fresh].mean()) for i in SHOWN],
        [float(sizes[i - 1][~fresh].mean()) for i in SHOWN],
    )


def main() -> None:
    """Print a row per setting."""
    table = Table(title="mean |update| in learning rates, by step after a growth")
    for column in ("moments", "units", *map(str, SHOWN)):
        table.add_column(column)
    for moments in ("zero", "mean"):
        for units, values in zip(("fresh", "kept"), updates(moments), strict=True):
            table.add_row(moments, units, *(f"{value:.2f}" for value in values))
    Console().print(table)


if __name__ == "__main__":
    main()
