"""Test-time adaptation: MoETTA's load balance."""

from __future__ import annotations

from typing import ClassVar

from dynmoe.studies.design import Command, Preset, Results, Study

WEIGHTS = ("0", "0.05", "0.2", "0.5", "1")


class TTABalance(Study, name="tta-balance", source="Fan et al. 2025 (arXiv 2511.13760), ablation"):
    """Does routing collapse without load balancing, and does it cost accuracy?"""

    command: ClassVar[Command] = "tta"

    def streams(self, preset: Preset) -> dict[str, str]:
        """The largest mixture; and in smaller batches, for four times as many steps."""
        start = "--preset imagenet " if preset == "paper" else ""
        return {
            "potpourri+": f"{start}--streams potpourri+",
            "potpourri+, batches of 8": f"{start}--streams potpourri+ --batch-size 8",
        }

    def variants(self, preset: Preset) -> dict[str, str]:
        """Five weights lambda."""
        return {"noadapt": "--method noadapt", "tent": "--method tent"} | {
            f"lambda {w}": f"--method moetta --method.balance-weight {w}" for w in WEIGHTS
        }

    def verdict(self, results: Results) -> list[str]:
        """Share of the busiest expert and accuracy without balance against the default."""
        return [
            sentence
            for stream in results.streams
            for sentence in (
                results.says(stream, "lambda 0", "lambda 0.2", metric="largest_share", at="last"),
                results.kept(stream, "lambda 0", metric="largest_share"),
                results.kept(stream, "lambda 0.2", metric="largest_share"),
                results.says(stream, "lambda 0", "lambda 0.2"),
                results.says(stream, "lambda 1", "lambda 0.2"),
            )
        ]
