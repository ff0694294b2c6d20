"""Growth timing: how often experts are added, and when."""

from __future__ import annotations

from dynmoe.studies.design import Preset, Results, Study

STEPS = {"class": 640, "shuffle": 320}
"""Optimizer steps of one task in the laptop's streams."""
TASKS = 10


class GrowthTiming(Study, name="growth-timing", source="ours"):
    """Does growth have to come often, and at the true points of shift?

    Growths at half, once and twice the interval between shifts; and as often as the shifts, but in
    the middle of the tasks. All have the same budget.
    """

    def streams(self, preset: Preset) -> dict[str, str]:
        """Class and shuffle streams, whose tasks have equal lengths."""
        start = "--preset paper " if preset == "paper" else "--dataset fractal "
        return {name: f"{start}--protocol {name}" for name in STEPS}

    def variants(self, preset: Preset) -> dict[str, str]:
        """Schedules in tasks; the stream's own clock is filled in by `flags_on`."""
        return {
            "dense": "--method dense",
            "fresh": "--method fresh",
            "at shifts (1x)": "--trigger task",
            "twice per task (0.5x)": "--trigger every --trigger.steps {half}",
            "every second task (2x)": "--trigger every --trigger.steps {double}",
            "mid-task (1x)": "--trigger at --trigger.steps {middles}",
            "once": "--trigger at --trigger.steps {once}",
        }

    def flags_on(self, stream: str, flags: str) -> str:
        """The flags with the stream's steps."""
        steps = STEPS[stream]
        middles = [str(task * steps + steps // 2) for task in range(TASKS - 1)]
        return flags.format(
            half=steps // 2, double=2 * steps, middles=" ".join(middles), once=steps
        )

    def verdict(self, results: Results) -> list[str]:
        """Each schedule against growth at the shifts; and the gap to fresh networks."""
        others = ("twice per task (0.5x)", "every second task (2x)", "mid-task (1x)", "once")
        return [
            results.says(stream, other, "at shifts (1x)", at="mean")
            for stream in results.streams
            for other in others
        ] + [results.says(s, "at shifts (1x)", "fresh", at="mean") for s in results.streams]
