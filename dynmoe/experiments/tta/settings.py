"""The settings of a run of test-time adaptation, as `python -m dynmoe.tta` takes them."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from cl_benchmarks.shifts.embedded import EmbeddedConfig
from cl_benchmarks.stem_training import StemVitTraining
from dynmoe.errors import UserError
from dynmoe.lab.config import KEEPING, RUNNING, RunConfig, place
from dynmoe.registry import PartConfig, slot
from dynmoe.tta.options import for_classes, make_config

BASELINES = ("noadapt", "tent", "eata", "sar", "deyo", "cotta", "becotta")


@dataclass(frozen=True, kw_only=True)
class SmallVit:
    """The embedded source model, a vision transformer, and how it is trained on clean images."""

    patch: int = 8
    """side of a patch in pixels; divides the image side"""
    width: int = 96
    """features of a token"""
    depth: int = 4
    """blocks; each has two LayerNorms, and one follows the last"""
    heads: int = 3
    """attention heads; divide the width"""
    epochs: int = 8
    """passes over the clean training images"""
    batch_size: int = 128
    """images per step"""
    lr: float = 2e-3
    """highest learning rate of AdamW; it rises over the first tenth and falls to 0 as a cosine"""
    weight_decay: float = 0.05
    smoothing: float = 0.1
    """label smoothing: without it the model is sure of nearly every answer, also of wrong ones"""
    jitter: float = 0.5
    """training images are multiplied by 1-jitter .. 1 and raised by 0 .. jitter/2, at random;
    without it, brightness and contrast at severity 5 leave the model at chance"""
    seed: int = 0
    """of initial weights and batches"""


STEM_VIT = "stem-vit"
"""The model that `--train-source` trains."""
REAL = ("data_dir", "labels", "model", "pretrained", "weights", "train_source")
FITTING = ("on_the_fly", "corrupted_dir", "model_options", "class_names", "size", "mean", "std",
           "stem_weights")  # fmt: skip
"""These two hold the settings of real data; the latter are told in short by `--help`."""
TRAINING = ("train_source", "stem_weights", "source")
"""Settings of the training of a source model on photographs."""
MADE_HERE = ("tiny-imagenet", "folder")
"""Data whose corruptions are made here, unless published ones are given."""


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Settings of a comparison of methods on shifted streams."""

    GROUPS: ClassVar[dict[str, tuple[str, ...]]] = {
        "What to run": ("method", "compare", "streams", "seeds", "seed"),
        "Stream": ("order", "severity", "batch_size", "limit", "lr_scale"),
        "Data and source model": ("data", *REAL, "source", "embedded", "vit"),
        "Fitting data and model to each other": FITTING,
        "Measurements": ("window", "routing_batches", "gates", "clean_every", "clean_images"),
        "Runs": (*KEEPING, "keep_model", *RUNNING),
    }
    BRIEF: ClassVar[tuple[str, ...]] = ("Fitting data and model to each other", "Measurements")

    method: PartConfig = slot("tta", "moetta")
    compare: tuple[str, ...] = place(BASELINES)
    """methods to run as well, each as NAME or NAME:OPTION=VALUE,OPTION=VALUE; none if nothing
    follows the flag"""
    streams: tuple[str, ...] = ("classical", "potpourri", "potpourri+")
    """what is adapted to, one run each: classical, classical+, potpourri, potpourri+, validation,
    all-corruptions, or domains of your own joined by +, as in fog+snow+clean"""
    seeds: int = place(3)
    """runs of each method and stream, with seeds `seed`, `seed` + 1, ...; a seed decides the
    stream's images and order and what the method draws"""
    jobs: int = place(os.cpu_count() or 1)
    """runs at a time, each a process; the results do not depend on it"""
    order: Literal["mixed", "sequential", "gradual"] = "mixed"
    """mixed: all images shuffled together; sequential: one domain after another; gradual: the same
    with severities 1 2 3 4 5 4 3 2 1 in each corruption"""
    severity: int = 5
    """of the corruptions, 1 to 5; gradual has its own"""
    batch_size: int = 64
    """images per step of adaptation"""
    limit: int | None = None
    """images of each domain, drawn at random; None for all"""
    lr_scale: float = 1.0
    """multiplies the learning rate of every method"""
    data: Literal["embedded", "imagenet", "tiny-imagenet", "folder"] = "embedded"
    """embedded: fractals under our 32-pixel corruptions; imagenet: the real sets in --data-dir;
    tiny-imagenet: its validation images; folder: images of one folder per class"""
    data_dir: Path | None = None
    """holds imagenet-c, imagenet-r, imagenet-a, imagenet-sketch/sketch, imagenet-1k_2012/val; or
    tiny-imagenet-200; or class folders"""
    labels: Literal["all-1000", "subset"] = "all-1000"
    """all-1000: the model answers with all its classes (MoETTA's protocol). subset: its outputs are
    cut down to the data's classes; of imagenet in the streams rendition and adversarial alone"""
    on_the_fly: bool = False
    """make imagenet's corruptions of the clean validation set here (needs dynmoe[tta]), cached on
    disk"""
    corrupted_dir: Path | None = None
    """published corruptions DIR/NAME/SEVERITY/CLASS/* of tiny-imagenet or folder, such as
    Tiny-ImageNet-C; without it they are made here"""
    model: str = "vit_base_patch16_224"
    """source model of real data: timm's name, stem-vit, or path.py:function"""
    pretrained: bool = False
    """fetch the source model's weights through timm"""
    weights: Path | None = None
    """file with the source model's weights, for use without a network"""
    train_source: bool = False
    """train a stem-vit on the clean training images of tiny-imagenet or folder (once, resumable)"""
    stem_weights: Path | None = None
    """weights of its stem (timm's tf_efficientnet_lite0); without it timm fetches them"""
    source: StemVitTraining = field(default_factory=StemVitTraining)
    """the stem-vit that --train-source trains, and how"""
    model_options: str = "{}"
    """arguments of the model as JSON, such as '{"img_size": 70}'"""
    class_names: Path | None = None
    """names of the model's outputs, one per line: matched with the data's class folders"""
    size: int = 0
    """side of the model's input in pixels; 0: as the model tells, else the data's"""
    mean: tuple[float, ...] = ()
    """of the channels of images in 0 .. 1, three numbers; none: the model's"""
    std: tuple[float, ...] = ()
    """deviation of the channels, likewise"""
    embedded: EmbeddedConfig = field(default_factory=EmbeddedConfig)
    vit: SmallVit = field(default_factory=SmallVit)
    window: int = 5
    """batches whose accuracy makes one point of the curves"""
    routing_batches: int = 10
    """batches at the end of a stream on which the learned routing is compared with others, at the
    weights that the stream has left; 0: none"""
    gates: int = 16
    """images of each domain, on which Tent's runs measure whether the stream can show what experts
    are worth (docs/tta.md, Gates), before they begin; 0: none, else at least 4"""
    clean_every: int = 0
    """batches between two looks at clean images that the stream does not show; 0: none"""
    clean_images: int = 200
    """how many clean images those are; of small sets, or without --limit, the stream may show some
    of them"""
    keep_model: bool = place(False)
    """keep method and model as the stream leaves them, for `dynmoe export`"""

    def unused(self) -> dict[str, str]:
        """Setting -> why it has no effect, and what to do."""
        from cl_benchmarks.shifts.stream import OTHERS, domains_of

        reasons = self._unused_data()
        known = [domains_of(name) for name in self.streams]
        if all(name in (*OTHERS, "clean") for domains in known for name in domains):
            reasons["severity"] = "no stream of --streams has corruptions; add classical"
        elif self.order == "gradual":
            reasons["severity"] = "--order gradual has severities of its own; use another order"
        if not self.clean_every:
            reasons["clean_images"] = "--clean-every 0 never looks at them"
        names = {self.method.part.name, *(text.partition(":")[0] for text in self.compare)}
        if names == {"noadapt"}:
            reasons["lr_scale"] = "noadapt learns nothing; add a method that does"
        if "tent" not in names:
            reasons["gates"] = "they are measured in runs of tent; add it to --compare"
        elif all(len(domains) == 1 for domains in known):
            reasons["gates"] = "no stream of --streams has several domains; add classical"
        if names <= {*BASELINES, "mgtta"}:
            reasons["routing_batches"] = "no method has experts; add moetta"
        return reasons

    def _unused_data(self) -> dict[str, str]:
        """`unused` of data and source model."""
        if self.data == "embedded":
            return dict.fromkeys((*REAL, *FITTING, "source"), "it is for --data imagenet, "
                                 "tiny-imagenet or folder (now embedded)")  # fmt: skip
        now = f"(now {self.data})"
        reasons = dict.fromkeys(("embedded", "vit"), f"it is for --data embedded {now}")
        if self.data in MADE_HERE:
            reasons["on_the_fly"] = "corruptions are made here, unless --corrupted-dir is given"
        else:
            there = f"it is for --data {' or '.join(MADE_HERE)} {now}"
            reasons |= dict.fromkeys(("corrupted_dir", *TRAINING), there)
        if not self.train_source:
            reasons |= dict.fromkeys(("stem_weights", "source"), "it is for --train-source")
        else:
            given = ("pretrained", "weights", "model_options", "class_names", "mean", "std")
            reasons |= dict.fromkeys(given, "--train-source makes the model")
            if self.model != STEM_VIT:
                reasons["model"] = f"--train-source makes a {STEM_VIT}"
        return reasons


