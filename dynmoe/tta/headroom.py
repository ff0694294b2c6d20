"""Whether a stream can show what experts are worth: does the loss teach, do domains need their own?

MoETTA's claim (Fan et al. 2025, arXiv 2511.13760) is that one set of normalisation weights cannot
follow mixed domains, and that experts can. A stream can tell only if the gradient of the loss,
which knows no labels, agrees with that of the true cross-entropy (gate 1), and if weights of each
domain's own, with every image sent to the right ones, beat shared weights (gate 2).

Shapes: B images in a batch, P trained numbers, K domains. Batches are (images [B, C, H, W],
labels int64 [B]), on the model's device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, cycle, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.moe.model import undisturbed
from dynmoe.tta.adapter import Adapter
from dynmoe.tta.entropy import tent_loss, wide
from dynmoe.tta.params import affine_parameters, use_batch_statistics

Loss = Callable[[Tensor], Tensor]
"""Logits [B, classes] -> a scalar."""
Batch = tuple[Tensor, Tensor]
LOSSES: dict[str, Loss] = {
    "entropy": tent_loss,
    "reliable": partial(tent_loss, reliable=True),
    "information": partial(tent_loss, im=1.0),
}
"""Tent's; Tent's of samples with H < 0.4 ln C; mean entropy minus entropy of the mean prediction
(Krause et al. 2010; Liang et al. 2020, SHOT, arXiv 2002.08546)."""
GATE_POINTS = 3.0
"""Gate 2: points of accuracy that perfect routing must be above shared weights; ours."""
RATES = (1.0, 10.0, 100.0)
"""Multiples of a method's learning rate. Weights of one domain's own take fewer steps than shared
ones, and both fewer than in a whole stream, so each side gets its best."""
SUPERVISED_RATES = (1e-3, 1e-2)
"""Learning rates of Adam on the true cross-entropy."""


@dataclass(frozen=True, eq=False)
class Split:
    """Images of one domain: a part that is learnt from, and a part that is measured."""

    learnt: Batch
    held: Batch

    def batches(self, size: int) -> list[Batch]:
        """The learnt part in its order."""
        return batches_of(*self.learnt, size)


def batches_of(images: Tensor, labels: Tensor, size: int) -> list[Batch]:
    """Images [N, ...] and labels [N] in batches as even as can be, of `size` at most."""
    parts = -(-len(images) // size)
    return list(zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True))


def gradients(
    model: nn.Module,
    batches: Iterable[Batch],
    losses: Mapping[str, Callable[[Tensor, Tensor], Tensor]],
    parameters: Sequence[nn.Parameter] | None = None,
) -> dict[str, Tensor]:
    """Sum over batches of the gradient of each loss; float64 [P] each, on the CPU.

    At the weights as they are; the model is left unchanged.

    Args:
        model: images -> logits.
        batches: what the losses are of.
        losses: by name, (logits [B, classes], labels [B]) -> a scalar.
        parameters: what is differentiated by; None: scales and shifts of normalisation layers.

    Raises:
        UserError: the model has no normalisation layers, and no parameters are given.
    """
    chosen = affine_parameters(model, "the gates") if parameters is None else list(parameters)
    learnt = [p.requires_grad for p in chosen]
    total = {name: torch.zeros(sum(p.numel() for p in chosen), dtype=torch.float64)
             for name in losses}  # fmt: skip
    try:
        for parameter in chosen:
            parameter.requires_grad_(True)
        with undisturbed(model), torch.enable_grad():
            for images, labels in batches:
                logits = model(images)
                for name, loss in losses.items():
                    found = torch.autograd.grad(
                        loss(logits, labels), chosen, retain_graph=True, allow_unused=True,
                        materialize_grads=True,
                    )  # fmt: skip
                    total[name] += torch.cat([g.flatten() for g in found]).double().cpu()
    finally:
        for parameter, was in zip(chosen, learnt, strict=True):
            parameter.requires_grad_(was)
    return total


def true_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits [B, classes] with labels [B], in nats."""
    return F.cross_entropy(wide(logits), labels)


