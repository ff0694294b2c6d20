"""Training a `StemViT` on photographs: its frozen stem once per image, then the transformer.

The stem's tokens of every training image and of its mirror image are written to parts of 1000
images in the cache folder, as float16; the transformer learns from these. Both go on where they
were stopped: a part that is there is read, and a step of training draws from a generator of its
own. The trained weights are kept in the cache folder under a digest of all that decides them, and
the parts are removed.

Shapes: B images, N places of the stem's output, F its channels.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_benchmarks.backbone import trained_once
from cl_benchmarks.images import READER_VERSION, check_least
from cl_benchmarks.shifts.domain import Files
from cl_benchmarks.shifts.folders import ClassImages, Fit
from cl_benchmarks.stem_vit import STAGES, STEM, StemViT
from cl_benchmarks.weights import load_weights, read_weights
from dynmoe import seeding
from dynmoe.errors import ResourceError, UserError
from dynmoe.lab import cache, checkpoint
from dynmoe.lab.files import disk_full
from dynmoe.lab.progress import ProgressLine

VERSION = 1
"""Raise it when the same settings give other weights: cached ones are then trained again."""
PART, BATCH = 1000, 8
"""Images in a file of the stem's tokens, and through the stem at a time (more is slower)."""
CHECKPOINT_S = 60.0
"""Seconds of training that a kill can cost."""
WARM_UP, CLIP = 0.1, 1.0
"""Share of the steps in which the learning rate rises, and the largest norm of a gradient."""


@dataclass(frozen=True, kw_only=True)
class StemVitTraining:
    """A stem-vit and how its transformer is trained on clean images."""

    width: int = 192
    """features of a token"""
    depth: int = 6
    """blocks; each has two LayerNorms, and one follows the last"""
    heads: int = 6
    """attention heads; divide the width"""
    mlp_ratio: float = 3.0
    """hidden units of a block's MLP over the width"""
    epochs: float = 2.5
    """passes over the images"""
    per_class: int = 0
    """training images of each class, the first by name; 0 for all"""
    batch_size: int = 128
    """images per step"""
    lr: float = 1e-3
    """highest learning rate of AdamW; it rises over the first tenth and falls to 0 as a cosine"""
    weight_decay: float = 0.05
    """of AdamW"""
    mixup: float = 0.2
    """a of the Beta(a, a) by which the tokens of two images are mixed; 0 for none"""
    smoothing: float = 0.05
    """label smoothing"""
    seed: int = 0
    """of initial weights, batches, mirroring and mixing"""
    threads: int = 0
    """CPU threads; 0 for one per core. Sums over other numbers of threads round otherwise"""

    def check(self) -> None:
        """Refuse settings that cannot work.

        Raises:
            UserError: names the value.
        """
        check_least("source", self, depth=1, per_class=0, batch_size=2, heads=1, mixup=0,
                    smoothing=0, weight_decay=0, threads=0, width=1)  # fmt: skip
        if self.width % self.heads:
            raise UserError(f"source heads {self.heads} do not divide the width {self.width}")
        for name in ("epochs", "lr", "mlp_ratio"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"source {name} {getattr(self, name)} must be a number above 0")


