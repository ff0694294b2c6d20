"""MoE² against one MoA and the plain backbone: time of a training step, of a pass, and memory.

    pip install -e ".[test]"
    python -m benchmarks.dg [--threads 1] [--device cpu] [--batch 4]
        [--width 192 --depth 12 --heads 3 --image 224 --patch 16] [--stem] [--kept] [--bfloat16]

The default is ViT-Ti/16; --width 768 --heads 12 is ViT-B/16; --stem the transformer over a frozen
stem, of the stem's kept tokens. Weights are random. A step is forward and backward pass; the frozen
pass that MoE² needs for its embedding is counted in both, unless --kept: it is then there already,
as in runs without augmentation. With --bfloat16 training passes are in it, as with the command's
--precision bfloat16, and MoA and MoE² are there in float32, too. All variants take turns in one
run; ratios are medians over the rounds, with the least and the largest of a round.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.moe_layer import kept_for_backward
from benchmarks.timing import alternate, ratio
from cl_benchmarks.stem_vit import CHANNELS, TOKENS, StemViT
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
    """A timm vision transformer of the geometry asked for, with random weights, or a `StemViT`."""
    if args.stem:
        return StemViT(0)
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=args.image,
        patch_size=args.patch,
        embed_dim=args.width,
        depth=args.depth,
        num_heads=args.heads,
        num_classes=0,
    )


def make_step(method: DGMethod, images: Tensor, embedding: Tensor | None, labels: Tensor) -> None:
    """Forward and backward pass of a training step."""
    method.zero_grad(set_to_none=True)
    method.loss(images, labels, embedding)[0].backward()


@torch.no_grad()
def infer(method: DGMethod, images: Tensor, embedding: Tensor | None) -> None:
    """One pass."""
    method(images, embedding)


def against(seconds: dict[str, list[float]], name: str, base: str) -> str:
    """The ratio of two variants' times, with the least and the largest of a round."""
    each = [a / b for a, b in zip(seconds[name], seconds[base], strict=True)]
    return f"{ratio(seconds, name, base):.2f} ({min(each):.2f}-{max(each):.2f})"


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    for name, value in (("width", 192), ("depth", 12), ("heads", 3), ("image", 224), ("patch", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--stem", action="store_true")
    parser.add_argument("--kept", action="store_true")
    parser.add_argument("--bfloat16", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    shape = (TOKENS, CHANNELS) if args.stem else (3, args.image, args.image)
    images = torch.randn(args.batch, *shape, device=device)
    labels = torch.arange(args.batch, device=device) % CLASSES
    generator = torch.Generator().manual_seed(0)
    methods: dict[str, DGMethod] = {
        name: config.build(backbone(args), CLASSES, generator).to(device)
        for name, config in VARIANTS.items()
    }
    if args.bfloat16:
        exact = {f"{name}, float32": copy.deepcopy(methods[name]) for name in ("moa", "moe2")}
        for method in methods.values():
            method.train_in(torch.bfloat16)
        methods |= exact
    seconds = {}
    for what in ("step", "pass"):
        calls = {}
        for name, method in methods.items():
            call = partial(make_step, labels=labels) if what == "step" else infer
            embedding = method.eval().embed(images) if args.kept else None
            method.train(what == "step")
            calls[name] = partial(call, method, images, embedding)
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
            against(seconds["step"], name, "moa"),
            f"{1e3 * statistics.median(seconds['pass'][name]):.0f}",
            against(seconds["pass"], name, "plain"),
            f"{kept:.2f}",
        )
    kind = (
        f"ViT of width {args.width}, depth {args.depth}, {args.image} px in patches of {args.patch}"
    )
    if args.stem:
        kind = "transformer over a frozen stem's kept tokens"
    precision = "training in bfloat16" if args.bfloat16 else "float32"
    print(f"{kind}, batch {args.batch}, {args.device}, {args.threads} thread(s), {precision}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
