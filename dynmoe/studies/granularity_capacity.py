"""Granularity and capacity: number of experts against their width."""

from __future__ import annotations

from dynmoe.lab.statistics import confidence_interval
from dynmoe.studies.design import Preset, Results, Study

RANK = "rank/effective_rank"
EXPERTS = (1, 2, 4, 8, 16, 32)


class GranularityCapacity(Study, name="granularity-capacity", source="ours"):
    """At a fixed budget, do many narrow experts or few wide ones keep rank and performance?

    Static mixtures of 1 to 32 experts share 256 hidden units; DynamicMoE at g = 2 and networks of
    half and twice the budget stand beside them.
    """

    tags = (("effective rank of the features", RANK),)

    def streams(self, preset: Preset) -> dict[str, str]:
        """The class stream."""
        start = "--preset paper " if preset == "paper" else "--dataset fractal "
        return {"class": f"{start}--protocol class"}

    def variants(self, preset: Preset) -> dict[str, str]:
        """Experts x width at one budget, and two other budgets."""
        static = {
            f"{e} experts": f"--method moe-static --method.experts {e}"
            for e in (1, 2, 4, 8, 16, 32)
        }
        return {
            "dense": "--method dense",
            "fresh": "--method fresh",
            **static,
            "grow g2": "--granularity 2",
            "8 experts, half budget":
                "--method moe-static --method.experts 8 --network.hidden {half}",
            "8 experts, double budget":
                "--method moe-static --method.experts 8 --network.hidden {double}",
        }  # fmt: skip

    def flags_on(self, stream: str, flags: str) -> str:
        """The flags with the laptop's budgets: 256 hidden units, half and double."""
        return flags.format(half=128, double=512)

    def verdict(self, results: Results) -> list[str]:
        """Against one expert; and the features' rank at the end."""
        sentences = []
        for stream in results.streams:
            for e in (4, 32):
                sentences.append(results.says(stream, f"{e} experts", "1 experts", at="mean"))
            sentences.append(results.says(stream, "grow g2", "8 experts", at="mean"))
            for variant in ("1 experts", "8 experts", "32 experts", "grow g2", "fresh"):
                ranks = [seed[-1] for seed in results.scalars(stream, variant, RANK)]
                point, low, high = confidence_interval(ranks, "mean")
                sentences.append(
                    f"{stream}: effective rank of the features after the last task, {variant}: "
                    f"{point:.1f} [{low:.1f}, {high:.1f}]."
                )
        return sentences
