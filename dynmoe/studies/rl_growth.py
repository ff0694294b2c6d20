"""Growth in reinforcement learning: one expert, two, and one that becomes two."""

from __future__ import annotations

from typing import ClassVar

from dynmoe.lab.comparison import Results
from dynmoe.lab.study import Command, Preset, Study


class RLGrowth(Study, name="rl-growth", source="Kim 2025 (arXiv 2511.18987)"):
    """Does a PPO agent that grows from one to two experts beat one or two from the start?"""

    command: ClassVar[Command] = "rl"

    def streams(self, preset: Preset) -> dict[str, str]:
        """Craftax-Classic pixels on a laptop; full Craftax with the paper's preset."""
        if preset == "paper":
            return {"craftax": "--preset paper"}
        return {"craftax-classic": "--total-steps 65536 --trigger.steps 32768 --threads 1"}

    def variants(self, preset: Preset) -> dict[str, str]:
        """The paper's comparison, and a wide dense network."""
        return {
            "1 -> 2 experts": "--method dynamicmoe",
            "1 expert": "--method moe-start",
            "2 experts": "--method moe-static",
            "wide": "--method wide",
            "dense": "--method dense",
        }

    def verdict(self, results: Results) -> list[str]:
        """The growing agent against each other one."""
        return [
            results.says(stream, "1 -> 2 experts", other)
            for stream in results.streams
            for other in ("1 expert", "2 experts", "wide", "dense")
        ]
