"""Blurred boundaries: shifts that come gradually."""

from __future__ import annotations

from dynmoe.studies.design import Preset, Results, Study

WIDTHS = (0.0, 0.5, 1.0)


class BlurredBoundaries(Study, name="blurred-boundaries", source="ours"):
    """Does growth at boundaries still help when neighbouring tasks run into each other?"""

    def streams(self, preset: Preset) -> dict[str, str]:
        """The class stream with boundaries of growing width, in chunks."""
        start = "--preset paper " if preset == "paper" else "--dataset fractal "
        return {f"width {w:g}": f"{start}--protocol blurred --protocol.width {w}" for w in WIDTHS}

    def variants(self, preset: Preset) -> dict[str, str]:
        """Growth at the nominal boundary, or not at all."""
        return {
            "dense": "--method dense",
            "fresh": "--method fresh",
            "grow g2": "--granularity 2",
            "moe-static": "--method moe-static",
        }

    def verdict(self, results: Results) -> list[str]:
        """The gain of growth over the dense network at each width."""
        return [
            results.says(stream, "grow g2", other, at="mean")
            for stream in results.streams
            for other in ("dense", "moe-static", "fresh")
        ]
