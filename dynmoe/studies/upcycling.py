"""Upcycling as a study of training: a dense network becomes a mixture, and learns on."""

from __future__ import annotations

from typing import ClassVar

from dynmoe.lab.experiment import At, Results
from dynmoe.lab.study import Preset, Study

FIRST_TASK = {"class": 640, "shuffle": 320, "iid": 4000}
"""Optimizer steps of each stream's first task: of the laptop's, and of the paper's preset."""
DOUBLE = {"class": 512, "shuffle": 512, "iid": 2048}
"""Twice the hidden units of the stream's network."""


class UpcycleStudy(
    Study, name="upcycle-study", source="after Komatsuzaki et al. 2023 (arXiv 2212.05055)"
):
    """Is a trained dense network a better start for a mixture than none, at equal steps?

    The network is dense in the first task: a mixture of one expert. Then its block is upcycled: by
    splitting, three growths in three steps divide its units among four experts; by copying, one
    growth adds a copy of the block, unit by unit with its output weights shared out unevenly. Both
    keep the function (init `duplicate`). It is held against the dense network that goes on, and
    against mixtures and dense networks of the same units from the start.
    """

    def streams(self, preset: Preset) -> dict[str, str]:
        """Class and shuffle streams; the paper's data at the paper's preset."""
        if preset == "paper":
            return {"iid": self.start["paper"]}
        return super().streams(preset)

    def variants(self, preset: Preset) -> dict[str, str]:
        """Upcycled and other networks, at the dense network's units and at twice as many."""
        upcycled = "--granularity 1 --init duplicate --trigger at --trigger.steps"
        return {
            "dense": "--method dense",
            "fresh": "--method fresh",
            "moe": "--method moe-static --method.experts 4",
            "upcycled by splitting": f"{upcycled} {{splits}} --pruning utility",
            "dense, twice the units": "--method wide --method.factor 2",
            "moe, twice the units":
                "--method moe-static --method.experts 2 --network.hidden {double}",
            "upcycled by copying": f"{upcycled} {{first}} --budget.mode per-growth",
        }  # fmt: skip

    def flags_on(self, stream: str, flags: str) -> str:
        """The flags with the stream's steps and units."""
        first = FIRST_TASK[stream]
        splits = f"{first} {first + 1} {first + 2}"
        return flags.format(first=first, splits=splits, double=DOUBLE[stream])

    pairs: ClassVar[tuple[tuple[str, str], ...]] = (
        ("upcycled by splitting", "dense"),
        ("upcycled by splitting", "moe"),
        ("upcycled by copying", "dense"),
        ("upcycled by copying", "dense, twice the units"),
        ("upcycled by copying", "moe, twice the units"),
    )

    def verdict(self, results: Results) -> list[str]:
        """Upcycled minus others: what is learnt last, and on average; and what generalises."""
        asked: tuple[tuple[str, At], ...] = (
            ("train_accuracy", "last"), ("train_accuracy", "mean"), ("test_accuracy", "mean"),
        )  # fmt: skip
        return [
            results.says(stream, a, b, metric, at)
            for stream in results.streams
            for a, b in self.pairs
            for metric, at in asked
            if (stream, metric) != ("shuffle", "test_accuracy")  # its labels are drawn
        ]
