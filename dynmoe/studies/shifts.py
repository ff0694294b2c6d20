"""Studies of methods and of shifts that are not told, in continual learning."""

from __future__ import annotations

from statistics import fmean
from typing import ClassVar

from dynmoe.lab.experiment import Results
from dynmoe.lab.study import Preset, Study

GRID: dict[str, tuple[str, tuple[str, ...]]] = {
    "l2": ("strength", ("1e-5", "1e-4", "1e-3", "1e-2")),
    "l2-init": ("strength", ("1e-4", "1e-3", "1e-2", "1e-1")),
    "shrink-perturb": ("shrink", ("0.4", "0.6", "0.8", "0.9")),
    "cbp": ("rate", ("1e-5", "1e-4", "1e-3", "1e-2")),
    "redo": ("tau", ("0.025", "0.1", "0.2", "0.4")),
    "snr": ("quantile", ("0.92", "0.96", "0.99", "0.999")),
    "injection": ("task", ("2", "4", "6", "8")),
    "parseval": ("strength", ("1e-4", "1e-3", "1e-2", "1e-1")),
    "spectral": ("strength", ("1e-5", "1e-4", "1e-3", "1e-2")),
    "nap": ("every", ("1", "3", "10", "100")),
    "dash": ("least", ("0.05", "0.1", "0.3", "0.7")),
    "hare-tortoise": ("period", ("50", "160", "500", "1500")),
    "ewc": ("strength", ("1", "10", "100", "1000")),
    "replay": ("size", ("100", "500", "2000", "5000")),
}
"""Intervention -> its main option, and the four values that the search may choose among."""
UNTUNED = ("crelu", "layernorm", "fire", "head-reset")
"""Interventions without an option worth a search."""


class Baselines(Study, name="baselines", source="ours; each baseline names its own"):
    """Does growing experts keep plasticity better than what the field already has?

    Every intervention acts on the same dense network, with its paper's defaults and, where it has a
    main option, tuned over four values of it by mean train accuracy on one seed apart.
    """

    on: ClassVar[dict[str, str]] = {"class": "--protocol class"}

    def variants(self, preset: Preset) -> dict[str, str]:
        """Reference networks, growth, expansions, and every intervention with its defaults."""
        interventions = sorted([*GRID, *UNTUNED])
        return {
            "dense": "--method dense",
            "fresh": "--method fresh",
            "DynamicMoE g2": "--method dynamicmoe --granularity 2",
            "moe-static": "--method moe-static",
            "moe-renewed": "--method moe-renewed",
            "wide": "--method wide",
            "net2wider": "--method net2wider",
            "progressive": "--method progressive",
            **{name: f"--method dense --intervention {name}" for name in interventions},
        }

    def searches(self, preset: Preset) -> dict[str, list[str]]:
        """Four values of each intervention's main option."""
        return {
            f"{name}, tuned": [
                f"--method dense --intervention {name} --intervention.{option} {value}"
                for value in values
            ]
            for name, (option, values) in GRID.items()
        }

    def verdict(self, results: Results) -> list[str]:
        """DynamicMoE against the best baseline, and which baselines beat the dense network."""
        (stream,) = results.streams
        own = ("dense", "fresh", "DynamicMoE g2", "moe-static", "moe-renewed")
        baselines = [v for v in results.runs[stream] if v not in own]

        def mean(variant: str) -> float:
            return results.interval(stream, variant, at="mean").point

        best = max(baselines, key=mean)
        better = [v for v in baselines if results.difference(stream, v, "dense", at="mean").low > 0]
        level = [
            v for v in baselines
            if results.difference(stream, "DynamicMoE g2", v, at="mean").low <= 0
        ]  # fmt: skip
        sentences = [
            results.says(stream, "DynamicMoE g2", best, at="mean"),
            results.says(stream, "DynamicMoE g2", best, at="last"),
            results.says(stream, "DynamicMoE g2", "moe-renewed", at="mean"),
            results.says(stream, "DynamicMoE g2", "dense", at="mean"),
            results.says(stream, best, "fresh", at="mean"),
        ]
        for metric in ("online_accuracy", "test_accuracy"):
            first = max(baselines, key=lambda v: results.interval(stream, v, metric, "mean").point)
            sentences.append(results.says(stream, "DynamicMoE g2", first, metric, at="mean"))
        return [
            *sentences,
            f"{stream}: above the dense network in mean train accuracy, interval and all: "
            f"{'; '.join(better) or 'none'}.",
            f"{stream}: not below DynamicMoE g2 in mean train accuracy, interval and all: "
            f"{'; '.join(level) or 'none'}.",
        ]


