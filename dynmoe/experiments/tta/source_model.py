"""The data and the trained model that is adapted to it, as the settings ask for them."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cl_benchmarks import fractals, stem_vit
from cl_benchmarks.backbone import train_classifier, trained_once, vision_transformer
from cl_benchmarks.shifts.embedded import SEED, Embedded
from cl_benchmarks.shifts.folders import (
    TINY_FIT,
    ClassImages,
    Fit,
    FolderShifts,
    check_classes,
    class_folder,
    tiny_imagenet,
)
from cl_benchmarks.shifts.imagenet import SIZE, Imagenet, subset
from cl_benchmarks.shifts.stream import ShiftSource
from cl_benchmarks.stem_training import trained_stem_vit
from dynmoe import seeding
from dynmoe.errors import UserError
from dynmoe.experiments.tta.classes import class_names, match
from dynmoe.experiments.tta.frozen import with_front
from dynmoe.experiments.tta.models import Trained, count_outputs, keep_classes, trained_model
from dynmoe.experiments.tta.settings import Config, SmallVit
from dynmoe.lab import cache
from dynmoe.lab.progress import ProgressLine

VERSION = 1
"""Raise it when the same settings give another model: a cached one is then trained again."""

Triple = tuple[float, float, float]


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


class Shared(NamedTuple):
    """What the runs of a comparison share, on the CPU."""

    source: ShiftSource
    model: nn.Module
    """trained on the source; runs take copies"""


def make_source(config: Config) -> Shared:
    """The images and the trained model, on the CPU.

    Raises:
        UserError: data, model or weights that are not there or do not fit together.
    """
    if config.data == "embedded":
        if config.labels != "all-1000" or config.on_the_fly:
            raise UserError("--labels and --on-the-fly are options of --data imagenet")
        data = Embedded(config.embedded)
        return Shared(data, embedded_model(data, config.vit, config.threads))
    if config.data == "imagenet":
        return _imagenet(config)
    images = tiny_imagenet(config.data_dir) if config.data == "tiny-imagenet" else class_folder(
        config.data_dir)  # fmt: skip
    return _folders(config, images)


def _imagenet(config: Config) -> Shared:
    """The sets for ImageNet's 1000 classes, or 200 of them."""
    Imagenet(config.data_dir)  # a wrong folder shows before a model is fetched
    kept = None
    if config.labels == "subset":
        if len(config.streams) != 1:
            raise UserError("--labels subset needs one stream: rendition or adversarial")
        kept = subset(config.streams[0])
    model = trained_model(config, 1000)
    size = config.size or model.size or SIZE
    if size != SIZE and not config.size:
        raise UserError(
            f"model {config.model!r} takes images of {size} pixels, and the streams have {SIZE}; "
            f"use a model for {SIZE}, or --size {size} to have them resized"
        )
    outputs = count_outputs(model.network, config.model, size)
    if outputs != 1000:
        raise UserError(
            f"model {config.model!r} has {outputs} classes and the data 1000; use a model "
            "trained on ImageNet-1k"
        )
    if kept is not None:
        keep_classes(model.network, kept)
    mean, std = _statistics(config, model)
    images = Imagenet(config.data_dir, config.labels, config.on_the_fly, mean, std, size=size)
    return Shared(images, with_front(model.network))


def _folders(config: Config, images: ClassImages) -> Shared:
    """Class folders and their corruptions, and a model of their classes or of more."""
    tiny = config.data == "tiny-imagenet"
    if config.train_source:
        model = _trained_here(config, images.classes)
    else:
        model = trained_model(config, len(images.classes))
    size = config.size or model.size or (TINY_FIT.crop if tiny else None)
    if size is None:
        raise UserError(f"model {config.model!r} does not tell the size of its images; give --size")
    count = count_outputs(model.network, config.model, size)
    outputs = match(images.classes, class_names(model.network, count, config.class_names), count)
    if config.labels == "subset":
        keep_classes(model.network, outputs)
        outputs = torch.arange(len(outputs))
        count = len(outputs)
    fit = Fit(TINY_FIT.crop, None, size) if tiny else Fit(size, int(size / model.crop))
    mean, std = _statistics(config, model)
    source = FolderShifts(images, fit, outputs, count, config.corrupted_dir, mean, std)
    return Shared(source, with_front(model.network))


def _trained_here(config: Config, classes: tuple[str, ...]) -> Trained:
    """The stem-vit, trained on the data's clean training images; from the cache if it is there."""
    read = tiny_imagenet if config.data == "tiny-imagenet" else class_folder
    images = read(config.data_dir, "train")
    check_classes(images.files[0].parents[1], images.classes, classes)
    size = config.size or (TINY_FIT.crop if config.data == "tiny-imagenet" else stem_vit.SIZE)
    fit = TINY_FIT if config.data == "tiny-imagenet" else Fit(size, size)
    network: Any = trained_stem_vit(images, fit, config.source, config.stem_weights)
    network.class_names = classes
    return Trained(network, size=size)


def _statistics(config: Config, model: Trained) -> tuple[Triple, Triple]:
    """Mean and deviation of the channels: those asked for, else the model's."""
    found = []
    for flag, values in (("mean", config.mean or model.mean), ("std", config.std or model.std)):
        if len(values) != 3 or (flag == "std" and min(values) <= 0):
            shown = " ".join(f"{v:g}" for v in values)
            raise UserError(f"--{flag} {shown}: give three numbers, deviations above 0")
        found.append((values[0], values[1], values[2]))
    return found[0], found[1]
