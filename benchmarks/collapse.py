"""Does balancing keep a sparse router from using one expert for everything?

    python -m benchmarks.collapse [--seeds 3] [--steps 800] [--out docs/results]

A stream of tokens from eight clusters around a large common mean; what is to be learned is a linear
map of the deviation from the cluster's centre, another one in each cluster. Eight experts, too
narrow for more than a map or two each, stand behind a router that starts with a lead for expert 0:
its row points along the common mean. Data, initial weights, optimizer and task loss are the same
for all methods of a seed, only the router's kind and the balancing differ. Tuned by hand, on other
seeds than those reported, were the start (so that top-1 routing without balancing does not recover
by itself within the run) and, among one to six values, the weight or rate of each balancing method
in METHODS.

Prints the table below and writes it as collapse.json, with collapse.png of the load entropy over
steps. Figures come from a fixed batch of 2048 tokens in evaluation mode:

load entropy    H(load) / log E, load being each expert's share of the gates; 1 = all alike, 0 = one
largest load    share of the most loaded expert
dead experts    of 8, with a load below 1 %
task loss       mean squared error over the targets' mean square
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dynmoe import registry
from dynmoe.lab.statistics import confidence_interval
from dynmoe.moe import MoELayer, collect_aux_losses, finish_step
from dynmoe.moe.diagnostics import expert_use

DIM, EXPERTS, HIDDEN = 16, 8, 16  # width, experts, hidden units of each
COMMON, SPREAD, NOISE = 2.0, 2.0, 1.0  # lengths of the mean and the centres; deviation per axis
LEAD = 16.0  # of expert 0's router row along the mean, in units of 1/sqrt(DIM)
BATCH, LEARNING_RATE, EVERY = 256, 1e-2, 20

FIRST_SEED = 10
"""tuning used seeds 0 to 2; what is reported comes from other ones"""
COLLAPSED, IN_USE = 0.35, 0.7
"""load entropy at the end: at most this counts as collapsed; from that on, experts are in use"""


@dataclass(frozen=True)
class Method:
    """A router, by name and options, and the loss that balances it, if any."""

    router: tuple[str, dict[str, Any]]
    loss: tuple[str, dict[str, Any]] | None = None


TOP1: tuple[str, dict[str, Any]] = ("topk", {"k": 1})
NOISY: tuple[str, dict[str, Any]] = ("noisy-topk", {"k": 1})
METHODS = {
    "top-1": Method(TOP1),
    "noisy top-1": Method(NOISY),
    "top-2": Method(("topk", {"k": 2})),
    "switch": Method(TOP1, ("switch", {"weight": 0.1})),
    "importance": Method(TOP1, ("importance", {"weight": 1.0})),
    "load": Method(NOISY, ("load", {"weight": 0.1})),
    "global-balance": Method(TOP1, ("global-balance", {"weight": 0.1})),
    "loss-free": Method(TOP1, ("loss-free", {"rate": 0.03})),
    "mutual-information": Method(TOP1, ("mutual-information", {"weight": 0.1})),
    "similarity": Method(TOP1, ("similarity", {"weight": 0.005})),
    "expert-choice": Method(("expert-choice", {"capacity": 1.0})),
    "hash": Method(("hash", {})),
}
UNBALANCED = ("top-1", "noisy top-1")
"""what is expected to collapse; top-2 explores by its second expert"""


class Stream:
    """Tokens [N, DIM] and targets [N, DIM] of one seed."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.mean = F.normalize(torch.randn(DIM, generator=generator), dim=0)
        centres = torch.randn(EXPERTS, DIM, generator=generator)
        centres = centres - (centres @ self.mean).unsqueeze(1) * self.mean
        self.centres = COMMON * self.mean + SPREAD * F.normalize(centres, dim=1)
        self.maps = torch.randn(EXPERTS, DIM, DIM, generator=generator) * DIM**-0.5

    def batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and targets."""
        cluster = torch.randint(EXPERTS, (count,), generator=generator)
        deviation = torch.randn(count, DIM, generator=generator)
        targets = torch.einsum("nd,nod->no", deviation, self.maps[cluster])
        return self.centres[cluster] + NOISE * deviation, targets


def make_layer(method: Method, stream: Stream, seed: int) -> MoELayer:
    """A layer with the method's router and loss, and the lead of expert 0."""
    name, options = method.router
    losses = []
    if method.loss is not None:
        losses.append(registry.get("loss", method.loss[0]).Config(**method.loss[1]))
    layer = MoELayer(
        DIM,
        DIM,
        EXPERTS * HIDDEN,
        num_experts=EXPERTS,
        router=registry.get("router", name).Config(**options),
        losses=losses,
        gate_scale="one",
        generator=torch.Generator().manual_seed(seed),
    )
    with torch.no_grad():
        layer.router.weight[0] += LEAD * DIM**-0.5 * stream.mean
    return layer


