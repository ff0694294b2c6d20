"""Adaptive growth: triggers against the schedule."""

from __future__ import annotations

from dynmoe.studies.design import Preset, Results, Study

WAIT = 200
"""Steps that a trigger waits at least: less than the shortest task, which has 320."""
SIGNALS = ("gradient", "rank", "dormancy", "drift", "adwin")


class AdaptiveGrowth(Study, name="adaptive-growth", source="ours"):
    """Can a signal of the network itself replace a schedule that knows the shifts?

    Every trigger gets the same cap on growths as the schedule makes.
    """

    def streams(self, preset: Preset) -> dict[str, str]:
        """The class and shuffle streams."""
        start = "--preset paper " if preset == "paper" else "--dataset fractal "
        return {name: f"{start}--protocol {name}" for name in ("class", "shuffle")}

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
