"""`python -m dynmoe.dg`: domain generalisation, leaving one domain out at a time.

The presets; the work is in `experiment.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cl_benchmarks.backbone import SmallVit
from dynmoe.experiments.dg.settings import Config
from dynmoe.lab.config import parse
from dynmoe.lab.names import preset_and_changes
from dynmoe.lab.results import Result
from dynmoe.registry import get

if TYPE_CHECKING:
    from dynmoe.lab.experiment import Experiment

__all__ = ["Config", "experiment", "main", "presets", "run"]

DESCRIPTION = """Domain generalisation: adapt a pre-trained vision transformer to some domains and
measure it on a new domain, each in turn (DomainBed's protocol). MoE2 mixes adapters per image;
--compare names baselines. Runs go to runs/dg/NAME/seed-N, tables and figures to
runs/dg/NAME/report.

Cost: laptop (embedded images and backbone): minutes on two cores. minute: one trial beside a linear
probe. smoke: seconds. photos (PACS, a small pre-trained transformer over a frozen stem; give
--domains.data-dir and --weights): 2,400 steps per method at 48 images a step. paper (ViT-B/16, one
data set at a time): 60,000 steps per method at 96 images a step, for a GPU."""
MAIN = ("erm", "linear-probe", "lora", "kadaptation", "moa")


def presets() -> dict[str, Config]:
    """Ready settings by name; the first is the default."""
    laptop = Config(
        threads=1,
        compare=MAIN,
        steps=200,
        eval_every=40,
        batch_size=16,
        lr=2e-3,
    )
    minute = replace(laptop, compare=("linear-probe",), seeds=1, jobs=2)
    smoke = replace(
        laptop,
        compare=("linear-probe",),
        seeds=1,
        jobs=1,
        steps=6,
        eval_every=3,
        batch_size=8,
        features=10,
        domains=get("domains", "embedded").Config(
            styles=("plain", "coloured", "edges"), classes=3, per_class=10
        ),
        vit=SmallVit(per_class=2, epochs=1, depth=2),
    )
    paper = Config(
        domains=get("domains", "pacs").Config(),
        model="vit_base_patch16_clip_224.laion2b",
        eval_every=200,
        augment=True,
        jobs=1,
        compare=MAIN,
    )
    photos = replace(
        laptop,
        domains=get("domains", "pacs").Config(),
        model="stem-vit",
        compare=("erm", "linear-probe", "lora", "kadaptation", "moa"),
        eval_every=200,  # at the end: the last step has always been the best on held-out images
        lr=5e-4,
    )
    ready = {"laptop": laptop, "minute": minute, "smoke": smoke, "paper": paper}
    return ready | {"photos": photos}


def experiment() -> Experiment:
    """What this command does."""
    from dynmoe.experiments.dg.experiment import DomainGeneralisation

    return DomainGeneralisation()


def run(config: Config, preset: str = "own") -> Result:
    """Run these settings from Python: all methods and seeds.

    Args:
        config: the settings, such as `replace(presets()["smoke"], epochs=1)`.
        preset: begins the names of run folders where `config.name` is None.
    """
    from dynmoe.lab.report import run_all

    return run_all(experiment(), preset, config)


def main(argv: list[str]) -> None:
    """Read the command line, train all methods in all trials, show and draw the results."""
    preset, config = parse(presets(), argv, "python -m dynmoe.dg", DESCRIPTION)
    run(config, preset_and_changes(preset, presets()[preset], config))
