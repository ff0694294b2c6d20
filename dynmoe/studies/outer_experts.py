"""MoE² on photographs and drawings: do more outer experts help, and if not, why not?"""

from __future__ import annotations

from typing import ClassVar

from dynmoe.lab.experiment import Results
from dynmoe.lab.study import Preset
from dynmoe.studies.dg import STARTS, DGStudy, departure, gates, named, oracle

ONE, THREE, SIX = named(1), named(3), named(6)
"""There are three source domains."""
APART = "3, starts apart"
BY_DOMAIN = "3, gates by domain"
BOTH = "3, starts apart, gates by domain"


class DGPhotographs(
    DGStudy, name="dg-photographs", source="Radwan et al. 2026 (AAAI), MoE², Figure 1; ours"
):
    """Do more outer experts help on PACS? If not: do they stay alike, and is that the reason?

    The images of PACS at 112 pixels (data/PACS), a transformer over a frozen convolutional stem
    that has seen photographs alone (data/source.safetensors). From the paper's form two things are
    changed, one at a time and together. Starts apart: noise of 0.01 instead of 1e-4 on the common
    start. Gates by domain: prototypes at the source domains' mean embeddings, at a low temperature.
    Then the bound of all routers: `domain-experts` trains an expert on each source domain alone. An
    oracle takes the best expert for each image. An ensemble of three MoAs, which differ by chance
    alone, says how much of that is chance.
    """

    seeds: ClassVar[dict[Preset, int]] = {"laptop": 3, "paper": 5}

    def streams(self, preset: Preset) -> dict[str, str]:
        """One; preset paper trains ten times as long."""
        longer = "" if preset == "laptop" else " --steps 2000 --eval-every 500"
        data = "--preset photos --precision bfloat16 --domains.data-dir data"
        weights = '--weights data/source.safetensors --domains.note "resized to 112 px"'
        return {"PACS": f"{data} {weights}{longer}"}

    def variants(self, preset: Preset) -> dict[str, str]:
        """Numbers of outer experts, ways to make three differ, and what bounds all routers."""
        moe2 = "--method moe2 --method.experts"
        three = f"{moe2} 3 --headroom"
        apart = "--method.init-noise 0.01"
        by_domain = f"{STARTS['domains']} --method.temperature 0.05"
        return {
            ONE: f"{moe2} 1",
            THREE: three,
            BOTH: f"{three} {by_domain} {apart}",
            "domain-experts": "--method domain-experts --headroom",
            "ensemble": "--method ensemble --headroom",
            BY_DOMAIN: f"{three} {by_domain}",
            APART: f"{three} {apart}",
            SIX: f"{moe2} 6",
        }

    def verdict(self, results: Results) -> list[str]:
        """Each against one outer expert; gates and spread; the oracles."""
        (stream,) = results.streams
        forms = (THREE, APART, BY_DOMAIN, BOTH)
        others = (SIX, *forms, "domain-experts", "ensemble")
        return [
            *(results.says(stream, name, ONE) for name in others),
            *(gates(results, stream, name) for name in forms),
            *(departure(results, stream, name) for name in forms),
            *(
                oracle(results, stream, name, ONE)
                for name in (*forms, "domain-experts", "ensemble")
            ),
            results.says(stream, "domain-experts", "ensemble", "best_per_image"),
        ]