def trained_stem_vit(
    images: ClassImages, fit: Fit, training: StemVitTraining, stem_weights: Path | None
) -> nn.Module:
    """A StemViT trained on clean images, in evaluation mode; from the cache if it is there.

    Args:
        images: the training images.
        fit: makes them square, as the images that the model will meet.
        training: its settings.
        stem_weights: a file with the stem, see `load_stem`; None lets timm fetch it.

    Raises:
        UserError: settings that cannot work, stem weights that cannot be had or do not fit, images
            that cannot be read.
        ResourceError: the cache folder cannot hold the stem's tokens.
    """
    training.check()
    images = _first(images, training.per_class)
    with seeding.seeded(training.seed, "stem-vit"):
        t = training
        model = StemViT(len(images.classes), t.width, t.depth, t.heads, t.mlp_ratio)
    load_stem(model, stem_weights)
    features = cache.digest({
        "version": VERSION, "reader": READER_VERSION, "stem": _fingerprint(model.stem.state_dict()),
        "files": cache.file_states(images.files), "fit": asdict(fit),
    })  # fmt: skip
    key = cache.digest({
        "version": VERSION, "features": features, "classes": list(images.classes),
        "labels": hashlib.sha256(str(images.labels).encode()).hexdigest(), **asdict(training),
    })  # fmt: skip

    def train() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(training.threads or os.cpu_count() or 1)
        folder, steps = cache.folder() / f"stem-{features}", cache.folder() / f"stem-vit-{key}"
        try:
            parts = write_features(model, images, fit, folder)
            train_transformer(model, parts, torch.tensor(images.labels), training, steps)
        finally:
            torch.set_num_threads(threads)
        for done in (folder, steps):
            shutil.rmtree(done, ignore_errors=True)

    return trained_once(model, f"stem-vit-{key}", train)


def load_stem(model: StemViT, file: Path | None) -> None:
    """Give a StemViT its stem.

    Args:
        model: gets it, in place.
        file: weights of timm's whole tf_efficientnet_lite0, or of a StemViT; None: timm's cache or
            the network.

    Raises:
        UserError: it cannot be fetched or read, or the file is that of another network.
    """
    import timm

    values = read_weights(file) if file is not None else None
    if values is not None and any(name.startswith("stem.") for name in values):
        assert file is not None
        own = {k.removeprefix("stem."): v for k, v in values.items() if k.startswith("stem.")}
        load_weights(model.stem, own, file)
        return
    try:
        with seeding.kept():
            net: Any = timm.create_model(STEM, pretrained=values is None)
    except Exception as error:  # no network, or whatever a mirror answers
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"the weights of timm's {STEM} cannot be fetched ({reason}); give them as "
            "--stem-weights FILE"
        ) from None
    if values is not None:
        assert file is not None
        load_weights(net, values, file)
    stages = list(net.blocks.children())[:STAGES]
    model.stem.load_state_dict(nn.Sequential(net.conv_stem, net.bn1, *stages).state_dict())


def write_features(
    model: StemViT, images: ClassImages, fit: Fit, folder: Path
) -> list[np.ndarray[Any, Any]]:
    """The stem's tokens of images and mirror images, in files that are mapped, not read.

    Returns:
        parts of 1000 images: float16 [n, 2, N, F]; the second of the 2 is the mirror image's.

    Raises:
        ResourceError: the disk is full, or the folder cannot be written.
        UserError: an image that cannot be read.
    """
    domain = Files("train", images.files, torch.tensor(images.labels), fit.resize, fit.crop)
    starts = range(0, len(domain), PART)
    paths = [folder / f"part-{number:05d}.npy" for number in range(len(starts))]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_room(folder, len(domain) - PART * sum(path.exists() for path in paths), model)
        with ProgressLine("stem of the source model", len(domain), "images") as progress:
            for path, start in zip(paths, starts, strict=True):
                if not path.exists():
                    stop = min(start + PART, len(domain))
                    _save(path, _tokens(model, domain, range(start, stop)))
                    progress.update(stop)
                else:
                    progress.start_at(min(start + PART, len(domain)))
    except OSError as error:
        raise ResourceError(f"{folder} cannot be written: {error.strerror}") from None
    return [np.load(path, mmap_mode="r") for path in paths]


def train_transformer(
    model: StemViT,
    parts: list[np.ndarray[Any, Any]],
    labels: Tensor,
    training: StemVitTraining,
    folder: Path,
) -> None:
    """AdamW on the cross-entropy of mixed, mirrored images; resumable.

    Args:
        model: trained in place, but for its stem.
        parts: see `write_features`.
        labels: int64 [images].
        training: its settings.
        folder: of the checkpoints.
    """
    model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, training.lr, weight_decay=training.weight_decay)
    per_epoch = -(-len(labels) // training.batch_size)
    steps, first = max(round(training.epochs * per_epoch), 1), 0
    if (state := checkpoint.load_latest(folder)) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    saved = time.monotonic()
    with ProgressLine("source model", steps) as progress:
        progress.start_at(first)
        for step in range(first, steps):
            for group in optimizer.param_groups:
                group["lr"] = training.lr * schedule(step, steps)
            loss = _step_loss(model, parts, labels, training, step)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, CLIP)
            optimizer.step()
            if progress.due(step + 1):
                progress.update(step + 1, loss=loss.item())
            if time.monotonic() - saved > CHECKPOINT_S:
                state = {"step": step + 1, "model": model.state_dict(),
                         "optimizer": optimizer.state_dict()}  # fmt: skip
                checkpoint.save(folder, step + 1, state)
                saved = time.monotonic()
    model.eval()


