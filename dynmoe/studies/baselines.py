"""Baselines: what the field has against loss of plasticity, and growth beside it."""

from __future__ import annotations

from dynmoe.studies.design import Preset, Results, Study

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
"""Strategy -> its main option, and the four values that the search may choose among."""
UNTUNED = ("crelu", "layernorm", "fire", "head-reset")
"""Strategies without an option worth a search."""


class Baselines(Study, name="baselines", source="ours; each baseline names its own"):
    """Does growing experts keep plasticity better than what the field already has?

    Every strategy acts on the same dense network, with its paper's defaults and, where it has a
    main option, tuned over four values of it by mean train accuracy on one seed apart.
    """

    def streams(self, preset: Preset) -> dict[str, str]:
        """The class stream."""
        start = "--preset paper " if preset == "paper" else "--dataset fractal "
        return {"class": f"{start}--protocol class"}

    def variants(self, preset: Preset) -> dict[str, str]:
        """Reference networks, growth, expansions, and every strategy with its defaults."""
        strategies = sorted([*GRID, *UNTUNED])
        return {
            "dense": "--method dense",
            "fresh": "--method fresh",
            "DynamicMoE g2": "--method dynamicmoe --granularity 2",
            "moe-static": "--method moe-static",
            "moe-renewed": "--method moe-renewed",
            "wide": "--method wide",
            "net2wider": "--method net2wider",
            "progressive": "--method progressive",
            **{name: f"--method dense --strategy {name}" for name in strategies},
        }

    def searches(self, preset: Preset) -> dict[str, list[str]]:
        """Four values of each strategy's main option."""
        return {
            f"{name}, tuned": [
                f"--method dense --strategy {name} --strategy.{option} {value}" for value in values
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
