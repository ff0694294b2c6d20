"""Router uncertainty: entropy and assignment where distributions overlap."""

from __future__ import annotations

from statistics import fmean

from dynmoe.lab.statistics import paired_difference
from dynmoe.studies.design import Preset, Results, Study

WIDTHS = (0.0, 1.0)
FIGURES = (("entropy of a sample's gates", "router/entropy"),
           ("information on the task", "router/task_information_share/blocks.0"))  # fmt: skip


class RouterUncertainty(Study, name="router-uncertainty", source="ours"):
    """Is the router less certain, and its experts less tied to tasks, where tasks overlap?

    The class stream with sharp boundaries against one whose boundaries are a chunk wide.
    """

    tags = FIGURES

    def streams(self, preset: Preset) -> dict[str, str]:
        """Sharp and blurred boundaries."""
        start = "--preset paper " if preset == "paper" else "--dataset fractal "
        return {f"width {w:g}": f"{start}--protocol blurred --protocol.width {w}" for w in WIDTHS}

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
                gap = paired_difference(after, before)
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