def check_streams(config: Config) -> None:
    """Refuse streams with domains that the data do not have.

    Raises:
        UserError: names the stream, and those that there are.
    """
    from cl_benchmarks.shifts.stream import EXTRA, OTHERS, STREAMS, domains_of

    missing: tuple[str, ...] = EXTRA if config.data == "embedded" else ()
    if config.data in MADE_HERE:
        missing = OTHERS
    for stream in config.streams:
        if not set(domains_of(stream)) & set(missing):
            continue
        if config.data == "embedded":
            raise UserError(f"the stream {stream} needs --data imagenet: its corruptions have no "
                            "32-pixel version")  # fmt: skip
        usable = [name for name, domains in STREAMS.items() if not set(domains) & set(missing)]
        raise UserError(f"--data {config.data} has nothing for the stream {stream}; use "
                        f"--streams {', '.join(usable)}")  # fmt: skip


def parse_variant(text: str, classes: int) -> PartConfig:
    """The Config that `NAME` or `NAME:OPTION=VALUE,OPTION=VALUE` stands for.

    Args:
        text: the variant; values are read as JSON (0.5, true, null) and else taken as they stand.
        classes: of the data; decides the options that `text` leaves open, see `for_classes`.

    Raises:
        UserError: an unknown method or option, or an option without a value.
    """
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for pair in filter(None, re.split(r",(?![^\[]*\])", rest)):  # commas in a list stay
        option, equals, value = pair.partition("=")
        option = option.strip().replace("-", "_")
        if not equals:
            raise UserError(f"variant {text!r} must read NAME:OPTION=VALUE,OPTION=VALUE")
        try:
            options[option] = json.loads(value)
        except json.JSONDecodeError:
            options[option] = value.strip()
    return for_classes(make_config(name, options), classes)


def for_run(config: PartConfig, lr_scale: float, seed: int, model: nn.Module) -> PartConfig:
    """The same options with the learning rate multiplied, and the method's draws from `seed`.

    Args:
        config: the method's options.
        lr_scale: multiplies its learning rate, if it has one.
        seed: is added to its seed, if it has one.
        model: what it will adapt; a copy is asked for a rate that depends on other options.

    Raises:
        UserError: the method cannot adapt this model.
    """
    changes: dict[str, Any] = {}
    if hasattr(config, "lr") and lr_scale != 1:
        lr = config.lr
        if lr is None:
            lr = config.build(copy.deepcopy(model)).optimizer.param_groups[0]["lr"]
        changes["lr"] = lr * lr_scale
    if hasattr(config, "seed"):
        changes["seed"] = config.seed + seed
    return dataclasses.replace(config, **changes)