def teacher_cosines(
    model: nn.Module, batches: Iterable[Batch], losses: Mapping[str, Loss]
) -> dict[str, float]:
    """Cosine between the gradient of each loss and that of the true cross-entropy.

    Over all normalisation parameters. Below 0 a step down the loss is, to first order, one up the
    cross-entropy: the loss teaches the wrong answers.
    """
    blind = {name: _blind(loss) for name, loss in losses.items()}
    found = gradients(model, batches, {"true": true_loss, **blind})
    return {name: cosine(found[name], found["true"]) for name in losses}


def _blind(loss: Loss) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss without labels, as one that gets them."""
    return lambda logits, labels: loss(logits)


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of the angle between two vectors [P]; 0 where one of them is 0."""
    return float(F.cosine_similarity(a, b, dim=0))


def alignment(
    model: nn.Module,
    domains: Mapping[str, Iterable[Batch]],
    loss: Loss = tent_loss,
    parameters: Sequence[nn.Parameter] | None = None,
) -> Tensor:
    """Cosines [K, K] between the gradients of K domains, float64.

    MoETTA's reason for experts: where the gradients of two domains point apart, one set of weights
    cannot follow both. `parameters` as in `gradients`.
    """
    rows = [gradients(model, batches, {"": _blind(loss)}, parameters)[""]
            for batches in domains.values()]  # fmt: skip
    unit = F.normalize(torch.stack(rows), dim=1)
    return unit @ unit.T


def mean_pairwise(cosines: Tensor) -> float:
    """Mean over all pairs of different rows of cosines [K, K]; nan for one row."""
    pairs = [float(cosines[a, b]) for a, b in combinations(range(len(cosines)), 2)]
    return sum(pairs) / len(pairs) if pairs else float("nan")


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, size: int) -> float:
    """Share of right answers for images [N, C, H, W] with labels [N]; the model is left as it was.

    Batches have `size` images at most.
    """
    with undisturbed(model):
        right = sum(
            int((model(x).argmax(dim=1) == y).sum()) for x, y in batches_of(images, labels, size)
        )
    return right / len(labels)


def pooled(domains: Mapping[str, Split], generator: torch.Generator) -> tuple[Batch, Tensor]:
    """The learnt parts of all domains in one random order, and the number of each one's domain.

    Images [N, C, H, W] with labels [N]; domains' numbers int64 [N].

    `generator` is on the CPU.
    """
    parts = [split.learnt for split in domains.values()]
    owner = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(y) for _, y in parts]))
    order = torch.randperm(len(owner), generator=generator)
    images, labels = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return (images[order.to(images.device)], labels[order.to(labels.device)]), owner[order]


