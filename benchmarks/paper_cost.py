"""What one method of `python -m dynmoe.cl --preset paper` costs on this machine.

    python -m benchmarks.paper_cost [--threads 1] [--device cpu] [--batch-size 64] [--more]

Times training steps of the preset's network on random images of Tiny ImageNet's shape, in the
preset's precision and order of memory and in plain float32, in turn, and multiplies by the images
that its schedule passes through it. `--more` adds each of the two alone, and Adam's fused form.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.timing import alternate, ratio
from cl_benchmarks.networks import build_network
from dynmoe.cl import presets

IMAGES, CLASSES, SHAPE = 100_000, 200, (3, 64, 64)
VARIANTS = {
    "float32": (False, False, False),
    "bfloat16, channels last": (True, True, False),
    "float32, channels last": (False, True, False),
    "bfloat16": (True, False, False),
    "bfloat16, channels last, fused Adam": (True, True, True),
}
"""bfloat16, channels last, fused Adam; the first is the base, the second the preset"""


def training_step(
    images: torch.Tensor, labels: torch.Tensor, half: bool, last: bool, fused: bool
) -> Callable[[], None]:
    """A step of the preset's network on images [B, C, H, W] and labels [B]."""
    model = build_network(presets()["paper"].network, SHAPE, CLASSES).to(images.device)
    if last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(model.parameters(), fused=fused or None)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    return step


def main() -> None:
    """Print the rates and the days."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--more", action="store_true", help="each setting alone")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    config = presets()["paper"]
    assert config.precision == "bfloat16" and config.channels_last
    images = torch.randn(args.batch_size, *SHAPE, device=device)
    labels = torch.randint(CLASSES, (args.batch_size,), device=device)
    chosen = list(VARIANTS) if args.more else list(VARIANTS)[:2]
    steps = {name: training_step(images, labels, *VARIANTS[name]) for name in chosen}
    seconds = alternate(steps, args.rounds, device)
    chunks = config.chunks
    passes = IMAGES // chunks * chunks * (chunks + 1) // 2 * config.epochs
    print(f"{passes / 1e6:.0f} million images, {args.device}, {args.threads} threads")
    for name, times in seconds.items():
        rate = args.batch_size / statistics.median(times)
        faster = 1 / ratio(seconds, name, chosen[0])
        print(
            f"{name:>36}: {rate:6.1f} images/s, {passes / rate / 86400:5.1f} days, {faster:.2f} x"
        )


if __name__ == "__main__":
    main()
