"""Test-time adaptation: which LayerNorms get experts."""

from __future__ import annotations

from typing import ClassVar

from dynmoe.studies.design import Command, Preset, Results, Study


class TTALayers(Study, name="tta-layers", source="Fan et al. 2025 (arXiv 2511.13760), ablation"):
    """How many of the first LayerNorms should stay without experts?"""

    command: ClassVar[Command] = "tta"

    def streams(self, preset: Preset) -> dict[str, str]:
        """All domains mixed."""
        start = "--preset imagenet " if preset == "paper" else ""
        return {"potpourri+": f"{start}--streams potpourri+"}

    def variants(self, preset: Preset) -> dict[str, str]:
        """From none kept to all but one; the laptop's model has 9 LayerNorms, ViT-B has 25."""
        kept = (0, 1, 3, 5, 8) if preset == "laptop" else (0, 1, 5, 13, 24)
        return {"noadapt": "--method noadapt", "tent": "--method tent"} | {
            f"{k} kept": f"--method moetta --method.keep {k}" for k in kept
        }

    def verdict(self, results: Results) -> list[str]:
        """Each against the default, which keeps the first."""
        (stream,) = results.streams
        kept = [v for v in results.runs[stream] if v.endswith("kept") and v != "1 kept"]
        return [results.says(stream, v, "1 kept") for v in kept]
