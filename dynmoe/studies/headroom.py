"""Where can MoETTA's claim be tested at all? The gates, by severity and by loss."""

from __future__ import annotations

from typing import ClassVar

from dynmoe.lab.experiment import Results
from dynmoe.lab.study import Preset
from dynmoe.studies.tta import TTAStudy
from dynmoe.tta.headroom import GATE_POINTS

LOSSES = {
    "tent": "--method tent",
    "tent, reliable": "--method tent --method.reliable",
    "tent, information": "--method tent --method.im 1",
}
"""Mean entropy; that of samples with H < 0.4 ln C; mean entropy minus that of the mean prediction.
"""


class TTAHeadroom(TTAStudy, name="tta-headroom", source="ours; the claim of Fan et al. 2025"):
    """On which streams could experts help, and with which loss?

    Gate 1: the gradient of the loss agrees with that of the true cross-entropy on more than half of
    the domains. Gate 2: weights of each domain's own, learnt without labels, beat shared ones by 3
    points. A stream on which they fail cannot tell whether experts help. Headroom: the same with
    labels, at equal steps.
    """

    on: ClassVar[dict[str, str]] = {
        f"severity {severity}": f"--streams classical --severity {severity}"
        for severity in (1, 2, 3, 5)
    }

    def variants(self, preset: Preset) -> dict[str, str]:
        """Three losses, and no adaptation, which has no gates."""
        images = 60 if preset == "laptop" else 100
        tents = {loss: f"{own} --gates {images}" for loss, own in LOSSES.items()}
        return {"noadapt": "--method noadapt", **tents}

    def verdict(self, results: Results) -> list[str]:
        """Both gates, headroom and alignment of each stream and loss."""
        return [
            self._gates(results, stream, variant)
            for stream in results.streams
            for variant in LOSSES
            if variant in results.runs[stream]
        ]

    def _gates(self, results: Results, stream: str, variant: str) -> str:
        """What the gates say of one stream and loss."""

        def seeds(metric: str) -> list[float]:
            return results.values(stream, variant, f"gate_{metric}", "mean")

        def mean(metric: str) -> float:
            values = seeds(metric)
            return sum(values) / len(values)

        gain = results.gap(seeds("gain"), [0.0] * len(seeds("gain")))
        room = results.gap(seeds("headroom"), [0.0] * len(seeds("gain")))
        point, low, high = (100 * x for x in gain)
        passed = mean("positive") > 0.5, point >= GATE_POINTS
        follows = "can tell" if all(passed) else "unable to tell"
        more, less, most = (100 * x for x in room)
        return (
            f"{stream}: {variant}: {follows}. Gate 1: cosine with the true gradient "
            f"{mean('cosine_own'):+.2f}, above 0 on {100 * mean('positive'):.0f} % of the domains. "
            f"Gate 2: perfect routing minus shared weights {point:+.1f} points [{low:.1f}, "
            f"{high:.1f}], {GATE_POINTS:g} needed. Source {100 * mean('source'):.1f} %; headroom "
            f"with labels {more:+.1f} points [{less:.1f}, {most:.1f}]; alignment of the domains' "
            f"gradients {mean('alignment'):.2f}."
        )
