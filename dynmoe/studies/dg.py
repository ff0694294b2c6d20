"""Studies of domain generalisation."""

from __future__ import annotations

import math
from typing import ClassVar

from dynmoe.lab.experiment import Results
from dynmoe.lab.study import Command, Preset, Study

METHODS = ("erm", "linear-probe", "attention-only", "lora", "compacter", "kadaptation", "moa",
           "moa-lora", "gmoe", "hmoe", "ensemble", "swad", "miro", "gnn-moe", "becotta",
           "meta-dmoe", "moe2")  # fmt: skip
PAPER = "--preset paper --domains pacs --pretrained"


class DGStudy(Study):
    """On the laptop's embedded domains, or on PACS."""

    command: ClassVar[Command] = "dg"

    def streams(self, preset: Preset) -> dict[str, str]:
        """One."""
        return {"embedded": ""} if preset == "laptop" else {"PACS": PAPER}


class DGMethods(
    DGStudy, name="dg-methods", source="Radwan et al. 2026 (AAAI), MoE², Table 1 and Figure 1"
):
    """Does MoE² generalise better than other ways to adapt a backbone, at its size?"""

    def variants(self, preset: Preset) -> dict[str, str]:
        """Every method with its defaults."""
        return {name: f"--method {name}" for name in METHODS}

    def verdict(self, results: Results) -> list[str]:
        """MoE² against each."""
        (stream,) = results.streams
        return [results.says(stream, "moe2", name) for name in METHODS if name != "moe2"]


OUTER_EXPERTS = (1, 2, 3, 4, 5, 6, 8)


class DGExperts(
    DGStudy,
    name="dg-experts",
    source="Radwan et al. 2026 (AAAI), MoE², ablations; the growth is our extension",
):
    """How many outer experts does MoE² need? Does growing do as well, or mixing updates better?"""

    def variants(self, preset: Preset) -> dict[str, str]:
        """Fixed numbers, 2 growing to 5, and the other way of synthesis."""
        moe2, clock = "--method moe2 --method.experts", 40 if preset == "laptop" else 1000
        return {
            "linear-probe": "--method linear-probe",
            "moa": "--method moa",
            **{named(k): f"{moe2} {k}" for k in OUTER_EXPERTS},
            "2 to 5 outer experts": f"{moe2} 2 --method.max-experts 5 --granularity 1 --trigger at "
            f"--trigger.steps {clock} {2 * clock} {3 * clock}",
            f"{named(5)}, deltas": f"{moe2} 5 --method.synthesis deltas",
        }

    def verdict(self, results: Results) -> list[str]:
        """Each against five outer experts."""
        (stream,) = results.streams
        five, deltas = named(5), f"{named(5)}, deltas"
        others = [named(k) for k in OUTER_EXPERTS if k != 5] + ["2 to 5 outer experts", deltas]
        return [
            *(results.says(stream, other, five) for other in others),
            *(departure(results, stream, variant) for variant in (five, deltas)),
        ]


def named(experts: int) -> str:
    """A variant by its number of outer experts."""
    return "1 outer expert" if experts == 1 else f"{experts} outer experts"


def departure(results: Results, stream: str, variant: str) -> str:
    """How far the variant is from its experts' mixed predictions, where Lemma 1 would hold."""
    kl, spread, change = (
        "{:.4f} nats [{:.4f}, {:.4f}]".format(*results.interval(stream, variant, metric))
        for metric in ("kl", "spread", "loss_change")
    )
    return (
        f"{stream}: {variant}: predictions of mixed parameters are {kl} (KL) from the mixture of "
        f"the outer experts' own predictions, which are {spread} from it; the loss changes by "
        f"{change}."
    )


LARGER = {
    "moa, ranks x 8": "--method.ranks 8 16 32 64",
    "moa, ranks x 32": "--method.ranks 32 64 128 256",
    "moa, 128 adapters": "--method.ranks" + 32 * " 1 2 4 8",
}
"""MoA of 2, 6 and 8 times its default's size on the laptop; a token runs with one adapter."""
FEW_EXPERTS = (2, 5, 10)


