"""Unknown shifts: task lengths that no schedule knows."""

from __future__ import annotations

from dynmoe.studies.design import Preset, Results, Study


class UnknownShifts(Study, name="unknown-shifts", source="ours"):
    """Can growth keep plasticity when nobody tells where the tasks end?

    Tasks have random lengths. The trigger `task` is told of each end; the others go by the clock or
    by a signal of the network.
    """

    def streams(self, preset: Preset) -> dict[str, str]:
        """Class chunks of random length."""
        start = "--preset paper " if preset == "paper" else "--dataset fractal "
        return {"unknown": f"{start}--protocol unknown"}

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
