"""Do experts that have seen early tasks serve later ones worse than fresh ones? By linear probes.

At a task's end the images of the next task, which nothing was trained on, go through the network up
to each MoE layer. Hidden units there are read out by ridge regression from the next task's training
images, and judged by its test images: units of the oldest experts, of the latest growth's, and
re-initialised ones, as many of each. So the three differ in what the experts were trained on alone.

Probes of hidden features: Alain and Bengio 2016 (arXiv 1610.01644). Groups and sizes are ours.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from cl_benchmarks.networks import for_images
from cl_benchmarks.settings import Config
from cl_benchmarks.stream import ChunkDataset, standardise
from dynmoe.errors import UserError
from dynmoe.growth.new_experts import latest_experts
from dynmoe.moe import MoELayer, UnitBank, moe_layers
from dynmoe.moe.diagnostics import layer_inputs
from dynmoe.moe.draws import every

RIDGE = 0.01
"""Penalty on the squared weights, beside the mean squared error over features of variance 1."""
CONSTANT = 1e-6
"""Deviation below which a feature counts as constant, and is left out."""


def check_probes(config: Config) -> None:
    """Refuse banks without hidden units of vectors, where the settings ask for probes.

    Raises:
        UserError: names the bank or the place, and what works.
    """
    if not config.expert_probes or "bank" not in config.method.build().reads():
        return
    bank, place = config.bank, config.network.place
    if not issubclass(bank.part, UnitBank) or for_images(bank) or place in ("trunk", "everywhere"):
        raise UserError(
            f"--expert-probes reads hidden units of vectors, which --bank {bank.part.name} at "
            f"--network.place {place} does not have; use --bank pool at place last, all or head"
        )


@torch.no_grad()
def probe_experts(
    model: nn.Module,
    train: ChunkDataset,
    test: ChunkDataset,
    generator: torch.Generator,
    device: torch.device,
) -> dict[str, float]:
    """Test accuracy on a task of probes of its experts' hidden units, a mean over the MoE layers.

    Args:
        model: in any mode; left as it was.
        train, test: images of a task that it was not trained on yet.
        generator: on the CPU; chooses units and draws fresh ones.
        device: the model's.

    Returns:
        The fields `next_oldest` and `next_fresh` of a task's row, and `next_newest` where the
        layers have grown; {} for a dense network.
    """
    layers = dict(moe_layers(model))
    if not layers:
        return {}
    inputs, labels = _layer_inputs(model, train, device)
    test_inputs, test_labels = _layer_inputs(model, test, device)
    found: dict[str, list[float]] = {}
    for name, layer in layers.items():
        assert isinstance(layer.bank, UnitBank)  # check_probes
        fresh = copy.deepcopy(layer.bank)
        fresh.draw_units(every(fresh.segment), generator)
        for group, units in choose_units(layer, generator).items():
            bank = fresh if group == "fresh" else layer.bank
            x, test_x = (bank.hidden(z[name])[:, units] for z in (inputs, test_inputs))
            right = ridge_labels(x, labels, test_x) == test_labels
            found.setdefault(f"next_{group}", []).append(float(right.double().mean()))
    return {field: sum(values) / len(values) for field, values in found.items()}


def choose_units(layer: MoELayer, generator: torch.Generator) -> dict[str, Tensor]:
    """[n] hidden units of each group, chosen at random, as many as the smallest group has.

    Groups are the oldest experts, the newest (only after a growth), and fresh: any units at all,
    of a bank that has been re-initialised.
    """
    bank, created = layer.bank, layer.created[: layer.num_experts]
    assert isinstance(bank, UnitBank)
    experts = {"oldest": (created == created.min()).nonzero().flatten()}
    if len(newest := latest_experts(layer)):
        experts["newest"] = newest
    units = {group: torch.isin(bank.segment, e).nonzero().flatten() for group, e in experts.items()}
    units["fresh"] = every(bank.segment)
    count = min(map(len, units.values()))
    return {
        group: own[torch.randperm(len(own), generator=generator)[:count].to(own.device)]
        for group, own in units.items()
    }


def ridge_labels(x: Tensor, labels: Tensor, test_x: Tensor) -> Tensor:
    """Labels [M] that ridge regression on one-hot labels gives to features test_x [M, D].

    In closed form: `(X^T X / N + RIDGE) W = X^T Y / N`, float64, with features x [N, D]
    standardised by their own means and deviations and labels [N] as centred one-hot rows.
    """
    x, test_x = x.double(), test_x.double()
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0)
    std = torch.where(std > CONSTANT, std, torch.inf)  # a constant feature becomes 0
    x, test_x = (x - mean) / std, (test_x - mean) / std
    classes = labels.unique()
    targets = (labels.unsqueeze(1) == classes).double()
    offset = targets.mean(dim=0)
    matrix = x.T @ x / len(x) + RIDGE * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weights = torch.linalg.solve(matrix, x.T @ (targets - offset) / len(x))
    return classes[(test_x @ weights + offset).argmax(dim=1)]


def _layer_inputs(
    model: nn.Module, chunk: ChunkDataset, device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """What each MoE layer is given for all images of a chunk, [N, D] by name, and labels [N]."""
    parts, labels = [], []
    mean, std = chunk.mean.to(device), chunk.std.to(device)
    for index in torch.arange(len(chunk)).split(512):
        images, own = chunk.take(index)
        parts.append(layer_inputs(model, standardise(images.to(device), mean, std)))
        labels.append(own.to(device))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, torch.cat(labels)
