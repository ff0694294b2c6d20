"""Granularity: how many experts a growth adds."""

from __future__ import annotations

from dynmoe.studies.design import Preset, Results, Study


class Granularity(Study, name="granularity", source="Kim 2025 (arXiv 2511.18987)"):
    """Is trainability kept only for granularity 2 and more?

    The paper says that g = 2 and 4 hold the level of the first task, and g = 1 does not.
    """

    def streams(self, preset: Preset) -> dict[str, str]:
        """Class and shuffle streams; the paper's data at the paper's preset."""
        if preset == "paper":
            return {"iid": "--preset paper", "class": "--preset paper --protocol class"}
        return {"class": "--protocol class --dataset fractal",
                "shuffle": "--protocol shuffle --dataset fractal"}  # fmt: skip

    def variants(self, preset: Preset) -> dict[str, str]:
        """Our recipe and the plain form, at g = 1, 2, 4; dense and fresh networks beside them."""
        plain = "--router softmax --gate-scale one --cut utility --init random --init.router new"
        return {
            "dense": "--method dense",
            "fresh": "--method fresh",
            **{f"g{g}": f"--granularity {g}" for g in (1, 2, 4)},
            **{f"plain g{g}": f"--granularity {g} {plain}" for g in (1, 2, 4)},
        }

    def verdict(self, results: Results) -> list[str]:
        """g2 and g4 against g1, and each against its own first task."""
        sentences = []
        for stream in results.streams:
            for form in ("", "plain "):
                for g in ("g2", "g4"):
                    sentences.append(results.says(stream, f"{form}{g}", f"{form}g1"))
                for g in ("g1", "g2", "g4"):
                    sentences.append(results.kept(stream, f"{form}{g}"))
        return sentences
