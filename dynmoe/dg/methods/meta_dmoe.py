"""Meta-DMoE: a student adapts to unlabelled images by what experts of the source domains say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.dg.bank import AdapterBank, adapted_features, balance, bank_for
from dynmoe.dg.method import DGMethod
from dynmoe.dg.moa import MoAConfig, insert_moa
from dynmoe.errors import UserError
from dynmoe.moe.draws import seeded_linear
from dynmoe.moe.passes import batch_mean


class MetaDMoE(
    DGMethod, name="meta-dmoe", source="after Zhong et al. 2022 (NeurIPS), Meta-DMoE; survey Eq. 20"
):
    """Before it predicts a batch, a student takes a step towards an aggregate of domain experts.

    Experts: one MoA per source domain. Aggregator: a transformer block over an image's features by
    all experts, their mean, and a head. Student: one more MoA. Its step goes down `KL(student ||
    aggregate)` on the batch without labels (Eq. 20), and is taken at test time too: predictions
    depend on the batch that an image comes in. Training plays that: in turn each domain is the
    target, whose own expert is left out of the aggregate; the student adapts on the first half of
    its images and learns from its cross-entropy on the other half after the step.

    Kept small (ours): experts, aggregator and student learn at once, each from its own loss; the
    outer gradient is of first order, so that the aggregator learns from labels alone and not from
    how well it teaches; adapters stand for whole networks.

    Attributes:
        experts, expert_heads: one bank of a single row, and one head, per source domain.
        student: its bank; its head is `head`.
        aggregator, teacher: [B, K, D] -> [B, D] -> [B, C].
        turn: steps taken, which name the next target.
    """

    least_images = 2
    turn: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(MoAConfig):
        """Options of Meta-DMoE."""

        experts: int = 3
        """as many as there are source domains"""
        step: float = 0.1
        """length of the student's step: times the gradient of the mean KL, nats"""

    @staticmethod
    def unfit(config: Any, sources: int) -> str:
        """The number of experts, if it is not that of the source domains."""
        return "" if config.experts == sources else "experts"

    def prepare(self, config: Config, generator: torch.Generator | None) -> None:
        """Make experts, aggregator and student."""
        if config.experts < 2 or not 0 <= config.step < float("inf"):
            raise UserError(
                f"meta-dmoe: experts={config.experts} must be at least 2, and step={config.step} "
                "a number of at least 0"
            )
        self.config = config
        bank = bank_for(self.backbone, config, "kadaptation")

        def one_set() -> AdapterBank:
            return cast(AdapterBank, bank.build(self.dim, 0, 0, 1, 1, "relu", generator))

        self.experts = nn.ModuleList(one_set() for _ in range(config.experts))
        self.expert_heads = nn.ModuleList(
            seeded_linear(self.dim, self.classes, generator) for _ in range(config.experts)
        )
        self.student = one_set()
        self.aggregator = Aggregator(self.dim, generator)
        self.teacher = seeded_linear(self.dim, self.classes, generator)
        self.register_buffer("turn", torch.tensor(0))
        self.layers = insert_moa(self.backbone, config, generator)

    def after_step(self) -> None:
        """The next domain is the target of the next step."""
        self.turn += 1

    def loss(
        self,
        images: Tensor,
        labels: Tensor,
        embedding: Tensor | None = None,
        domains: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropies of the experts, the aggregate and the adapted student, and balance.

        Where no domains are given, all experts learn from all images, and none is left out.

        Raises:
            UserError: the batch has not as many domains as there are experts, or one image of the
                target.
        """
        count = self.config.experts
        penalties: list[Tensor] = []
        found = count if domains is None else int(domains.max()) + 1
        if found != count:
            raise UserError(
                f"meta-dmoe: there are {found} source domains, and experts={count}; use "
                f"--method.experts {found}"
            )
        losses = []
        for k in range(count):
            own = slice(None) if domains is None else domains == k
            z = self._features(self._bank(k), images[own])
            losses.append(F.cross_entropy(self.expert_heads[k](z), labels[own]))
            penalties += balance(self.layers, self.config.balance).values()
        target = int(self.turn) % count
        own = slice(None) if domains is None else domains == target
        keep = [k for k in range(count) if domains is None or k != target]
        images, labels = images[own], labels[own]
        if len(images) < self.least_images:
            raise UserError(
                f"meta-dmoe: the batch has {len(images)} image of a domain, whose student adapts "
                "to one half and learns from the other; use --batch-size 2 or more"
            )
        taught = self.aggregate(images, keep)
        half = len(images) // 2
        mixed = self._adapted(images[:half], taught[:half].detach())
        logits = self.head(self._features(self.student, images[half:], mixed))
        penalties += balance(self.layers, self.config.balance).values()
        parts = {
            "classification": F.cross_entropy(logits, labels[half:]),
            "experts": torch.stack(losses).mean(),
            "aggregate": F.cross_entropy(taught, labels),
        }
        if penalties:
            parts["balance"] = torch.stack(penalties).mean()
        return torch.stack(list(parts.values())).sum(), parts

    def outputs(self, images: Tensor, embedding: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [1, B, C] of the student after its step on these images."""
        taught = self.aggregate(images, list(range(self.config.experts))).detach()
        with torch.enable_grad():
            mixed = self._adapted(images, taught)
        return self.head(self._features(self.student, images, mixed)).unsqueeze(0), {}

    def aggregate(self, images: Tensor, keep: list[int]) -> Tensor:
        """Logits [B, C] of what the experts `keep` see together; they do not learn from it."""
        with torch.no_grad():
            seen = [self._features(self._bank(k), images) for k in keep]
        return self.teacher(self.aggregator(torch.stack(seen, dim=1)))

    def expert_logits(self, images: Tensor, embedding: Tensor | None) -> Tensor:
        """[K, B, C] of each domain's expert."""
        heads = enumerate(self.expert_heads)
        return torch.stack([head(self._features(self._bank(k), images)) for k, head in heads])

    def _adapted(self, images: Tensor, taught: Tensor) -> Tensor:
        """[1, S] the student's numbers after a step down KL(student || aggregate)."""
        mixed = self.student.mix(self._alone())
        own = self.head(self._features(self.student, images, mixed)).log_softmax(dim=1)
        divergence = (own.exp() * (own - taught.log_softmax(dim=1))).sum(dim=1).mean()
        (gradient,) = torch.autograd.grad(divergence, mixed)
        if self.training:  # on the whole of a batch that processes share, equally
            gradient = batch_mean(gradient)
        return mixed - self.config.step * gradient

    def _features(self, bank: AdapterBank, images: Tensor, mixed: Tensor | None = None) -> Tensor:
        """[B, D] with a bank's one set, or with these numbers [1, S] in place of it."""
        alone = self._alone()
        thetas = bank.thetas(bank.mix(alone) if mixed is None else mixed, alone)
        return adapted_features(self.backbone, self.layers, thetas, images)

    def _alone(self) -> Tensor:
        return self.head.weight.new_ones(1, 1)

    def _bank(self, number: int) -> AdapterBank:
        return cast(AdapterBank, self.experts[number])


class Aggregator(nn.Module):
    """A pre-norm transformer block with one head, and the mean: [B, K, D] -> [B, D].

    Args:
        dim: D.
        generator: draws the weights.
    """

    def __init__(self, dim: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv = seeded_linear(dim, 3 * dim, generator)
        self.proj = seeded_linear(dim, dim, generator)
        self.fc1 = seeded_linear(dim, 2 * dim, generator)
        self.fc2 = seeded_linear(2 * dim, dim, generator)

    def forward(self, x: Tensor) -> Tensor:
        """[B, K, D] -> [B, D]."""
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=2)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x.mean(dim=1)
