"""The MoE layer against a dense MLP of the same hidden size, its floor, and the field's layers.

    pip install -e ".[bench]"
    python -m benchmarks.moe_layer [--threads 1] [--device cpu] [--quick]

For each shape one table row of forward passes (no gradients) and one of training steps (forward,
backward, gradients of inputs, gates and weights), as ratios to the dense MLP's in the same round;
and the memory that each keeps for its backward pass. Then the cost of a growth as a ratio to an
Adam step, and how often torch.compile recompiles through ten growths.

The floor of top-2 is a dense MLP of its two experts' hidden size.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.moe_peers import GROUP, PEERS, LoopMoE, dense, installed
from benchmarks.timing import alternate, ratio
from dynmoe.growth import GrowthController
from dynmoe.growth.pruning import FirstUnits
from dynmoe.lab.device import keep_freed_memory
from dynmoe.moe import MoELayer
from dynmoe.moe.routers.competing import SlotRouter
from dynmoe.moe.routers.topk import TopKRouter

SHAPES = ((2048, 512, 4), (2048, 512, 16), (2048, 768, 8), (8192, 512, 8))
"""(samples N, width D, experts E); the hidden size is 4 D"""


def layers(dim: int, experts: int) -> dict[str, nn.Module]:
    """Every layer of the comparison, by column."""

    def ours(**options: object) -> MoELayer:
        make = {"num_experts": experts, "max_experts": 2 * experts, "activation": "gelu"}
        return MoELayer(dim, dim, 4 * dim, **(make | options))  # type: ignore[arg-type]

    slots = SlotRouter.Config(slots_per_expert=GROUP // experts)
    peers = {name: make(dim, experts) for name, make in installed().items()}
    return {
        "dense": dense(dim, 4 * dim),
        "soft": ours(),
        "floor": dense(dim, 2 * 4 * dim // experts),
        "top-2": ours(router=TopKRouter.Config(k=2)),
        "slots": InGroups(ours(router=slots, max_experts=experts)),  # slots in reserve cost work
        "loop": LoopMoE(dim, experts),
        **peers,
    }


class InGroups(nn.Module):
    """Our slot layer on [N, D] rows, as sequences of the peers' length."""

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """[N, D] -> [N, D]."""
        return self.layer(x.view(-1, GROUP, x.shape[1])).view(x.shape)


def compare(n: int, dim: int, experts: int, rounds: int, device: torch.device) -> list[list[str]]:
    """Three rows of the table: forward passes, training steps, memory."""
    modules = {name: module.to(device) for name, module in layers(dim, experts).items()}
    x = torch.randn(n, dim, device=device, requires_grad=True)
    gradient = torch.randn(n, dim, device=device)

    def step(module: nn.Module) -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None
        module(x).backward(gradient)

    @torch.no_grad()
    def forward(module: nn.Module) -> None:
        module(x)

    shape, rows = f"{n} x {dim}, {experts}", []
    for what, call in (("forward", forward), ("step", step)):
        seconds = alternate({k: partial(call, m) for k, m in modules.items()}, rounds, device)
        milliseconds = f"{1e3 * statistics.median(seconds['dense']):.0f} ms"
        ratios = {name: f"{ratio(seconds, name, 'dense'):.2f}" for name in modules}
        rows.append([shape, what, *(ratios | {"dense": milliseconds}).values()])
    kept = {name: kept_for_backward(module, x) / 2**20 for name, module in modules.items()}
    rows.append([shape, "MiB kept", *(f"{value:.0f}" for value in kept.values())])
    return rows


def kept_for_backward(module: nn.Module, x: Tensor) -> int:
    """Bytes of all tensors that a forward pass saves for its backward pass, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    own.add(x.untyped_storage().data_ptr())
    saved: dict[int, int] = {}
    alive: list[Tensor] = []  # a freed storage's address could be given out again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    del y
    return sum(size for place, size in saved.items() if place not in own)


def growth(rounds: int, device: torch.device) -> str:
    """A growth's time over an Adam step's, for six layers of width 512."""
    layers = nn.Sequential(
        *(MoELayer(512, 512, 2048, num_experts=1, max_experts=rounds + 3) for _ in range(6))
    ).to(device)
    optimizer = torch.optim.Adam(layers.parameters())
    for parameter in layers.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    controller = GrowthController(layers, optimizer, pruning=FirstUnits.Config())
    seconds = alternate(
        {"growth": lambda: controller.grow(0), "adam": optimizer.step}, rounds, device
    )
    return f"{ratio(seconds, 'growth', 'adam'):.2f}"


def recompilations(device: torch.device) -> int:
    """Graphs that torch.compile makes for the soft layer's training step through ten growths."""
    from torch._dynamo.testing import CompileCounterWithBackend

    layer = MoELayer(64, 64, 256, num_experts=2, max_experts=22).to(device)
    controller = GrowthController(layer, granularity=2, pruning=FirstUnits.Config())
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
    memory = "keep: glibc keeps what is freed, as dynmoe.rl asks of it"
    parser.add_argument("--memory", choices=("keep", "default"), default="keep", help=memory)
    parser.add_argument("--quick", action="store_true", help="first shape only, no torch.compile")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    kept = args.memory == "keep" and keep_freed_memory()
    device = torch.device(args.device)
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{args.threads} threads"
    )
    columns = list(layers(64, 4))
    print(f"training and inference, float32, GELU, {device} ({name}); ratios to dense")
    print(f"freed memory is {'kept' if kept else 'given back to the system'}")
    table = Table()
    for column in ("N x D, E", "", *columns):
        table.add_column(column, justify="right", no_wrap=True)
    for shape in SHAPES[:1] if args.quick else SHAPES:
        for row in compare(*shape, args.rounds, device):
            table.add_row(*row)
        table.add_section()
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    missing = PEERS.keys() - installed().keys()
    if missing:
        print(f"not installed, left out: {', '.join(sorted(missing))}; pip install -e '.[bench]'")
    print(f"growth / Adam step, six layers of 512x2048: {growth(args.rounds, device)}")
    if not args.quick:
        print(f"recompilations through 10 growths: {recompilations(device)}")


if __name__ == "__main__":
    main()
