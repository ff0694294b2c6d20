"""`python -m dynmoe.tta`: methods of test-time adaptation on streams of shifted images.

The presets are in `presets.py`, the work is in `experiment.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynmoe.experiments.tta.presets import presets
from dynmoe.experiments.tta.settings import Config
from dynmoe.lab.config import parse
from dynmoe.lab.names import preset_and_changes
from dynmoe.lab.results import Result

if TYPE_CHECKING:
    from dynmoe.lab.experiment import Experiment

__all__ = ["Config", "experiment", "main", "presets", "run"]

DESCRIPTION = """Test-time adaptation: a trained model sees corrupted and otherwise shifted images
and goes on learning from them without labels. Every method runs on every stream with every seed;
finished runs are read, and stopped runs go on where they were. Runs, results.json and the
figure go to runs/tta; `tensorboard --logdir runs` shows the runs.

laptop: embedded fractals and a small vision transformer, which is trained once (about a minute)
and cached; minute: five methods on one of its streams, 12 classes, one seed; smoke: seconds, shows
that all works; imagenet: real sets (--data-dir DIR) and a timm model (--pretrained, or --weights
FILE); tiny-imagenet: a stem-vit (--train-source, or --weights FILE)."""


def experiment() -> Experiment:
    """What this command does."""
    from dynmoe.experiments.tta.experiment import TestTimeAdaptation

    return TestTimeAdaptation()


def run(config: Config, preset: str = "own") -> Result:
    """Run these settings from Python: all methods, streams and seeds.

    Args:
        config: the settings, such as `replace(presets()["smoke"], epochs=1)`.
        preset: begins the names of run folders where `config.name` is None.
    """
    from dynmoe.lab.report import run_all

    return run_all(experiment(), preset, config)


def main(argv: list[str]) -> None:
    """Read the command line, run the methods on the streams, show and draw the results."""
    preset, config = parse(presets(), argv, "python -m dynmoe.tta", DESCRIPTION)
    run(config, preset_and_changes(preset, presets()[preset], config))
