"""Domain generalisation: temperature and noise."""

from __future__ import annotations

from typing import ClassVar

from dynmoe.studies.design import Command, Preset, Results, Study

TEMPERATURES = ("0.1", "0.3", "0.5", "0.7", "1.0")
NOISES = ("0", "1e-4", "1e-2", "0.1")
PAPER = "--preset paper --domains pacs --pretrained"


class DGRouter(Study, name="dg-router", source="Radwan et al. 2026 (AAAI), MoE², Tables 3 and 4"):
    """How much do the temperature of the gates and the noise on the sets' common start matter?"""

    command: ClassVar[Command] = "dg"

    def streams(self, preset: Preset) -> dict[str, str]:
        """The laptop's embedded domains, or PACS."""
        return {"embedded": ""} if preset == "laptop" else {"PACS": PAPER}

    def variants(self, preset: Preset) -> dict[str, str]:
        """Five temperatures, four noises; the defaults are 0.5 and 1e-4."""
        return {
            "linear-probe": "--method linear-probe",
            "moa": "--method moa",
            **{f"tau {t}": f"--method moe2 --method.temperature {t}" for t in TEMPERATURES},
            **{f"noise {n}": f"--method moe2 --method.init-noise {n}" for n in NOISES},
        }

    def verdict(self, results: Results) -> list[str]:
        """Each against the default."""
        (stream,) = results.streams
        others = [f"tau {t}" for t in TEMPERATURES if t != "0.5"]
        others += [f"noise {n}" for n in NOISES if n != "1e-4"]
        return [results.says(stream, other, "tau 0.5") for other in others]