class DGParameters(
    DGStudy, name="dg-parameters", source="Radwan et al. 2026 (AAAI), MoE², Figure 1"
):
    """Is it the mixing of outer experts that helps, or only more parameters?"""

    def variants(self, preset: Preset) -> dict[str, str]:
        """MoA with larger adapters or more of them, and MoE² with more outer experts."""
        return {
            "linear-probe": "--method linear-probe",
            "moa": "--method moa",
            **{name: f"--method moa {flags}" for name, flags in LARGER.items()},
            **{f"moe2, {named(k)}": f"--method moe2 --method.experts {k}" for k in FEW_EXPERTS},
        }

    def verdict(self, results: Results) -> list[str]:
        """Outer experts against MoA of all sizes, and the largest of both against the smallest."""
        (stream,) = results.streams
        pairs = [(f"moe2, {named(k)}", other) for k in FEW_EXPERTS for other in ("moa", *LARGER)]
        pairs += [(name, "moa") for name in LARGER]
        pairs.append((f"moe2, {named(FEW_EXPERTS[-1])}", f"moe2, {named(FEW_EXPERTS[0])}"))
        return [results.says(stream, a, b) for a, b in pairs]


TEMPERATURES = ("0.05", "0.1", "0.3", "0.5", "0.7", "1.0")
NOISES = ("0", "1e-5", "1e-4", "1e-3", "1e-2", "0.1")


class DGRouter(DGStudy, name="dg-router", source="Radwan et al. 2026 (AAAI), MoE², Tables 3 and 4"):
    """How much do the temperature of the gates and the noise on the common start matter?"""

    def variants(self, preset: Preset) -> dict[str, str]:
        """Six temperatures, six noises, the paper's among them; the defaults are 0.5 and 1e-4."""
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


