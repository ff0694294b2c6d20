"""Test-time adaptation: what MoETTA's routers learn."""

from __future__ import annotations

from typing import ClassVar

from dynmoe.studies.design import Command, Preset, Results, Study


class TTARouter(Study, name="tta-router", source="ours; questions of Fan et al. 2025"):
    """Do routers become sure, experts different, and is the learned choice worth anything?

    Worth: accuracy on the stream's last batches under the learned routing minus that under experts
    drawn at random. Likeness: mean cosine of the experts' scales and shifts.
    """

    command: ClassVar[Command] = "tta"

    def streams(self, preset: Preset) -> dict[str, str]:
        """All domains mixed, and one after another."""
        start = "--preset imagenet " if preset == "paper" else ""
        return {
            "mixed": f"{start}--streams potpourri+",
            "sequential": f"{start}--streams potpourri+ --order sequential",
        }

    def variants(self, preset: Preset) -> dict[str, str]:
        """The default, thrice its learning rate, and no balance."""
        return {
            "noadapt": "--method noadapt",
            "tent": "--method tent",
            "moetta": "--method moetta",
            "moetta, lr x 3": "--method moetta --method.lr 0.003",
            "moetta, lambda 0": "--method moetta --method.balance-weight 0",
        }

    def verdict(self, results: Results) -> list[str]:
        """Entropy and likeness from the stream's start to its end; worth of the routing."""
        sentences = []
        for stream in results.streams:
            for variant in ("moetta", "moetta, lr x 3", "moetta, lambda 0"):
                for metric in ("router_entropy", "similarity"):
                    sentences.append(results.kept(stream, variant, metric))
                gain = results.interval(stream, variant, "routing_gain")
                point, low, high = (100 * x for x in gain)
                word = gain.verdict("more", "less", "not clearly more or less")
                sentences.append(
                    f"{stream}: {variant}: the learned routing is worth {word} than a random one: "
                    f"{point:+.1f} points [{low:.1f}, {high:.1f}]."
                )
        return sentences