@torch.no_grad()
def measure(layer: MoELayer, x: Tensor, target: Tensor) -> dict[str, float]:
    """The figures of the module docstring."""
    layer.eval()
    error = F.mse_loss(layer(x), target) / target.square().mean()
    assert layer.last_routing is not None
    use = expert_use(layer.last_routing.gates, layer.created)
    layer.train()
    return {
        "load entropy": use["balance"],
        "largest load": use["load_max"],
        "dead experts": use["dead_experts"],
        "task loss": float(error),
    }


def run(method: Method, seed: int, steps: int) -> list[dict[str, float]]:
    """Figures at the start and every EVERY steps of one training run."""
    stream = Stream(seed)
    layer = make_layer(method, stream, seed)
    optimizer = torch.optim.Adam(layer.parameters(), LEARNING_RATE)
    generator = torch.Generator().manual_seed(1000 + seed)
    held_out = stream.batch(2048, generator)
    curve = [measure(layer, *held_out)]
    for step in range(1, steps + 1):
        x, target = stream.batch(BATCH, generator)
        loss = F.mse_loss(layer(x), target) + sum(collect_aux_losses(layer).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        finish_step(layer)
        if step % EVERY == 0:
            curve.append(measure(layer, *held_out))
    return curve


def verdict(entropies: list[float]) -> str:
    """What the load entropies of all seeds at the end say."""
    if max(entropies) <= COLLAPSED:
        return "collapsed"
    return "in use" if min(entropies) >= IN_USE else "between"


def show(results: dict[str, list[list[dict[str, float]]]]) -> Table:
    """The table: mean over seeds at the end, with a t interval where there are several."""
    table = Table(title="after training; mean over seeds [95 % t interval]")
    table.add_column("method", no_wrap=True)
    for column in ("load entropy", "largest load", "dead experts", "task loss", "verdict"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, curves in results.items():
        row = []
        for figure in curves[0][-1]:
            point, low, high = confidence_interval([c[-1][figure] for c in curves], "mean")
            ends = f" [{low:.2f}, {high:.2f}]" if len(curves) > 1 else ""
            row.append(f"{point:.2f}{ends}")
        table.add_row(name, *row, verdict([c[-1]["load entropy"] for c in curves]))
    return table


def draw(results: dict[str, list[list[dict[str, float]]]], path: Path) -> None:
    """Load entropy over steps, mean over seeds, as a PNG."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
    for place, (name, curves) in enumerate(results.items()):
        steps = [EVERY * i for i in range(len(curves[0]))]
        values = [[point["load entropy"] for point in curve] for curve in curves]
        style = "--" if METHODS[name].loss is None else "-"
        mean = torch.tensor(values).mean(dim=0).tolist()
        colour = colours[(2 * place) % 20 + place // 10]
        axes.plot(steps, mean, style, label=name, color=colour, linewidth=1.5)
    axes.set(xlabel="step", ylabel="load entropy", ylim=(0, 1.02), title="8 experts, one ahead")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, title="dashed: no loss")
    figure.savefig(path, dpi=110)


def write(results: dict[str, list[list[dict[str, float]]]], steps: int, out: Path) -> None:
    """collapse.json and collapse.png."""
    seeds = len(next(iter(results.values())))
    record = {
        "command": f"python -m benchmarks.collapse --seeds {seeds} --steps {steps}",
        "seeds": [FIRST_SEED + seed for seed in range(seeds)],
        "steps": steps,
        "every": EVERY,
        "methods": {
            name: {
                "router": METHODS[name].router,
                "loss": METHODS[name].loss,
                "verdict": verdict([c[-1]["load entropy"] for c in curves]),
                "end": {k: [round(c[-1][k], 4) for c in curves] for k in curves[0][-1]},
                "load entropy": [[round(p["load entropy"], 3) for p in c] for c in curves],
            }
            for name, curves in results.items()
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "collapse.json").write_text(json.dumps(record) + "\n")
    draw(results, out / "collapse.png")


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs per method")
    parser.add_argument("--steps", type=int, default=800, help="optimizer steps of each run")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder to write to")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {
        name: [
            run(METHODS[name], FIRST_SEED + seed, options.steps) for seed in range(options.seeds)
        ]
        for name in options.methods
    }
    console = Console()
    console.width = max(console.width, 130)  # whole rows also where the output is piped
    console.print(show(results))
    write(results, options.steps, options.out)


if __name__ == "__main__":
    main()
