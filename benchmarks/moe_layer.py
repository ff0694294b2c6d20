"""The MoE layer against a dense MLP of the same hidden size, a loop over experts, and itself.

    python -m benchmarks.moe_layer [--threads 1] [--device cpu] [--quick]

Prints a training step's time (forward, backward, gradients of inputs and gates) as a ratio to the
dense MLP's, the cost of a growth as a ratio to an Adam step, and how often torch.compile recompiles
through ten growths.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.timing import alternate, ratio
from dynmoe.growth import GrowthController
from dynmoe.growth.cuts.first import FirstCut
from dynmoe.moe import MoELayer
from dynmoe.moe.routers.topk import TopKRouter

SHAPES = ((2048, 512, 4), (2048, 512, 16), (2048, 768, 8), (8192, 512, 8))
"""(samples N, width D, experts E); the hidden size is 4 D"""


class LoopMoE(nn.Module):
    """Experts as separate modules in a python loop: how MoE layers are often written."""

    def __init__(self, dim: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(dim, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, hidden // experts), nn.ReLU(),
                          nn.Linear(hidden // experts, dim))
            for _ in range(experts)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Softly mix all experts for x [N, D]."""
        gates = self.router(x).softmax(dim=1)
        mixed = [gates[:, i, None] * expert(x) for i, expert in enumerate(self.experts)]
        return torch.stack(mixed).sum(dim=0)


def steps(n: int, dim: int, experts: int, rounds: int, device: torch.device) -> list[str]:
    """One row of the table: ratios of training steps to the dense MLP's."""
    hidden = 4 * dim
    make = {"num_experts": experts, "max_experts": 2 * experts}
    modules = {
        "dense": nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim)),
        "soft": MoELayer(dim, dim, hidden, **make),
        "top-2": MoELayer(dim, dim, hidden, router=TopKRouter.Config(k=2), **make),
        "loop": LoopMoE(dim, hidden, experts),
    }
    x = torch.randn(n, dim, device=device, requires_grad=True)
    gradient = torch.randn(n, dim, device=device)

    def step(module: nn.Module) -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None
        module(x).backward(gradient)

    calls = {name: partial(step, module.to(device)) for name, module in modules.items()}
    seconds = alternate(calls, rounds, device)
    milliseconds = 1e3 * statistics.median(seconds["dense"])
    ratios = [f"{ratio(seconds, k, 'dense'):.2f}" for k in ("soft", "top-2", "loop")]
    return [str(n), str(dim), str(experts), f"{milliseconds:.1f}", *ratios]


def growth(rounds: int, device: torch.device) -> str:
    """A growth's time over an Adam step's, for six layers of width 512."""
    layers = nn.Sequential(
        *(MoELayer(512, 512, 2048, num_experts=1, max_experts=rounds + 3) for _ in range(6))
    ).to(device)
    optimizer = torch.optim.Adam(layers.parameters())
    for parameter in layers.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    controller = GrowthController(layers, optimizer, cut=FirstCut.Config())
    seconds = alternate(
        {"growth": lambda: controller.grow(0), "adam": optimizer.step}, rounds, device
    )
    return f"{ratio(seconds, 'growth', 'adam'):.2f}"


def recompilations(device: torch.device) -> int:
    """Graphs that torch.compile makes for the soft layer's training step through ten growths."""
    from torch._dynamo.testing import CompileCounterWithBackend

    layer = MoELayer(64, 64, 256, num_experts=2, max_experts=22).to(device)
    controller = GrowthController(layer, granularity=2, cut=FirstCut.Config())
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(256, 64, device=device)
    for growths in range(11):
        F.mse_loss(compiled(x), x).backward()
        if growths < 10:
            controller.grow(growths)
    return counter.frame_count - 1


def main() -> None:
    """Run all three parts and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="first shape only, no torch.compile")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{args.threads} threads"
    )
    table = Table(title=f"training step, ratio to dense ({device}, {name}, float32)")
    for column in ("N", "D", "E", "dense ms", "soft", "top-2", "loop"):
        table.add_column(column, justify="right")
    for shape in SHAPES[:1] if args.quick else SHAPES:
        table.add_row(*steps(*shape, args.rounds, device))
    Console().print(table)
    print(f"growth / Adam step, six layers of 512x2048: {growth(args.rounds, device)}")
    if not args.quick:
        print(f"recompilations through 10 growths: {recompilations(device)}")


if __name__ == "__main__":
    main()
