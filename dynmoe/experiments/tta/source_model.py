"""The trained model that is adapted: a small ViT on the embedded images, or one of timm's."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cl_benchmarks import fractals
from cl_benchmarks.backbone import train_classifier, trained_once, vision_transformer
from cl_benchmarks.shifts.embedded import SEED, Embedded
from cl_benchmarks.shifts.imagenet import SIZE, Imagenet, subset
from cl_benchmarks.shifts.stream import ShiftSource
from dynmoe import seeding
from dynmoe.errors import UserError
from dynmoe.experiments.tta.settings import Config, SmallVit
from dynmoe.lab import cache
from dynmoe.lab.progress import ProgressLine

VERSION = 1
"""Raise it when the same settings give another model: a cached one is then trained again."""

REASON = 240
"""Letters of a library's error that are passed on; it may list every weight of a model."""


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 `[B, 3, S, S]` -> float32, scaled to 0 .. 1 and by the channels' mean and deviation."""
    shape = (1, -1, 1, 1)
    m = torch.tensor(mean, device=images.device).view(shape)
    s = torch.tensor(std, device=images.device).view(shape)
    return (images.float() / 255 - m) / s


def small_vit(vit: SmallVit, size: int, classes: int) -> nn.Module:
    """An untrained ViT of timm's for images of `size` pixels; draws from torch's generator.

    Raises:
        UserError: sizes that do not fit.
    """
    if vit.patch < 1 or size % vit.patch:
        raise UserError(f"vit patch {vit.patch} does not divide the image side {size}")
    if vit.heads < 1 or vit.width < 1 or vit.width % vit.heads:
        raise UserError(f"vit heads {vit.heads} do not divide the width {vit.width}")
    if vit.depth < 1 or vit.epochs < 1 or vit.batch_size < 1:
        raise UserError("vit depth, epochs and batch_size must each be 1 or more")
    return vision_transformer(size, vit.patch, vit.width, vit.depth, vit.heads, classes)


def embedded_model(data: Embedded, vit: SmallVit, threads: int = 0) -> nn.Module:
    """The small ViT, trained on the clean embedded images; taken from the cache where it is there.

    Trained on the CPU, so that every device adapts the same weights.

    Raises:
        UserError: sizes that do not fit.
    """
    if threads:
        torch.set_num_threads(threads)
    with seeding.seeded(vit.seed, "source-model"):
        model = small_vit(vit, data.size, data.num_classes)
    key = cache.digest({
        "version": VERSION, "fractals": fractals.VERSION, "images": SEED,
        "embedded": {k: v for k, v in asdict(data.config).items() if k != "test_per_class"},
        "vit": asdict(vit),
    })  # fmt: skip
    return trained_once(model, f"tta-source-{key}", lambda: _train(model, data, vit))


def _train(model: nn.Module, data: Embedded, vit: SmallVit) -> None:
    """AdamW on the cross-entropy of the clean training images."""
    images, labels = data.training_images()
    generator = seeding.generator(vit.seed, "source-batches")
    steps, count = vit.epochs * -(-len(images) // vit.batch_size), itertools.count(1)

    def inputs(chosen: Tensor) -> Tensor:
        return normalise(_jittered(images[chosen], vit.jitter, generator), data.mean, data.std)

    with ProgressLine("source model", steps) as progress:

        def done(loss: Tensor) -> None:
            if progress.due(step := next(count)):
                progress.update(step, loss=float(loss))

        train_classifier(
            model, inputs, labels, vit.epochs, vit.batch_size, vit.lr, vit.weight_decay,
            vit.smoothing, steps + 1, generator, done=done,
        )  # fmt: skip


def _jittered(images: Tensor, jitter: float, generator: torch.Generator) -> Tensor:
    """Images uint8 `[B, 3, S, S]`, each with a brightness and contrast of its own."""
    if not jitter:
        return images
    gain, lift = torch.rand((2, len(images), 1, 1, 1), generator=generator)
    x = images.float() * (1 - jitter * gain) + 255 * jitter / 2 * lift
    return x.clamp(0, 255).round().to(torch.uint8)


def timm_model(
    name: str, pretrained: bool, weights: Path | None, classes: int
) -> tuple[nn.Module, dict[str, Any]]:
    """A model of timm's in evaluation mode, and how its images are to be made (mean, std, ...).

    Raises:
        UserError: no such model, weights that cannot be had or read, weights that do not fit, or
            another number of classes.
    """
    import timm
    from timm.data import resolve_model_data_config

    if pretrained == (weights is not None):
        raise UserError("the source model needs trained weights: --pretrained or --weights FILE")
    if weights is not None and not weights.expanduser().is_file():
        raise UserError(f"no weights file {weights}; give another --weights")
    options: dict[str, Any] = {"checkpoint_path": str(weights.expanduser())} if weights else {}
    try:
        model = timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:  # unknown name, no network, a file of something else
        lines = [line.strip() for line in str(error).strip().split("\n")]
        reason = " ".join(lines[:2])[:REASON] or type(error).__name__
        raise UserError(f"model {name!r} cannot be made: {reason}") from None
    if model.num_classes != classes:
        raise UserError(
            f"model {name!r} has {model.num_classes} classes and the data {classes}; use a model "
            "trained on ImageNet-1k"
        )
    return model.eval(), resolve_model_data_config(model)


def keep_classes(model: nn.Module, indices: Tensor) -> None:
    """Cut a timm model's classifier down to some outputs, in place.

    Raises:
        UserError: the classifier is no Linear.
    """
    head = model.get_classifier()  # type: ignore[operator]
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"labels subset needs a linear classifier, and this model's is {type(head).__name__}"
        )
    head.weight = nn.Parameter(head.weight.detach()[indices].clone())
    if head.bias is not None:
        head.bias = nn.Parameter(head.bias.detach()[indices].clone())
    head.out_features = len(indices)


class Shared(NamedTuple):
    """What the runs of a comparison share, on the CPU."""

    source: ShiftSource
    model: nn.Module
    """trained on the source; runs take copies"""


def make_source(config: Config) -> Shared:
    """The images and the trained model, on the CPU."""
    if config.data == "embedded":
        if config.labels != "all-1000" or config.on_the_fly:
            raise UserError("--labels and --on-the-fly are options of --data imagenet")
        data = Embedded(config.embedded)
        return Shared(data, embedded_model(data, config.vit, config.threads))
    Imagenet(config.data_dir)  # a wrong folder shows before a model is fetched
    kept = None
    if config.labels == "subset":
        if len(config.streams) != 1:
            raise UserError("--labels subset needs one stream: rendition or adversarial")
        kept = subset(config.streams[0])
    model, how = timm_model(config.model, config.pretrained, config.weights, 1000)
    if how["input_size"][-1] != SIZE:
        raise UserError(
            f"model {config.model!r} takes images of {how['input_size'][-1]} pixels, and the "
            f"streams have {SIZE}; use a model for {SIZE}"
        )
    if kept is not None:
        keep_classes(model, kept)
    mean, std = tuple(how["mean"]), tuple(how["std"])
    images = Imagenet(config.data_dir, config.labels, config.on_the_fly, mean, std)
    return Shared(images, model)
