"""MoE² against one MoA and the plain backbone: time of a training step, of a pass, and memory.

    pip install -e ".[test]"
    python -m benchmarks.dg [--threads 1] [--device cpu] [--batch 4]
        [--width 192 --depth 12 --heads 3 --image 224 --patch 16]

The default is ViT-Ti/16; --width 768 --heads 12 is ViT-B/16. Weights are random. A step is forward
and backward pass; the frozen pass that MoE² needs for its embedding is counted in both. All
variants take turns in one run; ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.moe_layer import kept_for_backward
from benchmarks.timing import alternate, ratio
from dynmoe.dg import DGMethod
from dynmoe.dg.methods.baselines import ERM, LinearProbe
from dynmoe.dg.methods.moa import MoA
from dynmoe.dg.methods.moe2 import MoE2
from dynmoe.registry import PartConfig

CLASSES = 65
VARIANTS: dict[str, PartConfig] = {
    "plain": LinearProbe.Config(),
    "erm": ERM.Config(),
    "moa": MoA.Config(),
    "moe2": MoE2.Config(experts=5),
    "moe2, 1 outer expert": MoE2.Config(experts=1),
    "moe2, deltas": MoE2.Config(experts=5, synthesis="deltas"),
}


def backbone(args: argparse.Namespace) -> nn.Module:
    """A timm vision transformer of the geometry asked for, with random weights."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=args.image,
        patch_size=args.patch,
        embed_dim=args.width,
        depth=args.depth,
        num_heads=args.heads,
        num_classes=0,
    )


def make_step(method: DGMethod, images: Tensor, labels: Tensor) -> None:
    """Forward and backward pass of a training step."""
    method.zero_grad(set_to_none=True)
    method.loss(images, labels)[0].backward()


@torch.no_grad()
def infer(method: DGMethod, images: Tensor) -> None:
    """One pass."""
    method(images)


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    for name, value in (("width", 192), ("depth", 12), ("heads", 3), ("image", 224), ("patch", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    images = torch.randn(args.batch, 3, args.image, args.image, device=device)
    labels = torch.arange(args.batch, device=device) % CLASSES
    generator = torch.Generator().manual_seed(0)
    methods: dict[str, DGMethod] = {
        name: config.build(backbone(args), CLASSES, generator).to(device)
        for name, config in VARIANTS.items()
    }
    seconds = {}
    for what in ("step", "pass"):
        calls = {}
        for name, method in methods.items():
            call = partial(make_step, labels=labels) if what == "step" else infer
            method.train(what == "step")
            calls[name] = partial(call, method, images)
        seconds[what] = alternate(calls, args.rounds, device)
    table = Table()
    columns = ("", "trainable", "step, ms", "/ moa", "pass, ms", "/ plain", "MiB kept per image")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for name, method in methods.items():
        kept = kept_for_backward(method.train(), images) / 2**20 / args.batch
        table.add_row(
            name,
            f"{method.counts()[1]:,}",
            f"{1e3 * statistics.median(seconds['step'][name]):.0f}",
            f"{ratio(seconds['step'], name, 'moa'):.2f}",
            f"{1e3 * statistics.median(seconds['pass'][name]):.0f}",
            f"{ratio(seconds['pass'], name, 'plain'):.2f}",
            f"{kept:.2f}",
        )
    print(
        f"ViT of width {args.width}, depth {args.depth}, {args.image} px in patches of "
        f"{args.patch}, batch {args.batch}, {args.device}, {args.threads} thread(s), float32"
    )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