def schedule(step: int, steps: int) -> float:
    """The learning rate of a step over the highest: up in a straight line, then down as a cosine.

    Args:
        step: 0 .. steps - 1.
        steps: in all.
    """
    rise = max(WARM_UP * steps, 1)
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


def _step_loss(
    model: StemViT, parts: list[np.ndarray[Any, Any]], labels: Tensor, t: StemVitTraining, step: int
) -> Tensor:
    """The loss of a step, with all that it draws decided by its number."""
    count = len(labels)
    epoch, number = divmod(step, -(-count // t.batch_size))
    order = torch.randperm(count, generator=seeding.generator(t.seed, "order", epoch))
    chosen = order[number * t.batch_size : (number + 1) * t.batch_size]
    generator = seeding.generator(t.seed, "step", step)
    mirrored = torch.randint(2, (len(chosen),), generator=generator)
    pairs = zip(chosen.tolist(), mirrored.tolist(), strict=True)
    rows = [parts[i // PART][i % PART, m] for i, m in pairs]
    tokens, target = torch.from_numpy(np.stack(rows)).float(), labels[chosen]
    if not t.mixup:
        return F.cross_entropy(model.transformer(tokens), target, label_smoothing=t.smoothing)
    share = float(
        np.random.default_rng(seeding.derive(t.seed, "mixup", step)).beta(t.mixup, t.mixup)
    )
    other = torch.randperm(len(chosen), generator=generator)
    logits = model.transformer(share * tokens + (1 - share) * tokens[other])
    own, others = (F.cross_entropy(logits, y, label_smoothing=t.smoothing)
                   for y in (target, target[other]))  # fmt: skip
    return share * own + (1 - share) * others


@torch.no_grad()
def _tokens(model: StemViT, domain: Files, indices: range) -> np.ndarray[Any, Any]:
    """float16 [n, 2, N, F] of some images and their mirror images."""
    model.eval()
    found = []
    for start in range(indices.start, indices.stop, BATCH):
        x = domain.images(range(start, min(start + BATCH, indices.stop))).float() / 255
        pair = torch.stack([model.features(x), model.features(x.flip(3))], dim=1)
        found.append(pair.half().numpy())
    return np.concatenate(found)


def _first(images: ClassImages, per_class: int) -> ClassImages:
    """The first images of each class, in their order; 0 for all."""
    if not per_class:
        return images
    seen: dict[int, int] = {}
    kept = []
    for number, label in enumerate(images.labels):
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= per_class:
            kept.append(number)
    files, labels = (tuple(images.files[i] for i in kept), tuple(images.labels[i] for i in kept))
    return ClassImages(images.name, images.classes, files, labels)


def _check_room(folder: Path, images: int, model: StemViT) -> None:
    needed = images * 2 * model.pos_embed[0, 1:].shape[0] * model.embed.in_features * 2
    if shutil.disk_usage(folder).free < needed:
        raise disk_full(folder / "part", needed)


def _save(path: Path, values: np.ndarray[Any, Any]) -> None:
    """Write an array so that a part is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.save(file, values)
    os.replace(temporary, path)


def _fingerprint(values: Mapping[str, Tensor]) -> str:
    """Of weights: names and values."""
    found = hashlib.sha256()
    for name, value in values.items():
        found.update(name.encode() + value.contiguous().view(-1).numpy().tobytes())
    return found.hexdigest()
