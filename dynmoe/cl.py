"""`python -m dynmoe.cl`: a growing mixture of experts, or what it is compared with, on a stream.

This file holds the presets; the settings are in `cl_benchmarks.settings`, the work is in
`cl_benchmarks.experiment`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dynmoe.commands import begin
from dynmoe.lab.config import parse, run_command
from dynmoe.lab.names import preset_and_changes
from dynmoe.lab.results import Result
from dynmoe.registry import get

begin("cl", __name__)  # before imports that may fail

from cl_benchmarks.settings import Config  # noqa: E402
from dynmoe.growth import Budget  # noqa: E402
from dynmoe.growth.old_experts import OldExperts  # noqa: E402

if TYPE_CHECKING:
    from dynmoe.lab.experiment import Experiment

__all__ = ["Config", "experiment", "main", "presets", "run"]

DESCRIPTION = """Continual learning: does a network that grows experts keep its ability to learn
(its plasticity)? Results go to runs/cl/NAME/seed-N; `tensorboard --logdir runs` shows them.

Cost: smoke and minute (growth beside a dense network), under a minute on 2 cores; laptop and plain,
3 minutes with two comparisons. Per method: tiny and keep (parts of Tiny ImageNet), 2 minutes; pairs
(300 two-class tasks of it), 10; online, 3 for 45,000 rows; tiny-long, an hour; paper (VGG-16, 55
million images), 15 days. `torchrun` divides a run between processes."""


def presets() -> dict[str, Config]:
    """Ready settings by name; the first is the default."""
    laptop = Config(threads=1)  # networks this small are slower on two threads than on one
    smoke = replace(
        laptop,
        chunks=3,
        epochs=10,
        dataset=get("dataset", "digits").Config(),
        protocol=get("protocol", "shuffle").Config(images=300),
        network=get("network", "mlp").Config(),
    )
    minute = replace(laptop, granularity=2, compare=("dense",), jobs=2)
    plain = replace(
        laptop,
        router=get("router", "softmax").Config(),
        gate_scale="one",
        pruning=get("pruning", "utility").Config(),
        init=get("init", "random").Config(router="new"),
    )
    paper = replace(
        plain,
        threads=0,
        dataset=get("dataset", "tiny-imagenet").Config(),
        protocol=get("protocol", "iid").Config(),
        access="cumulative",
        network=get("network", "vgg16").Config(),
        epochs=100,
        batch_size=256,
        clip=0.5,
        reset_optimizer=True,
        augment="crop-flip",
        precision="bfloat16",
        channels_last=True,
        eval_samples=2000,
        probe_samples=1024,
    )
    ready = {"laptop": laptop, "minute": minute, "smoke": smoke, "plain": plain, "paper": paper}
    return ready | _of_real_data(laptop)


def _of_real_data(laptop: Config) -> dict[str, Config]:
    """Presets for two cores whose data are files of the user."""
    tiny = replace(
        laptop,
        dataset=get("dataset", "tiny-imagenet").Config(per_class=100),
        protocol=get("protocol", "class").Config(head="full"),
        network=get("network", "cnn").Config(channels=32),
        epochs=10,
    )
    tiny_long = replace(
        tiny,
        dataset=get("dataset", "tiny-imagenet").Config(),
        epochs=50,
        eval_samples=1000,
        probe_samples=512,
    )
    online = replace(
        laptop,
        dataset=get("dataset", "stream").Config(scale="past"),
        protocol=get("protocol", "online").Config(updates=2),
        network=get("network", "mlp").Config(),
        trigger=get("trigger", "drift").Config(
            rows=16, cooldown=50, unit="deviation", threshold=8.0, delta=0.5
        ),
        compare=("dense",),
        epochs=1,
        batch_size=1,
    )
    pairs = replace(
        laptop,
        dataset=get("dataset", "tiny-imagenet").Config(size=32),
        protocol=get("protocol", "pairs").Config(),
        trigger=get("trigger", "every").Config(steps=6000),
        compare=("dense", "l2-init", "cbp"),
        chunks=300,
        epochs=20,
        batch_size=100,
        optimizer="sgd",
        lr=0.03,
        measure_every=30,
    )
    keep = replace(
        laptop,
        dataset=get("dataset", "tiny-imagenet").Config(size=32, classes=10, per_class=250),
        protocol=get("protocol", "domains").Config(images="same"),
        network=get("network", "cnn").Config(
            neck=False, place="head", hidden=1024, norm=True, statistics=True
        ),
        intervention=get("intervention", "freeze").Config(),
        router=get("router", "gaussian").Config(),
        init=get("init", "random").Config(router="new"),
        budget=Budget(mode="per-growth", start="share"),
        old_experts=OldExperts(lr=0.1),
        granularity=1,
        compare=("fresh", "reset-block"),
        chunks=5,
        epochs=12,
    )
    real = {"tiny": tiny, "tiny-long": tiny_long, "keep": keep}
    return real | {"online": online, "pairs": pairs}


def experiment() -> Experiment:
    """What this command does."""
    from cl_benchmarks.experiment import ContinualLearning

    return ContinualLearning()


def run(config: Config, preset: str = "own") -> Result:
    """Run these settings from Python: the method and its comparisons.

    Args:
        config: the settings, such as `replace(presets()["smoke"], epochs=1)`.
        preset: begins the names of run folders where `config.name` is None.
    """
    from dynmoe.lab.report import run_all

    return run_all(experiment(), preset, config)


def main(argv: list[str]) -> None:
    """Read the command line, run the method and its comparisons, show and draw the results."""
    preset, config = parse(presets(), argv, "python -m dynmoe.cl", DESCRIPTION)
    run(config, preset_and_changes(preset, presets()[preset], config))


if __name__ == "__main__":
    run_command(main)
