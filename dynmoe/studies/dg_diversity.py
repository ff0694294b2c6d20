"""Domain generalisation: the diversity loss."""

from __future__ import annotations

from typing import ClassVar

from dynmoe.studies.design import Command, Preset, Results, Study

FORMS = ("euclidean", "cosine", "kl")
WEIGHTS = ("0", "0.2", "1")
PAPER = "--preset paper --domains pacs --pretrained"


class DGDiversity(
    Study, name="dg-diversity", source="Radwan et al. 2026 (AAAI), MoE², Tables 5 and 6"
):
    """Does keeping the prototypes apart help, and in which form?"""

    command: ClassVar[Command] = "dg"

    def streams(self, preset: Preset) -> dict[str, str]:
        """The laptop's embedded domains, or PACS."""
        return {"embedded": ""} if preset == "laptop" else {"PACS": PAPER}

    def variants(self, preset: Preset) -> dict[str, str]:
        """Three forms at the paper's weight, three weights of its form."""
        return {
            "linear-probe": "--method linear-probe",
            "moa": "--method moa",
            **{f: f"--method moe2 --method.diversity-form {f}" for f in FORMS},
            **{f"weight {w}": f"--method moe2 --method.diversity {w}" for w in WEIGHTS},
        }

    def verdict(self, results: Results) -> list[str]:
        """Each against the default, the Euclidean form with weight 0.2."""
        (stream,) = results.streams
        others = ("cosine", "kl", "weight 0", "weight 1")
        return [results.says(stream, other, "euclidean") for other in others]