FORMS = ("euclidean", "cosine", "kl")
WEIGHTS = ("0", "0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "1")


class DGDiversity(
    DGStudy, name="dg-diversity", source="Radwan et al. 2026 (AAAI), MoE², Tables 5 and 6"
):
    """Does keeping the prototypes apart help, and in which form?"""

    def variants(self, preset: Preset) -> dict[str, str]:
        """Three forms at the paper's weight; weights of its form, the paper's six among them."""
        return {
            "linear-probe": "--method linear-probe",
            "moa": "--method moa",
            **{f: f"--method moe2 --method.diversity-form {f}" for f in FORMS},
            **{f"weight {w}": f"--method moe2 --method.diversity {w}" for w in WEIGHTS},
        }

    def verdict(self, results: Results) -> list[str]:
        """Each against the default, the Euclidean form with weight 0.2."""
        (stream,) = results.streams
        others = ("cosine", "kl", *(f"weight {w}" for w in WEIGHTS if w != "0.2"))
        return [results.says(stream, other, "euclidean") for other in others]


LEAST = 0.02
"""Gain of an oracle below which no router of the experts can be told from none."""


class DGHeadroom(
    DGStudy, name="dg-headroom", source="ours; the experts of Zhong et al. 2022, Section 3.1"
):
    """Could any router of experts help here? An oracle takes the best expert for every image.

    Of one expert per source domain, trained apart; of MoE²'s outer experts; and, for what chance
    alone gives such an oracle, of three MoAs that differ only in their start.
    """

    def variants(self, preset: Preset) -> dict[str, str]:
        """One MoA, an ensemble, experts by domain, MoE²."""
        return {
            "linear-probe": "--method linear-probe",
            "moa": "--method moa",
            "ensemble": "--method ensemble --headroom",
            "domain-experts": "--method domain-experts --headroom",
            "moe2": "--method moe2 --headroom",
        }

    def verdict(self, results: Results) -> list[str]:
        """Oracles against one MoA, and experts by domain against chance."""
        (stream,) = results.streams
        found = [oracle(results, stream, name) for name in ("domain-experts", "moe2", "ensemble")]
        return [
            *found,
            results.says(stream, "domain-experts", "ensemble", "best_per_image"),
            results.says(stream, "domain-experts", "moa"),
        ]


def oracle(results: Results, stream: str, variant: str, base: str = "moa") -> str:
    """One sentence: how far the best expert per image is above `base`, both at their last step."""
    best = results.values(stream, variant, "best_per_image")
    gap = results.gap(best, results.values(stream, base, "oracle_accuracy"))
    if math.isnan(gap.point):
        return f"{stream}: the best expert per image of {variant} was not measured."
    low, high = 100 * gap.low, 100 * gap.high
    word = (
        "no router of these experts can be seen to help"
        if gap.point < LEAST
        else "there is room for a router"
    )
    return (
        f"{stream}: the best expert per image of {variant} against {base}: {100 * gap.point:+.1f} "
        f"points [{low:.1f}, {high:.1f}]: {word}."
    )


STARTS = {
    "random": "",
    "kmeans": "--method.prototypes kmeans --method.centre",
    "domains": "--method.prototypes domains --method.centre",
}
LOW = ("0.05", "0.2", "0.5")


class DGGates(DGStudy, name="dg-gates", source="ours"):
    """When do MoE²'s gates tell domains apart, and is that worth anything?

    Three outer experts, as many as source domains. Prototypes start at random, or about the mean
    embedding at k-means centres or at the domains' means; at several temperatures, one of them
    rising from low; by the final embedding or by the style of an early block.
    """

    def variants(self, preset: Preset) -> dict[str, str]:
        """Starts x temperatures, a rising one, and style."""
        moe2 = "--method moe2 --method.experts 3"
        rising = "--method.temperature 0.5 --method.temperature-start 0.05"
        by_domain = f"{moe2} {STARTS['domains']}"
        return {
            "linear-probe": "--method linear-probe",
            "moa": "--method moa",
            **{
                f"{start}, tau {t}": f"{moe2} {flags} --method.temperature {t}".replace("  ", " ")
                for start, flags in STARTS.items()
                for t in LOW
            },
            "domains, rising": f"{by_domain} {rising}",
            "domains, style, tau 0.05": f"{by_domain} --method.embedding style "
            "--method.temperature 0.05",
        }

    def verdict(self, results: Results) -> list[str]:
        """Gates and accuracy of each against the paper's form."""
        (stream,) = results.streams
        others = [name for name in self.variants("laptop") if "," in name and name != PAPERS]
        found = [gates(results, stream, name) for name in (PAPERS, *others)]
        return found + [results.says(stream, name, PAPERS) for name in others]


PAPERS = "random, tau 0.5"


def gates(results: Results, stream: str, variant: str) -> str:
    """One sentence: how well a variant's gates tell source domains apart."""
    nmi, entropy = (
        "{:.2f} [{:.2f}, {:.2f}]".format(*results.interval(stream, variant, metric))
        for metric in ("gate_nmi", "gate_entropy")
    )
    return (
        f"{stream}: {variant}: mutual information of gate and source domain {nmi} (1: each domain "
        f"has its expert), entropy of the gates {entropy} (1: even)."
    )


UNSEEN = "--vit.styles plain rotated blocky --domains.per-class 130 --eval-every 200"
"""The backbone learns from three styles, the domains are four others; 1,040 test images each."""
FIGURE_1 = (1, 3, 6)
"""Numbers of outer experts; there are 3 source domains."""
APART = "3 outer experts, apart"


class DGUnseen(DGStudy, name="dg-unseen", source="Radwan et al. 2026 (AAAI), MoE², Figure 1"):
    """Do more outer experts help where the backbone has seen no domain, asked of more images?"""

    seeds: ClassVar[dict[Preset, int]] = {"laptop": 10, "paper": 3}

    def streams(self, preset: Preset) -> dict[str, str]:
        """One; CLIP has seen what it has seen."""
        return {"unseen styles": UNSEEN} if preset == "laptop" else super().streams(preset)

    def variants(self, preset: Preset) -> dict[str, str]:
        """Numbers of outer experts; and three whose gates start by domain, from experts apart."""
        moe2 = "--method moe2 --method.experts"
        return {
            "linear-probe": "--method linear-probe",
            "moa": "--method moa",
            **{named(k): f"{moe2} {k}" for k in FIGURE_1},
            APART: f"{moe2} 3 {STARTS['domains']} --method.temperature 0.05 "
            "--method.init-noise 0.01",
        }

    def verdict(self, results: Results) -> list[str]:
        """Each number against MoA and one outer expert; gates, and how far experts are apart."""
        (stream,) = results.streams
        many = [named(k) for k in FIGURE_1 if k > 1] + [APART]
        return [
            results.says(stream, "moa", "linear-probe"),
            *(results.says(stream, name, "moa") for name in (named(1), *many)),
            *(results.says(stream, name, named(1)) for name in many),
            *(gates(results, stream, name) for name in (named(3), APART)),
            *(departure(results, stream, name) for name in (named(3), APART)),
        ]