def supervised(model: nn.Module, batches: Sequence[Batch], steps: int, lr: float) -> nn.Module:
    """A copy whose normalisation parameters took `steps` steps of Adam on the true cross-entropy.

    The batches come round again as often as it takes.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    parameters = [p.requires_grad_(True) for p in affine_parameters(model, "the gates")]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    with torch.enable_grad():
        for images, labels in islice(cycle(batches), steps):
            optimizer.zero_grad()
            true_loss(model(images), labels).backward()
            optimizer.step()
    return model


Learner = Callable[[Sequence[Batch], float], nn.Module]
"""Batches and a learning rate -> a model that has learnt from them."""


def own_and_shared(
    domains: Mapping[str, Split],
    size: int,
    generator: torch.Generator,
    own: Learner,
    shared: Learner,
    rates: Sequence[float],
) -> dict[str, dict[str, float]]:
    """Accuracy on each domain's held part after learning: {"own": {domain: ...}, "shared": ...}.

    own: a copy for each domain learns from that domain's images, in their order in the mixed
    stream. shared: one copy learns from the mixed stream. Either side has the rate that is best
    for it in the mean over domains, in hindsight.
    """
    (images, labels), owner = pooled(domains, generator)
    mixed = batches_of(images, labels, size)
    streams = {}
    for number, name in enumerate(domains):
        mine = (owner == number).to(images.device)
        streams[name] = batches_of(images[mine], labels[mine], size)

    def score(model: nn.Module, split: Split) -> float:
        return accuracy(model, *split.held, size)

    def best(trials: list[dict[str, float]]) -> dict[str, float]:
        return max(trials, key=lambda trial: sum(trial.values()))

    owned, common = [], []
    for rate in rates:
        owned.append({n: score(own(streams[n], rate), split) for n, split in domains.items()})
        one = shared(mixed, rate)
        common.append({n: score(one, split) for n, split in domains.items()})
    return {"own": best(owned), "shared": best(common)}


def measure(
    model: nn.Module,
    domains: Mapping[str, Split],
    adapter: Callable[[nn.Module, float], Adapter],
    loss: Loss,
    size: int,
    generator: torch.Generator,
    passes: int = 4,
) -> dict[str, Any]:
    """All figures of both gates, as plain values.

    Args:
        model: the source model; left as it was. Where it has BatchNorm, gradients and supervised
            weights are those of a copy that normalises by the batch, as Tent's does.
        domains: by name.
        adapter: puts the method around a model, its learning rate multiplied by a number.
        loss: the method's.
        size: images in a batch.
        generator: on the CPU, draws the order of the mixed stream.
        passes: over the learnt parts, by the method and by the supervised weights. The shared
            supervised weights take as many steps as a domain's own, of the mixed stream.

    Returns:
        domains: per domain the accuracies `source`, `supervised` and `supervised_shared`, `routed`
            (the method on that domain's images alone) and `shared` (one for all), each on the held
            part; and `cosine_own`, `cosine_entropy`, `cosine_reliable` and `cosine_information`
            of the learnt part.
        alignment: mean cosine between the domains' gradients of the method's loss.
    """
    plain = copy.deepcopy(model).eval().requires_grad_(False)
    use_batch_statistics(plain)
    steps = passes * max(len(split.batches(size)) for split in domains.values())

    def adapted(batches: Sequence[Batch], rate: float) -> nn.Module:
        one = adapter(copy.deepcopy(model), rate)
        for images, _ in islice(cycle(batches), passes * len(batches)):
            one(images)
        return one.model

    def taught(batches: Sequence[Batch], rate: float) -> nn.Module:
        return supervised(plain, batches, steps, rate)

    draw = partial(own_and_shared, domains, size, generator)
    labelled = draw(taught, taught, SUPERVISED_RATES)
    routed = draw(adapted, adapted, RATES)
    rows = {}
    for name, split in domains.items():
        cosines = teacher_cosines(plain, split.batches(size), {"own": loss, **LOSSES})
        rows[name] = {
            "source": accuracy(model, *split.held, size),
            **{f"cosine_{key}": value for key, value in cosines.items()},
            "supervised": labelled["own"][name], "supervised_shared": labelled["shared"][name],
            "routed": routed["own"][name], "shared": routed["shared"][name],
        }  # fmt: skip
    together = alignment(plain, {n: s.batches(size) for n, s in domains.items()}, loss)
    return {"domains": rows, "alignment": mean_pairwise(together)}


def mean_of_domains(gates: Mapping[str, Any], column: str) -> float:
    """Mean over the domains of a column of `measure`."""
    values = [row[column] for row in gates["domains"].values()]
    return sum(values) / len(values)


def positive(gates: Mapping[str, Any]) -> float:
    """Gate 1: share of the domains where the method's gradient agrees with the true one."""
    rows = gates["domains"].values()
    return sum(row["cosine_own"] > 0 for row in rows) / len(rows)


def routing_gain(gates: Mapping[str, Any]) -> float:
    """Gate 2: accuracy with perfect routing minus that of shared weights, mean over domains."""
    return mean_of_domains(gates, "routed") - mean_of_domains(gates, "shared")
