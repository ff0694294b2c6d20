"""Sparse upcycling as a study of training: a dense transformer gets experts and is trained on."""

from __future__ import annotations

from typing import ClassVar

from dynmoe.lab.experiment import Results
from dynmoe.lab.study import Preset
from dynmoe.studies.dg import DGStudy

RATES = ("2e-4", "5e-4", "2e-3")
"""Learning rates; each variant gets the best of them, on a seed apart."""
UNTRAINED = "--vit.epochs 0"
LONGER = 4
"""How much longer one mixture from scratch is trained."""


class DGUpcycling(
    DGStudy, name="dg-upcycling", source="after Komatsuzaki et al. 2023 (arXiv 2212.05055)"
):
    """Is a trained dense transformer a better start for a mixture of experts than none?

    A small vision transformer is trained on other classes than those of the domains. `upcycled` is
    GMoE: two late MLPs become six copies each with a token router, and everything is trained on.
    It is held against the dense transformer trained on for the same steps, against experts that are
    re-initialised in the same trained network, and against a mixture whose network is not trained
    at all before, for the same steps and for four times as many. Each variant's learning rate is
    chosen on a seed apart, by its accuracy on the left-out domains.
    """

    seeds: ClassVar[dict[Preset, int]] = {"laptop": 5, "paper": 3}

    def streams(self, preset: Preset) -> dict[str, str]:
        """The embedded domains, whose transformer is trained on the spot: in every preset.

        Two of the four are left out in turn.
        """
        return {"embedded": "--test-domains coloured edges"}

    def variants(self, preset: Preset) -> dict[str, str]:
        """Both starts, dense and as a mixture, and the references."""
        steps = LONGER * 200
        return {
            "linear-probe": "--method linear-probe",
            "moa": "--method moa",
            "dense": "--method erm",
            "upcycled": "--method gmoe",
            "fresh experts": "--method gmoe --method.start fresh",
            "dense from scratch": f"--method erm {UNTRAINED}",
            "moe from scratch": f"--method gmoe {UNTRAINED}",
            LONG: f"--method gmoe {UNTRAINED} --steps {steps} --eval-every {steps // 5}",
        }

    def searches(self, preset: Preset) -> dict[str, list[str]]:
        """Learning rates of all but the references."""
        return {
            name: [f"{own} --lr {rate}" for rate in RATES]
            for name, own in self.variants(preset).items()
            if name not in ("linear-probe", "moa")
        }

    def verdict(self, results: Results) -> list[str]:
        """Upcycled against each other start: on unseen domains, and on the sources' own."""
        (stream,) = results.streams
        return [
            results.says(stream, "upcycled", other, metric)
            for other in ("dense", "fresh experts", "moe from scratch", LONG)
            for metric in ("accuracy", "source_accuracy")
        ]


LONG = f"moe from scratch, {LONGER} x the steps"
