"""Test-time adaptation: batches of 1 to 64 images."""

from __future__ import annotations

from typing import ClassVar

from dynmoe.studies.design import Command, Preset, Results, Study

SIZES = (1, 4, 16, 64)


class TTABatchSize(Study, name="tta-batch-size", source="ours"):
    """Which methods survive small batches at learning rates made for large ones?

    The learning rates are scaled with the batch, so that all sizes learn at one pace per image.
    """

    command: ClassVar[Command] = "tta"

    def streams(self, preset: Preset) -> dict[str, str]:
        """A mixed stream in batches of four sizes, half its images."""
        laptop = preset == "laptop"
        start, rate = ("--limit 100", 10 / 32) if laptop else ("--preset imagenet", 1 / 64)
        return {
            f"batches of {n}": f"{start} --streams potpourri+ --batch-size {n} "
            f"--lr-scale {rate * n:g} --window {max(1, 160 // n)}"
            for n in SIZES
        }

    def variants(self, preset: Preset) -> dict[str, str]:
        """The methods that adapt normalisation layers."""
        return {name: f"--method {name}" for name in ("noadapt", "tent", "eata", "moetta")}

    def verdict(self, results: Results) -> list[str]:
        """Each method against the source model, and MoETTA against Tent."""
        pairs = (
            ("tent", "noadapt"),
            ("eata", "noadapt"),
            ("moetta", "noadapt"),
            ("moetta", "tent"),
        )
        return [results.says(stream, a, b) for stream in results.streams for a, b in pairs]
