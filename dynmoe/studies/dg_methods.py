"""Domain generalisation: all methods."""

from __future__ import annotations

from typing import ClassVar

from dynmoe.studies.design import Command, Preset, Results, Study

METHODS = ("erm", "linear-probe", "attention-only", "lora", "compacter", "kadaptation", "moa",
           "moa-lora", "gmoe", "hmoe", "ensemble", "moe2")  # fmt: skip
PAPER = "--preset paper --domains pacs --pretrained"


class DGMethods(
    Study, name="dg-methods", source="Radwan et al. 2026 (AAAI), MoE², Table 1 and Figure 1"
):
    """Does MoE² generalise better than other ways to adapt a backbone, at its size?"""

    command: ClassVar[Command] = "dg"

    def streams(self, preset: Preset) -> dict[str, str]:
        """The laptop's embedded domains, or PACS."""
        return {"embedded": ""} if preset == "laptop" else {"PACS": PAPER}

    def variants(self, preset: Preset) -> dict[str, str]:
        """Every method with its defaults."""
        return {name: f"--method {name}" for name in METHODS}

    def verdict(self, results: Results) -> list[str]:
        """MoE² against each."""
        (stream,) = results.streams
        return [results.says(stream, "moe2", name) for name in METHODS if name != "moe2"]
