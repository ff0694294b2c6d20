"""Domain generalisation: accuracy against the parameters that learn."""

from __future__ import annotations

from typing import ClassVar

from dynmoe.studies.design import Command, Preset, Results, Study

LARGER = {
    "moa, ranks x 8": "--method.ranks 8 16 32 64",
    "moa, ranks x 32": "--method.ranks 32 64 128 256",
    "moa, 128 adapters": "--method.ranks" + 32 * " 1 2 4 8",
}
"""MoA of 2, 6 and 8 times its default's size on the laptop; a token runs with one adapter."""
SETS = (2, 5, 10)
PAPER = "--preset paper --domains pacs --pretrained"


class DGParameters(Study, name="dg-parameters", source="Radwan et al. 2026 (AAAI), MoE², Figure 1"):
    """Is it the mixing of sets that helps, or only more parameters?"""

    command: ClassVar[Command] = "dg"

    def streams(self, preset: Preset) -> dict[str, str]:
        """The laptop's embedded domains, or PACS."""
        return {"embedded": ""} if preset == "laptop" else {"PACS": PAPER}

    def variants(self, preset: Preset) -> dict[str, str]:
        """MoA with larger adapters or more of them, and MoE² with more sets of its default's."""
        return {
            "linear-probe": "--method linear-probe",
            "moa": "--method moa",
            **{name: f"--method moa {flags}" for name, flags in LARGER.items()},
            **{f"moe2, {k} sets": f"--method moe2 --method.experts {k}" for k in SETS},
        }

    def verdict(self, results: Results) -> list[str]:
        """Sets against MoA of all sizes, and the largest of both against the smallest."""
        (stream,) = results.streams
        pairs = [(f"moe2, {k} sets", other) for k in SETS for other in ("moa", *LARGER)]
        pairs += [(name, "moa") for name in LARGER]
        pairs.append((f"moe2, {SETS[-1]} sets", f"moe2, {SETS[0]} sets"))
        return [results.says(stream, a, b) for a, b in pairs]
