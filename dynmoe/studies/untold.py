"""Growth that nobody tells when: blurred and unknown boundaries, and three real sensor streams."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import ClassVar

from dynmoe.lab.experiment import Results
from dynmoe.lab.study import Preset, Study

DATA = Path("data")
SENSORS: dict[str, tuple[str, str]] = {
    "weather": ("weather/NEweather_data.csv", "weather/NEweather_class.csv"),
    "outdoor": ("outdoor/outdoorStream.data", "outdoor/outdoorStream.labels"),
    "elec2": ("elec2/elec2_data.dat", "elec2/elec2_label.dat"),
}
"""Stream -> its rows and labels below `data`, as github.com/vlosing/driftDatasets names them."""
PHOTOS = {
    "laptop": (
        "--dataset tiny-imagenet --dataset.per-class 50 --dataset.test-per-class 10 "
        "--dataset.size 32 --epochs 8"
    ),
    "paper": "--dataset tiny-imagenet --epochs 50",
}
BATCH = {"weather": 8, "outdoor": 1, "elec2": 16}
"""Rows per batch, so that each stream takes 2,200 to 3,800 steps; labels come with the batch."""
SAMPLES = "--eval-samples 64 --probe-samples 64"
COUNTED = "--trigger.rows 16 --trigger.limit 9"
WAIT = f"{COUNTED} --trigger.cooldown 50"
CHOICES: dict[str, tuple[str, ...]] = {
    "drift": tuple(
        f"--trigger drift {WAIT} --trigger.unit deviation --trigger.delta 0.5 "
        f"--trigger.threshold {threshold}"
        for threshold in (8, 5, 12)
    ),
    "adwin": tuple(
        f"--trigger adwin {WAIT} --trigger.confidence {confidence}"
        for confidence in (0.002, 0.05, 0.5)
    ),
    "plateau": tuple(
        f"--trigger plateau {COUNTED} --trigger.patience {patience}" for patience in (100, 50, 200)
    ),
    "gradient": tuple(f"--trigger gradient {WAIT} --trigger.share {s}" for s in (0.2, 0.5)),
    "rank": tuple(f"--trigger rank {WAIT} --trigger.share {s}" for s in (0.7, 0.9)),
    "dormancy": tuple(f"--trigger dormancy {WAIT} --trigger.rise {r}" for r in (0.1, 0.05)),
}
"""Trigger that is not told -> settings that the search may choose among; the first without one."""
TOLD = ("fresh", "told")
ONLINE_ACCURACY = "online_accuracy"


class Untold(Study, name="untold", source="ours; streams after Losing et al. 2016 (ICDM)"):
    """Does growth help where nobody tells of boundaries, by triggers set on another stream?

    Image streams with blurred boundaries and of unknown lengths, on Tiny ImageNet where
    `data/tiny-imagenet-200` is found and else on the embedded fractal images; and the streams
    weather, outdoor and elec2, those of them that are found below `data`. Each trigger's settings
    are chosen on weather, on seeds apart, and used on all streams. Verdicts are about online
    accuracy, which is measured before each row is learnt and needs no boundaries either. `fresh`
    and `told` (trigger `task`) are told of boundaries, where there are some. The order of a sensor
    stream is fixed: seeds vary the network and what it rehearses, and not the data.
    """

    seeds: ClassVar[dict[Preset, int]] = {"laptop": 5, "paper": 10}
    searched_on = "weather"
    search_seeds = 2
    search_metric = ONLINE_ACCURACY

    def streams(self, preset: Preset) -> dict[str, str]:
        """Images, and the sensor streams that are there."""
        photos = (DATA / "tiny-imagenet-200" / "train").is_dir()
        images = f"{PHOTOS[preset] if photos else '--dataset fractal --epochs 4'} {SAMPLES}"
        found = {
            "blurred": f"{images} --protocol blurred",
            "unknown": f"{images} --protocol unknown",
        }
        for name, (rows, labels) in SENSORS.items():
            if (DATA / rows).is_file() and (DATA / labels).is_file():
                files = f"--dataset.file {DATA / rows} --dataset.labels {DATA / labels}"
                found[name] = f"--preset online --batch-size {BATCH[name]} {SAMPLES} {files}"
        return found

    def variants(self, preset: Preset) -> dict[str, str]:
        """No growth, growth that is told, an intervention that needs no boundaries, triggers."""
        return {
            "dense": "--method dense",
            "fresh": "--method fresh",
            "moe-static": "--method moe-static --method.experts 20",
            "parseval": "--method dense --intervention parseval",
            "told": "--method dynamicmoe --granularity 2 --trigger task",
            **{name: grown(choices[0]) for name, choices in CHOICES.items()},
        }

    def variants_on(self, stream: str, preset: Preset) -> dict[str, str]:
        """Sensor streams tell of no boundaries."""
        every = self.variants(preset)
        return {v: f for v, f in every.items() if stream not in SENSORS or v not in TOLD}

    def searches(self, preset: Preset) -> dict[str, list[str]]:
        """The triggers' thresholds and waits."""
        return {name: [grown(own) for own in choices] for name, choices in CHOICES.items()}

    def verdict(self, results: Results) -> list[str]:
        """Each trigger against the dense network, and where there is one the told trigger."""
        sentences = []
        for stream in results.streams:
            for name in CHOICES:
                growths = fmean(len(run["growth"]) for run in results.runs[stream][name])
                says = results.says(stream, name, "dense", ONLINE_ACCURACY, "mean")
                sentences.append(f"{says} It grew {growths:.1f} times per run.")
            if "told" in results.runs[stream]:
                sentences += [
                    results.says(stream, name, "told", ONLINE_ACCURACY, "mean") for name in CHOICES
                ]
        return [*sentences, self.about(results)]

    def about(self, results: Results) -> str:
        """The data that the streams are made of, and what was not there."""
        parts = [f"{s} on {runs['dense'][0]['dataset']}" for s, runs in results.runs.items()]
        missing = [name for name in SENSORS if name not in results.runs]
        left_out = f" Not run here, or not found below {DATA}: {', '.join(missing)}."
        chosen = "on weather" if "weather" in results.runs else "as they had been before on weather"
        return (
            f"Data: {'; '.join(parts)}.{left_out if missing else ''} Triggers were set {chosen}, "
            "on seeds apart. Seeds of weather, outdoor and elec2 vary the network alone: the order "
            "of rows is fixed."
        )


def grown(trigger: str) -> str:
    """Flags of a network that grows by a trigger."""
    return f"--method dynamicmoe --granularity 2 {trigger}"
