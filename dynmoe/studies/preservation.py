"""Function preservation: how new experts start."""

from __future__ import annotations

from dynmoe.studies.design import Preset, Results, Study


class Preservation(Study, name="preservation", source="ours; inits after arXiv 1511.05641"):
    """Do random new experts learn better than ones that preserve the network's function?

    The paper draws them at random. Each start is combined with cutting old experts by utility and,
    where it applies, with drawing them anew.
    """

    def streams(self, preset: Preset) -> dict[str, str]:
        """Class and shuffle streams."""
        start = "--preset paper " if preset == "paper" else "--dataset fractal "
        return {name: f"{start}--protocol {name}" for name in ("class", "shuffle")}

    def variants(self, preset: Preset) -> dict[str, str]:
        """Random, silent and duplicated experts."""
        return {
            "dense": "--method dense",
            "fresh": "--method fresh",
            "random, redraw": "--init random --cut redraw",
            "random, utility": "--init random --cut utility",
            "random, utility, new router rows only":
                "--init random --init.router new --cut utility",
            "zero-output, utility": "--init zero-output --cut utility",
            "duplicate, utility": "--init duplicate --cut utility",
        }  # fmt: skip

    def verdict(self, results: Results) -> list[str]:
        """The preserving starts against the random ones at the same cut; and the cuts."""
        pairs = (
            ("random, utility", "zero-output, utility"),
            ("random, utility", "duplicate, utility"),
            ("random, redraw", "random, utility"),
            ("random, utility", "random, utility, new router rows only"),
        )
        return [
            results.says(stream, a, b, at=at)
            for stream in results.streams
            for a, b in pairs
            for at in ("last", "mean")
        ]
