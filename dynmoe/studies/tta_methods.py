"""Test-time adaptation: all methods on all mixed streams."""

from __future__ import annotations

from typing import ClassVar

from dynmoe.studies.design import Command, Preset, Results, Study

METHODS = ("noadapt", "tent", "eata", "sar", "deyo", "cotta", "becotta", "moetta")
RATES = ("1", "3", "10", "30")
"""Multiples of the published learning rates; the laptop's default is 10."""


class TTAMethods(Study, name="tta-methods", source="Fan et al. 2025 (arXiv 2511.13760), Table 1"):
    """Does MoETTA gain more from mixed shifts than the methods before it?

    Every method with its defaults, and with its learning rate chosen among four by the accuracy on
    one seed apart: the same domains in another order, so an oracle's choice, for all methods alike.
    """

    command: ClassVar[Command] = "tta"
    seeds: ClassVar[dict[Preset, int]] = {"laptop": 5, "paper": 3}

    def streams(self, preset: Preset) -> dict[str, str]:
        """The paper's three mixtures of domains."""
        start = "--preset imagenet " if preset == "paper" else ""
        return {s: f"{start}--streams {s}" for s in ("classical", "potpourri", "potpourri+")}

    def variants(self, preset: Preset) -> dict[str, str]:
        """Every method with its defaults; EATA also without its Fisher penalty (ETA)."""
        return {name: f"--method {name}" for name in METHODS} | {
            "eta": "--method eata --method.fisher-weight 0"
        }

    def searches(self, preset: Preset) -> dict[str, list[str]]:
        """Four learning rates of each method that learns."""
        return {
            f"{name}, tuned": [f"--method {name} --lr-scale {rate}" for rate in RATES]
            for name in METHODS
            if name != "noadapt"
        }

    def verdict(self, results: Results) -> list[str]:
        """MoETTA against each; and what adapting costs on clean images."""
        others = [name for name in self.variants("laptop") if name != "moetta"]
        clean = results.streams[-1]
        return [
            *(results.says(s, "moetta", other) for s in results.streams for other in others),
            *(
                results.says(s, "moetta, tuned", f"{name}, tuned")
                for s in results.streams
                for name in ("tent", "eata", "deyo")
            ),
            *(results.says(s, "moetta, tuned", "noadapt") for s in results.streams),
            *(results.says(clean, name, "noadapt", metric="clean") for name in ("tent", "moetta")),
        ]
