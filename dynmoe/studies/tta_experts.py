"""Test-time adaptation: how many experts, fixed or growing."""

from __future__ import annotations

from typing import ClassVar

from dynmoe.studies.design import Command, Preset, Results, Study

COUNTS = (2, 3, 5, 9, 15)


class TTAExperts(Study, name="tta-experts", source="ours; the growth is our extension"):
    """How many experts does MoETTA need, and does growing them as the stream shifts do as well?"""

    command: ClassVar[Command] = "tta"

    def streams(self, preset: Preset) -> dict[str, str]:
        """All domains mixed, and one domain after another, where shifts can be seen."""
        start = "--preset imagenet " if preset == "paper" else ""
        return {
            "mixed": f"{start}--streams potpourri+",
            "sequential": f"{start}--streams potpourri+ --order sequential",
        }

    def variants(self, preset: Preset) -> dict[str, str]:
        """Fixed numbers; from 2 to 9 at a rise of the entropy, and by the clock."""
        wait = 10 if preset == "laptop" else 500
        moetta = "--method moetta --method.num-experts"
        grow = f"{moetta} 2 --method.max-experts 9 --method.grow-wait {wait} --method.grow"
        return {
            "noadapt": "--method noadapt",
            "tent": "--method tent",
            **{f"E = {e}": f"{moetta} {e}" for e in COUNTS},
            "2 to 9, drift": f"{grow} drift",
            "2 to 9, clock": f"{grow} every",
        }

    def verdict(self, results: Results) -> list[str]:
        """Each number against the paper's 9, and growing against both of its ends."""
        pairs = [(f"E = {e}", "E = 9") for e in COUNTS if e != 9]
        for growing in ("2 to 9, drift", "2 to 9, clock"):
            pairs += [(growing, "E = 2"), (growing, "E = 9")]
        return [results.says(stream, a, b) for stream in results.streams for a, b in pairs]
