"""Hundreds of two-class tasks: does this code meet the published order of the curves?"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from dynmoe.lab.experiment import Experiment, Results
from dynmoe.lab.figures import band, chance_line, looks, new_figure, save
from dynmoe.lab.statistics import confidence_interval
from dynmoe.lab.study import Preset, Study
from dynmoe.studies.keeping import PHOTOS, UNMEASURED, about, points

TASKS = 150
BLOCKS = 10
"""Parts of the stream; the first and the last are compared, and the figure has a point each."""
GROWN = "--method dynamicmoe --granularity 2 --trigger every --trigger.steps 1200"
"""Growth every 15 tasks of 80 steps."""
PUBLISHED = ("l2-init", "cbp", "shrink-perturb")
"""Interventions that are published to hold what plain training loses."""


class Pairs(Study, name="pairs", source="Dohare et al. 2024 (Nature 632, 768-774), Figure 1"):
    """Does plain training lose plasticity over hundreds of two-class tasks, and what holds it?

    Published: test accuracy of plain backpropagation falls, also below its start, and that of
    continual backpropagation, shrink-and-perturb and regularisation does not (Dohare et al. 2024;
    L2 Init: Kumar et al. 2023). Against the paper (2,000 tasks and more of 1,200 images for 250
    epochs, step sizes of at most 0.01) tasks are few and short and the step size is large (0.05,
    momentum 0.9), so that the loss shows in so short a stream. Gradients are clipped at norm 10: in
    a trial without, continual backpropagation diverged; at norm 1 the loss did not show. The
    strength of each intervention is chosen on seeds apart by the accuracy of the last tenth of the
    tasks.
    """

    seeds: ClassVar[dict[Preset, int]] = {"laptop": 5, "paper": 5}

    def streams(self, preset: Preset) -> dict[str, str]:
        """One: the pairs of Tiny ImageNet's 200 classes, where it is found."""
        if preset == "paper":
            return {"pairs": "--preset pairs"}
        data = "fractal --dataset.classes 50"
        if PHOTOS.is_dir():
            data = "tiny-imagenet --dataset.per-class 200"
        short = f"--chunks {TASKS} --epochs 10 --batch-size 50 --lr 0.05 --clip 10 {UNMEASURED}"
        return {"pairs": f"--preset pairs --dataset {data} {short}"}

    def variants(self, preset: Preset) -> dict[str, str]:
        """Plain training, three interventions, and growth that re-initialises or keeps."""
        return {
            "dense": "--method dense",
            **{name: choices[0] for name, choices in self.searches(preset).items()},
            "dynamicmoe": GROWN,
            "dynamicmoe, experts kept": f"{GROWN} --pruning utility --init.router new",
        }

    def searches(self, preset: Preset) -> dict[str, list[str]]:
        """Strengths around the published ones."""
        options = {
            "l2-init": [f"--intervention.strength {s}" for s in ("1e-2", "1e-3")],
            "cbp": [f"--intervention.rate {r}" for r in ("3e-4", "1e-4")],
            "shrink-perturb": [
                f"--intervention.shrink {shrink} --intervention.sigma 0.1" for shrink in (0.95, 0.9)
            ],
        }
        return {
            name: [f"--method dense --intervention {name} {own}" for own in found]
            for name, found in options.items()
        }

    def score(self, experiment: Experiment, summary: dict[str, Any]) -> float:
        """Test accuracy in the last tenth of the tasks."""
        return by_block(summary)[-1]

    def verdict(self, results: Results) -> list[str]:
        """What each variant loses from the first to the last tenth; and who ends above dense."""
        sentences = []
        for stream, variants in results.runs.items():
            blocks = {v: [by_block(run) for run in runs] for v, runs in variants.items()}
            ends = {v: [found[-1] for found in own] for v, own in blocks.items()}
            for variant in variants:
                starts = [found[0] for found in blocks[variant]]
                gap = results.gap(ends[variant], starts)
                word = gap.verdict("rises", "falls", "no change seen")
                sentences.append(
                    f"{stream}: {variant}: test accuracy {100 * fmean(starts):.1f} % in the first "
                    f"tenth of the tasks, {100 * fmean(ends[variant]):.1f} % in the last: "
                    f"{points(gap)}, {word}."
                )
            for variant in (v for v in variants if v != "dense"):
                gap = results.gap(ends[variant], ends["dense"])
                word = gap.verdict("higher", "lower", "no difference seen")
                sentences.append(
                    f"{stream}: {variant} against dense, last tenth: {points(gap)}, {word}."
                )
            sentences.append(self.order(results, ends))
        return [*sentences, about(results)]

    def order(self, results: Results, ends: dict[str, list[float]]) -> str:
        """Whether the published order is met: those that hold end above plain training."""
        met = [v for v in PUBLISHED if results.gap(ends[v], ends["dense"]).low > 0]
        missing = [v for v in PUBLISHED if v not in met]
        if not missing:
            return "The published order is met: " + ", ".join(met) + " end above dense."
        return f"Not shown of the published order: that {', '.join(missing)} end above dense."

    def draw(self, path: Path, results: Results, title: str) -> None:
        """Test accuracy, a point per tenth of the stream."""
        figure = new_figure(title, 4, 8)
        axes = figure.subplots()
        for stream, variants in results.runs.items():
            for variant, runs in variants.items():
                columns = zip(*map(by_block, runs), strict=True)
                means = [confidence_interval(list(values), "mean") for values in columns]
                tasks = len(runs[0]["tasks"])
                x = [tasks * (part + 1) / BLOCKS for part in range(BLOCKS)]
                band(axes, x, means, looks(variants)[variant], variant, 100)
            axes.set(xlabel="task", ylabel="test accuracy (%), tenths of the tasks")
            axes.set_title(stream)
            chance_line(axes, results.chance.get(stream))
        save(figure, path)


def by_block(summary: dict[str, Any]) -> list[float]:
    """[BLOCKS] mean test accuracy of a run in equal parts of its tasks, in 0..1.

    Of runs that are shorter than that, each part has at least one task.
    """
    accuracies = [row["test_accuracy"] for row in summary["tasks"]]
    size = max(1, len(accuracies) // BLOCKS)
    starts = [part * len(accuracies) // BLOCKS for part in range(BLOCKS)]
    return [fmean(accuracies[start : start + size]) for start in starts]
