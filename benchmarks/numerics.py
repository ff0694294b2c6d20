"""Every path through an MoE layer in float32 and bfloat16, against float64, along its training.

    python -m benchmarks.numerics [--steps 1000] [--every 10] [--only topk]

A layer is trained in float32. Every so often the same weights are run in float64, in float32, under
autocast to bfloat16 (where layers keep their router in float32), and with the router in bfloat16
too, on the same inputs in evaluation mode, where no router draws noise. Told are, of all these
comparisons:

out: the largest relative difference of the outputs, |y - y64| / |y64|, over the samples whose
    choice of experts is that of float64
grad: the same of the gradient of all parameters; only where all samples' choices agree
flips: the share of samples whose choice is another one
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.moe import MoELayer, UnitBank, collect_aux_losses
from dynmoe.moe.experts.pool import Pool

WIDTH, HIDDEN, EXPERTS, GROUPS, TOKENS = 16, 48, 4, 8, 8
MODES = ("float32", "bf16", "bf16, router too")


@dataclass(frozen=True)
class Path:
    """A router, a bank, and whether the bank is made to run all experts on all samples."""

    router: str
    bank: str
    all_experts: bool = False


@dataclass
class Differences:
    """The largest ones of a mode up to now."""

    out: float = math.nan
    grad: float = math.nan
    flips: int = 0
    samples: int = 0


def make(path: Path) -> MoELayer:
    """The layer of a path, its hidden units scattered as growth leaves them."""
    torch.manual_seed(0)
    layer = MoELayer(
        WIDTH, WIDTH, HIDDEN, num_experts=EXPERTS, max_experts=EXPERTS + 2, activation="gelu",
        router=path.router, bank=path.bank,
    )  # fmt: skip
    if isinstance(layer.bank, UnitBank):
        segment = layer.bank.segment
        segment.copy_(segment[torch.randperm(len(segment))])
    if path.all_experts:
        run_all_experts(layer)
    return layer


def run_all_experts(layer: MoELayer) -> None:
    """Have the bank mix sparse gates as it does under torch.compile."""
    bank: Any = layer.bank
    bank.forward = lambda x, routing, scale=1.0: bank.mix_dense(
        x, bank.scaled(routing.gates * scale)
    )


def batch(layer: MoELayer) -> tuple[Tensor, Tensor]:
    """Inputs with three domains of different scale, and which domain each row is of."""
    images = layer.bank.per_sample and layer.bank.channel_axis == 1
    shape = (GROUPS, WIDTH, 3, 3) if images else (GROUPS, TOKENS, WIDTH)
    domain = torch.arange(GROUPS) % 3
    x = torch.randn(shape) * (1.0 + domain).view(-1, *[1] * (len(shape) - 1))
    return x, domain if layer.bank.per_sample else domain.unsqueeze(1).expand(GROUPS, TOKENS)


def passed(
    layer: MoELayer, x: Tensor, context: Tensor, target: Tensor, mode: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Outputs [N, D], gradients [P] and choices [N, M] of a pass in a mode, all in float64."""
    autocast = mode.startswith("bf16")
    layer.zero_grad()
    kept = _with_router_too(layer) if mode == MODES[2] else nullcontext()
    with kept, torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        y = layer(x, context=context)
    (y.to(target.dtype) - target).square().mean().backward()
    routing = layer.last_routing
    assert routing is not None
    gradients = [p.grad.flatten() for p in layer.parameters() if p.grad is not None]
    out = y if y.dim() == 3 else y.movedim(1, -1).flatten(1, 2)
    chosen = routing.chosen
    if chosen is not None and len(chosen) == GROUPS:  # whole samples
        chosen = chosen.repeat_interleave(out.shape[1], dim=0)
    return out.detach().double().flatten(0, 1), torch.cat(gradients).double(), chosen


