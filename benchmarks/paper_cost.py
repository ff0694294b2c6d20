"""What one method of `python -m dynmoe.cl --preset paper` costs on this machine.

    python -m benchmarks.paper_cost [--threads 1] [--device cpu]

Times training steps of the preset's network on random images of Tiny ImageNet's shape and
multiplies by the images that its schedule passes through it.
"""

from __future__ import annotations

import argparse
import statistics

import torch
import torch.nn.functional as F

from benchmarks.timing import alternate
from cl_benchmarks.networks import build_network
from dynmoe.cl import presets

IMAGES, CLASSES, SHAPE = 100_000, 200, (3, 64, 64)


def main() -> None:
    """Print the rate and the days."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    config = presets()["paper"]
    model = build_network(config.network, SHAPE, CLASSES).to(device)
    optimizer = torch.optim.Adam(model.parameters())
    images = torch.randn(args.batch_size, *SHAPE, device=device)
    labels = torch.randint(CLASSES, (args.batch_size,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    rate = args.batch_size / statistics.median(alternate({"step": step}, 5, device)["step"])
    chunks = config.chunks
    passes = IMAGES // chunks * chunks * (chunks + 1) // 2 * config.epochs
    print(f"{rate:.1f} images/s on {args.device}, {args.threads} threads")
    print(f"{passes / 1e6:.0f} million images: {passes / rate / 86400:.1f} days")


if __name__ == "__main__":
    main()
