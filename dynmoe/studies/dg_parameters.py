"""Domain generalisation: accuracy against the parameters that learn."""

from __future__ import annotations

from typing import ClassVar

from dynmoe.study_design import Command, Preset, Results, Study

TERMS = (2, 8, 32)
SETS = (2, 5, 10)
PAPER = "--preset paper --domains pacs --pretrained"


class DGParameters(Study, name="dg-parameters", source="Radwan et al. 2026 (AAAI), MoE², Figure 1"):
    """Is it the mixing of sets that helps, or only more parameters?"""

    command: ClassVar[Command] = "dg"

    def streams(self, preset: Preset) -> dict[str, str]:
        """The laptop's embedded domains, or PACS."""
        return {"embedded": ""} if preset == "laptop" else {"PACS": PAPER}

    def variants(self, preset: Preset) -> dict[str, str]:
        """MoA with more Kronecker terms, and MoE² with more sets of its default's size."""
        return {
            "linear-probe": "--method linear-probe",
            "moa": "--method moa",
            **{f"moa, {t} terms": f"--method moa --method.terms {t}" for t in TERMS},
            **{f"moe2, {k} sets": f"--method moe2 --method.experts {k}" for k in SETS},
        }

    def verdict(self, results: Results) -> list[str]:
        """Sets against terms, and the largest against the smallest of both."""
        (stream,) = results.streams
        pairs = [
            *((f"moe2, {k} sets", "moa") for k in SETS),
            *((f"moe2, {k} sets", f"moa, {TERMS[-1]} terms") for k in SETS),
            (f"moa, {TERMS[-1]} terms", f"moa, {TERMS[0]} terms"),
            (f"moe2, {SETS[-1]} sets", f"moe2, {SETS[0]} sets"),
        ]
        return [results.says(stream, a, b) for a, b in pairs]
