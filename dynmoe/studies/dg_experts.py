"""Domain generalisation: how many sets, and what is mixed."""

from __future__ import annotations

from typing import ClassVar

from dynmoe.studies.design import Command, Preset, Results, Study

SETS = (1, 2, 3, 5, 8)
PAPER = "--preset paper --domains pacs --pretrained"


class DGExperts(
    Study,
    name="dg-experts",
    source="Radwan et al. 2026 (AAAI), MoE², ablations; the growth is our extension",
):
    """How many sets does MoE² need, does growing them do as well, and is mixing updates better?"""

    command: ClassVar[Command] = "dg"

    def streams(self, preset: Preset) -> dict[str, str]:
        """The laptop's embedded domains, or PACS."""
        return {"embedded": ""} if preset == "laptop" else {"PACS": PAPER}

    def variants(self, preset: Preset) -> dict[str, str]:
        """Fixed numbers, 2 growing to 5, and the other way of synthesis."""
        moe2, clock = "--method moe2 --method.experts", 40 if preset == "laptop" else 1000
        return {
            "linear-probe": "--method linear-probe",
            "moa": "--method moa",
            **{named(k): f"{moe2} {k}" for k in SETS},
            "2 to 5 sets": f"{moe2} 2 --method.max-experts 5 --granularity 1 --trigger at "
            f"--trigger.steps {clock} {2 * clock} {3 * clock}",
            "5 sets, deltas": f"{moe2} 5 --method.synthesis deltas",
        }

    def verdict(self, results: Results) -> list[str]:
        """Each against five sets."""
        (stream,) = results.streams
        others = [named(k) for k in SETS if k != 5] + ["2 to 5 sets", "5 sets, deltas"]
        return [
            *(results.says(stream, other, "5 sets") for other in others),
            *(_departure(results, stream, variant) for variant in ("5 sets", "5 sets, deltas")),
        ]


def named(sets: int) -> str:
    """A variant by its number of sets."""
    return "1 set" if sets == 1 else f"{sets} sets"


def _departure(results: Results, stream: str, variant: str) -> str:
    """How far the variant is from a mixture of its sets' predictions, where Lemma 1 would hold."""
    kl, spread, change = (
        "{:.4f} nats [{:.4f}, {:.4f}]".format(*results.interval(stream, variant, metric))
        for metric in ("kl", "spread", "loss_change")
    )
    return (
        f"{stream}: {variant}: predictions of mixed parameters are {kl} (KL) from the mixture of "
        f"the sets' own predictions, which are {spread} from it; the loss changes by {change}."
    )