class UnknownShifts(Study, name="unknown-shifts", source="ours"):
    """Can growth keep plasticity when nobody tells where the tasks end?

    Tasks have random lengths. The trigger `task` is told of each end; the others go by the clock or
    by a signal of the network.
    """

    on: ClassVar[dict[str, str]] = {"unknown": "--protocol unknown"}

    def variants(self, preset: Preset) -> dict[str, str]:
        """Told, by the clock, by signals, and not at all."""
        return {
            "dense": "--method dense",
            "fresh": "--method fresh",
            "moe-static": "--method moe-static",
            "told": "--trigger task",
            "every 200 steps": "--trigger every --trigger.steps 200",
            "every 400 steps": "--trigger every --trigger.steps 400",
            "every 800 steps": "--trigger every --trigger.steps 800",
            "drift": "--trigger drift --trigger.cooldown 200",
            "dormancy": "--trigger dormancy --trigger.cooldown 200",
        }

    def verdict(self, results: Results) -> list[str]:
        """Each against the trigger that is told, and against no growth."""
        (stream,) = results.streams
        blind = ("every 200 steps", "every 400 steps", "every 800 steps", "drift", "dormancy")
        return [
            *(results.says(stream, name, "told", at="mean") for name in blind),
            *(results.says(stream, name, "moe-static", at="mean") for name in blind),
        ]


WAIT = 200
"""Steps that a trigger waits at least: less than the shortest task, which has 320."""
SIGNALS = ("gradient", "rank", "dormancy", "drift", "adwin")


class AdaptiveGrowth(Study, name="adaptive-growth", source="ours"):
    """Can a signal of the network itself replace a schedule that knows the shifts?

    Every trigger gets the same cap on growths as the schedule makes.
    """

    def variants(self, preset: Preset) -> dict[str, str]:
        """The schedule that knows, one that does not, and the adaptive triggers."""
        return {
            "dense": "--method dense",
            "fresh": "--method fresh",
            "at shifts": "--trigger task",
            "every 500 steps": "--trigger every --trigger.steps 500",
            "plateau": f"--trigger plateau --trigger.patience {WAIT} --trigger.limit 9",
            **{name: f"--trigger {name} --trigger.cooldown {WAIT}" for name in SIGNALS},
        }

    def verdict(self, results: Results) -> list[str]:
        """Each trigger against the schedule, with the growths that it made."""
        sentences = []
        for stream in results.streams:
            for name in self.variants("laptop"):
                if name in ("dense", "fresh", "at shifts"):
                    continue
                growths = [len(run["growth"]) for run in results.runs[stream][name]]
                says = results.says(stream, name, "at shifts", at="mean")
                mean = sum(growths) / len(growths)
                sentences.append(f"{says} It grew {mean:.1f} times per run.")
        return sentences


WIDTHS = (0.0, 0.5, 1.0)


class BlurredBoundaries(Study, name="blurred-boundaries", source="ours"):
    """Does growth at boundaries still help when neighbouring tasks run into each other?"""

    on: ClassVar[dict[str, str]] = {
        f"width {w:g}": f"--protocol blurred --protocol.width {w}" for w in WIDTHS
    }

    def variants(self, preset: Preset) -> dict[str, str]:
        """Growth at the nominal boundary, or not at all."""
        return {
            "dense": "--method dense",
            "fresh": "--method fresh",
            "grow g2": "--granularity 2",
            "moe-static": "--method moe-static",
        }

    def verdict(self, results: Results) -> list[str]:
        """The gain of growth over the dense network at each width."""
        return [
            results.says(stream, "grow g2", other, at="mean")
            for stream in results.streams
            for other in ("dense", "moe-static", "fresh")
        ]


SHARP_AND_BLURRED = (0.0, 1.0)
FIGURES = (("entropy of a sample's gates", "router/entropy"),
           ("information on the task", "router/task_information_share/blocks.0"))  # fmt: skip


class RouterUncertainty(Study, name="router-uncertainty", source="ours"):
    """Is the router less certain, and its experts less tied to tasks, where tasks overlap?

    The class stream with sharp boundaries against one whose boundaries are a chunk wide.
    """

    tags = FIGURES

    on: ClassVar[dict[str, str]] = {
        f"width {w:g}": f"--protocol blurred --protocol.width {w}" for w in SHARP_AND_BLURRED
    }

    def variants(self, preset: Preset) -> dict[str, str]:
        """Soft routers that grow, one that does not, and the reference networks."""
        return {
            "dense": "--method dense",
            "fresh": "--method fresh",
            "cosine": "--granularity 2",
            "softmax": "--granularity 2 --router softmax",
            "cosine, static": "--method moe-static",
        }

    def verdict(self, results: Results) -> list[str]:
        """Each figure's mean over the stream, sharp and blurred."""
        sharp, blurred = results.streams
        sentences = []
        for variant in ("cosine", "softmax", "cosine, static"):
            for title, tag in FIGURES:
                before, after = (_means(results, s, variant, tag) for s in (sharp, blurred))
                gap = results.gap(after, before)
                word = gap.verdict("more", "less", "no change seen")
                sentences.append(
                    f"{variant}: {title} (share of the most it could be): {fmean(before):.4f} "
                    f"sharp, {fmean(after):.4f} blurred: {gap.point:+.4f} "
                    f"[{gap.low:.4f}, {gap.high:.4f}], {word}."
                )
        return sentences


def _means(results: Results, stream: str, variant: str, tag: str) -> list[float]:
    """[S] a scalar's mean over each run."""
    return [fmean(seed) for seed in results.scalars(stream, variant, tag)]
