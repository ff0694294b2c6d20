"""Router shift: whose weights move when experts are added."""

from __future__ import annotations

from dynmoe.lab.statistics import paired_difference
from dynmoe.studies.design import Preset, Results, Study

NEWEST = "router/newest_share"
G = 2


class RouterShift(Study, name="router-shift", source="Kim 2025 (arXiv 2511.18987)"):
    """Do router weights move to the new experts at boundaries?

    The share of the gates that the newest experts hold on the task's probe images, at the end of
    the first epoch after a growth and at the end of the task, against an even share.
    """

    tags = (("share of the newest experts", NEWEST), ("router entropy", "router/entropy"))

    def streams(self, preset: Preset) -> dict[str, str]:
        """The class stream, and its labels shuffled."""
        start = "--preset paper " if preset == "paper" else "--dataset fractal "
        return {name: f"{start}--protocol {name}" for name in ("class", "shuffle")}

    def variants(self, preset: Preset) -> dict[str, str]:
        """Our recipe; only new rows drawn; the plain form."""
        plain = "--router softmax --gate-scale one --cut utility --init.router new"
        return {
            "dense": "--method dense",
            "fresh": "--method fresh",
            "all rows redrawn": f"--granularity {G}",
            "new rows only": f"--granularity {G} --init.router new",
            "plain": f"--granularity {G} --init random {plain}",
        }

    def verdict(self, results: Results) -> list[str]:
        """Share of the newest experts minus an even share, by the last growth."""
        sentences = []
        for stream in results.streams:
            for variant in ("all rows redrawn", "new rows only", "plain"):
                for moment, text in ((0, "one epoch after growths"), (-1, "at the end of tasks")):
                    gap = paired_difference(*self._shares(results, stream, variant, moment))
                    low, high = 100 * gap.low, 100 * gap.high
                    word = gap.verdict("move to", "avoid", "show no bias to")
                    sentences.append(
                        f"{stream}, {variant}: gates {word} the newest experts {text}: "
                        f"{100 * gap.point:+.1f} points [{low:.1f}, {high:.1f}] over an even share "
                        "(mean over tasks 2 and later)."
                    )
        return sentences

    def _shares(
        self, results: Results, stream: str, variant: str, moment: int
    ) -> tuple[list[float], list[float]]:
        """Per seed: the newest experts' share, and an even one, as means over tasks 2 and later."""
        shares, evens = [], []
        for values, run in zip(
            results.scalars(stream, variant, NEWEST), results.runs[stream][variant], strict=True
        ):
            tasks = run["tasks"]
            epochs = len(values) // len(tasks)
            at = [values[k * epochs : (k + 1) * epochs][moment] for k in range(1, len(tasks))]
            even = [G / task["num_experts"] for task in tasks[1:]]
            shares.append(sum(at) / len(at))
            evens.append(sum(even) / len(even))
        return shares, evens
