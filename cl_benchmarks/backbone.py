"""A small vision transformer that is trained on the spot: the embedded stand-in for a real one.

It learns to tell fractals apart, drawn in styles of `domains.embedded`, from classes that no
embedded benchmark uses (100 to 199). Its weights are kept in the user's cache folder under a digest
of all that decides them. The network is timm's, so that whatever works on it works on timm's
pre-trained ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_benchmarks import fractals
from cl_benchmarks.domains.embedded import STYLES, draw
from cl_benchmarks.images import check_least
from dynmoe import seeding
from dynmoe.errors import UserError, unknown
from dynmoe.lab import cache

VERSION = 1
"""Raise it when the same settings give other weights: cached ones are then trained again."""
FIRST_CLASS, CLASSES = 100, 100
"""Fractal classes to learn from; benchmarks keep below them."""
VIEWS: fractals.ViewName = "easy"
"""How much the images of a class differ."""
BATCH = 128
"""Images per optimizer step."""
MEAN = STD = (0.5, 0.5, 0.5)
"""The input's normalisation, for values of 0 .. 1."""


@dataclass(frozen=True, kw_only=True)
class SmallVit:
    """Geometry and training of the embedded backbone."""

    size: int = 32
    """side of its input in pixels"""
    patch: int = 8
    """side of a patch in pixels"""
    dim: int = 64
    """width of the tokens"""
    depth: int = 6
    """blocks"""
    heads: int = 4
    """attention heads"""
    per_class: int = 60
    """training images of each of the 100 classes"""
    epochs: int = 20
    """passes over them"""
    seed: int = 0
    """of its weights and batches; no part of a run's seed, as a downloaded network has none"""
    styles: tuple[str, ...] = ()
    """styles of its training images; all by default, so that no domain is new to it"""

    def check(self) -> None:
        """Refuse a geometry that cannot be built.

        Raises:
            UserError: names the value.
        """
        for style in self.styles:
            if style not in STYLES:
                raise unknown("style of the backbone", style, STYLES)
            if self.styles.count(style) > 1:
                raise UserError(f"--vit.styles names {style} twice; name each once")
        if self.patch < 1 or self.size % self.patch:
            raise UserError(f"backbone patch {self.patch} does not divide its size {self.size}")
        if self.heads < 1 or self.dim % self.heads:
            raise UserError(f"backbone heads {self.heads} does not divide its dim {self.dim}")
        check_least("backbone", self, depth=1, per_class=1, epochs=0)


def vision_transformer(
    size: int, patch: int, width: int, depth: int, heads: int, classes: int
) -> nn.Module:
    """timm's, untrained, drawn from torch's generator; `classes` 0 gives features [B, width]."""
    with seeding.kept():  # timm's import draws nothing today; it must not matter
        from timm.models.vision_transformer import VisionTransformer
    return VisionTransformer(
        img_size=size, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads,
        num_classes=classes,
    )  # fmt: skip


def new_vit(settings: SmallVit, classes: int = 0) -> Any:
    """The vision transformer of these settings, without training; `classes` 0 gives features."""
    settings.check()
    with seeding.seeded(settings.seed, "backbone"):
        return vision_transformer(
            settings.size, settings.patch, settings.dim, settings.depth, settings.heads, classes
        )


def embedded_vit(settings: SmallVit) -> Any:
    """The trained backbone, [B, 3, size, size] -> features [B, dim], from the cache if possible."""
    model = new_vit(settings)

    def train() -> None:
        cache.notice(f"backbone: training the embedded one ({settings.epochs} epochs, once)")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # sums over more threads would round otherwise
        try:
            fit(model, *training_images(settings), settings)
        finally:
            torch.set_num_threads(threads)

    decides = asdict(settings)
    if not settings.styles:  # as it was named before there was a choice
        del decides["styles"]
    key = cache.digest({"version": VERSION, **decides})
    return trained_once(model, f"small-vit-{key}", train)


def trained_once(model: nn.Module, name: str, train: Callable[[], None]) -> nn.Module:
    """The model in evaluation mode, with weights of the cache; where it has none, `train` runs."""

    def make() -> cache.Arrays:
        train()
        return {name: value.numpy() for name, value in model.state_dict().items()}

    arrays = cache.load_or_make(name, make)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in arrays.items()})
    return model.eval()


def training_images(settings: SmallVit) -> tuple[Tensor, Tensor]:
    """Fractals of classes 100 to 199, each image in one of the styles.

    Returns:
        float32 [N, 3, size, size], normalised; labels [N] in 0 .. 99.
    """
    classes = range(FIRST_CLASS, FIRST_CLASS + CLASSES)
    gray = fractals.render(classes, settings.per_class, settings.size, VIEWS, 0, "train")[:, 0]
    images = torch.empty(len(gray), 3, settings.size, settings.size, dtype=torch.uint8)
    names = list(settings.styles or STYLES)
    for number, style in enumerate(names):
        generator = seeding.generator(settings.seed, "backbone", style)
        images[number :: len(names)] = draw(gray[number :: len(names)], style, generator)
    labels = torch.arange(CLASSES).repeat_interleave(settings.per_class)
    return (images.float() / 255 - MEAN[0]) / STD[0], labels


def fit(model: nn.Module, images: Tensor, labels: Tensor, settings: SmallVit) -> None:
    """Train features under a linear classifier that is thrown away: AdamW, batches of 128.

    Args:
        model: [B, 3, S, S] -> [B, dim]; trained in place.
        images: [N, 3, S, S], normalised.
        labels: [N].
    """
    steps = settings.epochs * -(-len(images) // BATCH)
    with seeding.seeded(settings.seed, "backbone", "head"):
        head = nn.Linear(settings.dim, int(labels.max()) + 1)
    generator = seeding.generator(settings.seed, "backbone", "order")
    train_classifier(
        nn.Sequential(model, head), lambda chosen: images[chosen], labels, settings.epochs, BATCH,
        2e-3, 0.05, 0.1, max(steps, 1), generator, clip=1.0,
    )  # fmt: skip


def train_classifier(
    model: nn.Module,
    inputs: Callable[[Tensor], Tensor],
    labels: Tensor,
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    smoothing: float,
    cycle: int,
    generator: torch.Generator,
    clip: float = 0.0,
    done: Callable[[Tensor], None] = lambda loss: None,
) -> None:
    """Train in place by AdamW on the cross entropy, under one cycle of the learning rate.

    Args:
        model: inputs [B, ...] -> logits [B, classes].
        inputs: indices [B] -> inputs; they may draw from the generator.
        labels: int64 [N].
        smoothing: of the labels.
        cycle: optimizer steps of the cycle.
        generator: shuffles the images.
        clip: largest gradient norm; 0 for none.
        done: told the loss of each step, nats.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, cycle, pct_start=0.1)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels), generator=generator).split(batch_size):
            logits = model(inputs(chosen))
            loss = F.cross_entropy(logits, labels[chosen], label_smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            schedule.step()
            done(loss.detach())
    model.eval()
