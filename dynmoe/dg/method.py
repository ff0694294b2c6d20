"""The contract of methods of domain generalisation: a backbone and a classifier that learn."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.dg.backbone import check_backbone, features
from dynmoe.moe.draws import seeded_linear
from dynmoe.registry import Part, PartConfig


class DGMethod(nn.Module, Part, kind="dg"):
    """Base of all methods. Subclasses define `prepare` and, where they do more, `outputs`.

    Args:
        config: the method's options.
        backbone: a vision transformer (see `dynmoe.dg.backbone`). It is taken over and changed in
            place: give each method a copy. Without dropout, as timm builds them.
        classes: C, classes.
        generator: draws the initial weights.

    Attributes:
        backbone: the vision transformer, with what the method put into it.
        head: linear map [B, D] -> [B, C].
        smoothing: label smoothing of the loss.
        embeds: the method routes by a frozen embedding, which can be kept for images that come
            again unaugmented: `forward(images, embed(images))` is `forward(images)`.
        starts: `start` is to be called before the first step.
        watches: `watch` is to be called with the validation loss before each evaluation.
        least_images: of each source domain, in a training batch.

    `least_evaluations` says how many evaluations training needs for the method to do anything.

    Raises:
        UserError: the backbone lacks an expected layer.
    """

    embeds: ClassVar[bool] = False
    starts: bool = False
    watches: ClassVar[bool] = False
    least_images: ClassVar[int] = 1

    def __init__(
        self,
        config: PartConfig,
        backbone: nn.Module,
        classes: int,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        check_backbone(backbone)
        self.backbone = backbone
        self.dim: int = backbone.embed_dim  # type: ignore[assignment]
        self.classes = classes
        self.head = seeded_linear(self.dim, classes, generator)
        self.smoothing = 0.0
        self.prepare(config, generator)

    def prepare(self, config: Any, generator: torch.Generator | None) -> None:
        """Put into the backbone what is the method's own, and freeze what is not to learn.

        Raises:
            UserError: an option, or the backbone, is unfit.
        """

    @staticmethod
    def unfit(config: Any, sources: int) -> str:
        """The option that must be another for so many source domains; "" where all are fit."""
        return ""

    @staticmethod
    def least_evaluations(config: Any) -> int:
        """Evaluations in a training, for the method to differ from one without it."""
        return 1

    def outputs(self, images: Tensor, embedding: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [S, B, C] of the S members (1 but for ensembles), and weighted penalties by name.

        `embedding` is what `embed` gave for the images, or None. Penalties are scalars, and there
        need be none outside training mode. Here: the head's on the backbone's features, and none.
        """
        return self.head(features(self.backbone, images)).unsqueeze(0), {}

    def forward(self, images: Tensor, embedding: Tensor | None = None) -> Tensor:
        """Logits [B, C] of images [B, 3, H, W]; an ensemble's are log mean probabilities."""
        return pooled(self.outputs(images, embedding)[0])

    def loss(
        self,
        images: Tensor,
        labels: Tensor,
        embedding: Tensor | None = None,
        domains: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The training objective on a batch with class labels [B]: a scalar, and its parts by name.

        Cross-entropy in nats with label smoothing, the mean over members, plus the penalties.
        `domains` [B] numbers the source domains from 0; only methods that say so need it.
        """
        logits, penalties = self.outputs(images, embedding)
        members = [F.cross_entropy(z, labels, label_smoothing=self.smoothing) for z in logits]
        parts = {"classification": torch.stack(members).mean(), **penalties}
        return torch.stack(list(parts.values())).sum(), parts

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor | None:
        """[B, D] features of the frozen backbone, for methods that route by them; else None."""
        return features(self.backbone, images) if self.embeds else None

    def start(self, embedding: Tensor, domains: Tensor, generator: torch.Generator) -> None:
        """See what `embed` gives for all training images, before the first step; here nothing.

        Args:
            embedding: [N, E]; N images of all source domains.
            domains: [N] numbers of their domains, from 0.
            generator: for what is drawn.
        """

    def after_step(self) -> None:
        """Called after each step of the optimizer; here nothing."""

    def watch(self, loss: float) -> None:
        """See the cross-entropy, nats, on the sources' held-out images; here nothing."""

    def settle(self) -> None:
        """Called once after the last evaluation: make the weights those to be kept; as they are."""

    def gates(self, embedding: Tensor) -> Tensor | None:
        """[B, K] weights of the K experts of whole images, by what `embed` gave; None without."""
        return None

    def expert_logits(self, images: Tensor, embedding: Tensor | None) -> Tensor | None:
        """[K, B, C] what each expert of whole images says alone; None for methods without."""
        return None

    def measures(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Figures of the method's own on images [B, 3, H, W] with labels [B]; none unless defined.

        The method is left as it was.
        """
        return {}

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that an optimizer is to be given."""
        return [p for p in self.parameters() if p.requires_grad]

    def train_in(self, precision: torch.dtype) -> None:
        """Run the backbone's passes in training in this precision, by autocast.

        Weights, heads, mixtures of weights and losses stay as they are, and so do evaluations.
        """
        self.backbone.precision = precision  # type: ignore[assignment]

    def counts(self) -> tuple[int, int]:
        """Parameters in total, and the trainable ones."""
        return sum(p.numel() for p in self.parameters()), sum(p.numel() for p in self.trainable())

    def learned_state(self) -> dict[str, Tensor]:
        """`state_dict()` without parameters that are frozen: what a small checkpoint needs.

        Each tensor has the shape of its parameter or buffer.
        """
        frozen = {name for name, p in self.named_parameters() if not p.requires_grad}
        return {name: value for name, value in self.state_dict().items() if name not in frozen}

    def load_learned_state(self, state: dict[str, Tensor]) -> None:
        """Restore `learned_state()` into a method of the same options on the same backbone.

        Shapes must be those of the parameters and buffers of these names.
        """
        self.load_state_dict({**self.state_dict(), **state})

    def extra_state(self) -> dict[str, Any]:
        """What a checkpoint needs besides `learned_state`, as plain values and tensors."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore `extra_state()`."""


def pooled(logits: Tensor) -> Tensor:
    """[B, C] log of the members' mean probabilities, from logits [S, B, C]; one member's logits."""
    if len(logits) == 1:
        return logits[0]
    return logits.log_softmax(dim=2).logsumexp(dim=0) - math.log(len(logits))
