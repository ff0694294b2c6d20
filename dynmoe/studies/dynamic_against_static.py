"""Dynamic against static: growing, or all capacity from the start."""

from __future__ import annotations

from dynmoe.studies.design import Preset, Results, Study


class DynamicAgainstStatic(Study, name="dynamic-against-static", source="ours"):
    """Is it growth that helps, or would the same capacity from the start do as well?

    With a constant budget, growing and static networks have the same parameters and, as all experts
    are used softly, the same multiplications at every step. With a budget per growth the static
    peers are matched in final parameters, and in multiplications averaged over the stream. The
    control `renewed` re-draws a constant number of experts at every task.
    """

    def streams(self, preset: Preset) -> dict[str, str]:
        """Class and shuffle streams."""
        start = "--preset paper " if preset == "paper" else "--dataset fractal "
        return {name: f"{start}--protocol {name}" for name in ("class", "shuffle")}

    def variants(self, preset: Preset) -> dict[str, str]:
        """Growing and static networks, at both budgets."""
        grown = "--budget.mode per-growth --budget.units 32"
        static = "--method moe-static --network.hidden"
        return {
            "dense": "--method dense",
            "fresh": "--method fresh",
            "grow, constant": "--granularity 2",
            "static, constant": "--method moe-static",
            "renewed": "--method moe-renewed",
            "grow, per growth": f"--granularity 2 --network.hidden 64 {grown}",
            "static, final parameters": f"{static} 640",
            "static, equal work": f"{static} 352",
        }

    def verdict(self, results: Results) -> list[str]:
        """Growing minus static, and growing minus renewed."""
        pairs = (
            ("grow, constant", "static, constant"),
            ("grow, constant", "renewed"),
            ("grow, per growth", "static, final parameters"),
            ("grow, per growth", "static, equal work"),
        )
        return [
            results.says(stream, a, b, at=at)
            for stream in results.streams
            for a, b in pairs
            for at in ("last", "mean")
        ]
