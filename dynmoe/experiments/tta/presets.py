"""Ready settings of `python -m dynmoe.tta`."""

from __future__ import annotations

from dataclasses import replace

from cl_benchmarks.shifts.embedded import EmbeddedConfig
from dynmoe.experiments.tta.settings import STEM_VIT, Config, SmallVit

LAPTOP_LR = 10.0
"""Multiplies the published learning rates, which are meant for streams a hundred times as long."""


def presets() -> dict[str, Config]:
    """Ready settings by name; the first is the default."""
    laptop = Config(threads=1, seeds=5, lr_scale=LAPTOP_LR, batch_size=32)
    smoke = replace(
        laptop,
        streams=("potpourri+",),
        seeds=1,
        jobs=1,
        batch_size=16,
        embedded=EmbeddedConfig(classes=4, size=16, train_per_class=20, test_per_class=4),
        vit=SmallVit(width=16, depth=2, heads=2, epochs=2, batch_size=16),
    )
    minute = replace(
        laptop,
        streams=("classical",),
        seeds=1,
        jobs=2,
        compare=("noadapt", "tent", "sar", "deyo"),
        embedded=EmbeddedConfig(classes=12, test_per_class=20),  # a source model in half the time
    )
    imagenet = Config(data="imagenet", window=100, jobs=1)
    tiny = Config(
        data="tiny-imagenet", model=STEM_VIT, streams=("classical+",), window=25, threads=1
    )
    ready = {"laptop": laptop, "minute": minute, "smoke": smoke, "imagenet": imagenet}
    return ready | {"tiny-imagenet": tiny}