@contextmanager
def _with_router_too(layer: Any) -> Iterator[None]:
    """Let autocast have the router, too."""
    layer._route = lambda *inputs: layer.router(*inputs, layer._sizes())
    try:
        yield
    finally:
        del layer._route


def note(found: Differences, exact: Any, other: Any) -> None:
    """Compare a pass with that of float64."""
    (y64, g64, chosen64), (y, g, chosen) = exact, other
    same = torch.ones(len(y), dtype=torch.bool)
    if chosen is not None:
        same = (chosen == chosen64).all(dim=1)
    found.flips += int((~same).sum())
    found.samples += len(same)
    if bool(same.any()):
        found.out = larger(found.out, _relative(y[same], y64[same]))
    if bool(same.all()) and len(g) == len(g64):
        found.grad = larger(found.grad, _relative(g, g64))


def larger(one: float, other: float) -> float:
    """The larger of two; nan is none."""
    return other if math.isnan(one) else max(one, other)


def _relative(values: Tensor, exact: Tensor) -> float:
    return float((values - exact).norm() / exact.norm())


def along_training(path: Path, steps: int, every: int) -> dict[str, Differences]:
    """Train the layer of a path and compare on the way.

    Raises:
        UserError: parts that do not go together.
    """
    layer = make(path)
    exact = copy.deepcopy(layer).double()
    if path.all_experts:
        run_all_experts(exact)  # the copy's would run the original's bank
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    teacher = nn.Sequential(nn.Linear(WIDTH, 32), nn.Tanh(), nn.Linear(32, WIDTH))
    found = {mode: Differences() for mode in MODES}
    for step in range(steps):
        x, context = batch(layer)
        rows = x if x.dim() == 3 else x.movedim(1, -1)
        target = 3 * teacher(rows).detach()
        target = target if x.dim() == 3 else target.movedim(-1, 1)
        if step % every == 0:
            exact.load_state_dict(layer.state_dict())
            layer.eval()
            exact.eval()
            right = passed(exact, x.double(), context, target.double(), "float64")
            for mode in MODES:
                note(found[mode], right, passed(layer, x, context, target, mode))
        layer.train()
        optimizer.zero_grad()
        loss = (layer(x, context=context) - target).square().mean()
        loss = loss + sum(collect_aux_losses(layer).values())
        if loss.requires_grad:
            loss.backward()
            optimizer.step()
        layer.finish_step()
    return found


def paths(only: str = "") -> list[Path]:
    """Every router with the pool, sparse ones both ways; every bank with two routers."""
    found = []
    for router in registry.names("router"):
        found.append(Path(router, "pool"))
        layer = make(found[-1])
        layer.eval()
        x, context = batch(layer)
        layer(x, context=context)
        assert layer.last_routing is not None
        if layer.last_routing.chosen is not None and isinstance(layer.bank, Pool):
            found.append(Path(router, "pool", all_experts=True))
    banks = [bank for bank in registry.names("bank") if bank != "pool"]
    found += [Path(router, bank) for bank in banks for router in ("cosine", "topk")]
    return [path for path in found if only in (*vars(path).values(), "")]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--only", default="", help="a router or bank")
    options = parser.parse_args()
    title = f"{options.steps} steps, compared every {options.every}"
    table = Table(title=title, box=MARKDOWN)
    for heading in ("router", "bank", "experts run", *(f"{m}: {n}" for m in MODES
                    for n in ("out", "grad", "flips"))):  # fmt: skip
        table.add_column(heading)
    for path in paths(options.only):
        try:
            found = along_training(path, options.steps, options.every)
        except UserError as error:
            print(f"{path}: {error}")
            continue
        cells = [f(d) for d in found.values() for f in (
            lambda d: f"{d.out:.0e}", lambda d: f"{d.grad:.0e}" if d.grad == d.grad else "-",
            lambda d: f"{100 * d.flips / d.samples:.2f} %" if d.flips else "0",
        )]  # fmt: skip
        table.add_row(path.router, path.bank, "all" if path.all_experts else "as routed", *cells)
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
