"""Test-time adaptation: what a batch costs with each method, against plain inference and Tent.

    python -m benchmarks.tta [--model tiny] [--batch 8 64] [--threads 1] [--device cpu] [--rounds 7]

One table per batch size: milliseconds and images per second, ratios to plain inference and to Tent
in the same round (median over the rounds, variants in turn; to Tent also the quartiles), and MiB
that a forward pass keeps for the backward pass, weights left out. Models: `tiny`, a ViT for 32 x 32
images (width 128, 6 blocks, 64 tokens), or any of timm's that takes images, such as
vit_small_patch16_224; all with random weights. Thresholds are such that every sample counts, which
is the most work; CoTTA's teacher looks at the batch itself once (`cotta`), or at 32 views of it
(`cotta, views`).
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import warnings
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import dynmoe.tta
from benchmarks.timing import alternate, ratio, spread
from dynmoe.lab.device import keep_freed_memory
from dynmoe.tta import Adapter
from dynmoe.tta.measures import kept_for_backward

VARIANTS = ("noadapt", "tent", "eata", "sar", "deyo", "cotta", "becotta", "moetta")


def make_model(name: str) -> tuple[nn.Module, int]:
    """The model with random weights, and the side of its images."""
    import timm
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    if name != "tiny":
        model = timm.create_model(name)
        return model, model.pretrained_cfg["input_size"][-1]
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4}
    return VisionTransformer(**shape, num_classes=10), 32


def make_adapter(variant: str, model: nn.Module, classes: int) -> Adapter:
    """The method of that name on a copy of the model, trusting every sample."""
    method, _, views = variant.partition(", ")
    all_trusted = math.log(classes) + 1
    options: dict[str, dict[str, float]] = {
        "eata": {"margin": all_trusted, "redundancy": 2.0, "fisher_weight": 0.0},
        "sar": {"margin": all_trusted, "reset_below": 0.0},
        "deyo": {"filter": all_trusted, "plpd": -1.0},
        "cotta": {"confidence": 2.0 if views else 0.0},
        "becotta": {"margin": all_trusted},
    }
    return dynmoe.tta.adapt(copy.deepcopy(model), method, **options.get(method, {}))


def measure(
    name: str, batch: int, variants: list[str], rounds: int, device: torch.device
) -> list[list[str]]:
    """Rows of the table of one model and batch size."""
    model, side = make_model(name)
    images = torch.randn(batch, 3, side, side, device=device)
    classes = model.to(device).eval()(images[:2]).shape[1]
    adapters = {variant: make_adapter(variant, model, classes) for variant in variants}
    calls = {variant: partial(adapter, images) for variant, adapter in adapters.items()}
    seconds = alternate(calls, rounds, device)
    rows = []
    for variant, adapter in adapters.items():
        median = statistics.median(seconds[variant])
        idle = variant != "noadapt" and adapter.steps != rounds + 2
        ratios = [f"{ratio(seconds, variant, base):.2f}" for base in ("noadapt", "tent")]
        if variant not in ("noadapt", "tent") and rounds > 1:
            low, high = spread(seconds, variant, "tent")
            ratios[1] += f" [{low:.2f}, {high:.2f}]"
        kept = kept_for_backward(adapter.model, images) / 2**20
        rows.append([
            variant + " (steps left out)" * idle, f"{1e3 * median:.1f}", f"{batch / median:.1f}",
            *ratios, f"{kept:.1f}",
        ])  # fmt: skip
    return rows


def main(argv: list[str]) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--methods", nargs="+", default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    warnings.simplefilter("ignore")
    variants = list(dict.fromkeys(["noadapt", "tent", *options.methods]))
    device = torch.device(options.device)
    for batch in options.batch:
        title = f"{options.model}, batches of {batch}, {options.threads} threads, {device}"
        table = Table(title=title)
        for column in ("method", "ms", "images/s", "x noadapt", "x tent", "MiB kept"):
            table.add_column(column, justify="left" if column == "method" else "right")
        for row in measure(options.model, batch, variants, options.rounds, device):
            table.add_row(*row)
        Console().print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
