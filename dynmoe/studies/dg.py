"""Studies of domain generalisation."""

from __future__ import annotations

from typing import ClassVar

from dynmoe.lab.experiment import Results
from dynmoe.lab.study import Command, Preset, Study

METHODS = ("erm", "linear-probe", "attention-only", "lora", "compacter", "kadaptation", "moa",
           "moa-lora", "gmoe", "hmoe", "ensemble", "moe2")  # fmt: skip
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


OUTER_EXPERTS = (1, 2, 3, 5, 8)


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
            *(_departure(results, stream, variant) for variant in (five, deltas)),
        ]


def named(experts: int) -> str:
    """A variant by its number of outer experts."""
    return "1 outer expert" if experts == 1 else f"{experts} outer experts"


def _departure(results: Results, stream: str, variant: str) -> str:
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


TEMPERATURES = ("0.1", "0.3", "0.5", "0.7", "1.0")
NOISES = ("0", "1e-4", "1e-2", "0.1")


class DGRouter(DGStudy, name="dg-router", source="Radwan et al. 2026 (AAAI), MoE², Tables 3 and 4"):
    """How much do the temperature of the gates and the noise on the common start matter?"""

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


FORMS = ("euclidean", "cosine", "kl")
WEIGHTS = ("0", "0.2", "1")


class DGDiversity(
    DGStudy, name="dg-diversity", source="Radwan et al. 2026 (AAAI), MoE², Tables 5 and 6"
):
    """Does keeping the prototypes apart help, and in which form?"""

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
