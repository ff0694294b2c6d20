"""Studies of test-time adaptation."""

from __future__ import annotations

from typing import ClassVar

from dynmoe.lab.experiment import Results
from dynmoe.lab.study import Command, Preset, Study

METHODS = ("noadapt", "tent", "eata", "sar", "deyo", "cotta", "becotta", "moetta")
RATES = ("1", "3", "10", "30")
"""Multiples of the published learning rates; the laptop's default is 10."""


class TTAStudy(Study):
    """On the laptop's embedded images, or on ImageNet's shifted sets."""

    command: ClassVar[Command] = "tta"
    start: ClassVar[dict[Preset, str]] = {"laptop": "", "paper": "--preset imagenet"}
    on: ClassVar[dict[str, str]] = {
        "mixed": "--streams potpourri+",
        "sequential": "--streams potpourri+ --order sequential",
    }


class TTAMethods(
    TTAStudy, name="tta-methods", source="Fan et al. 2025 (arXiv 2511.13760), Table 1"
):
    """Does MoETTA gain more from mixed shifts than the methods before it?

    Every method with its defaults, and with its learning rate chosen among four by the accuracy on
    one seed apart: the same domains in another order, so an oracle's choice, for all methods alike.
    """

    seeds: ClassVar[dict[Preset, int]] = {"laptop": 5, "paper": 3}

    on: ClassVar[dict[str, str]] = {
        s: f"--streams {s}" for s in ("classical", "potpourri", "potpourri+")
    }

    def variants(self, preset: Preset) -> dict[str, str]:
        """Every method with its defaults; EATA also without its Fisher penalty (ETA)."""
        return {name: f"--method {name}" for name in METHODS} | {
            "eta": "--method eata --method.fisher-weight 0"
        }

    def searches(self, preset: Preset) -> dict[str, list[str]]:
        """Four learning rates of each method that learns."""
        return {
            f"{name}, tuned": [f"--method {name} --lr-scale {rate}" for rate in RATES]
            for name in METHODS
            if name != "noadapt"
        }

    def verdict(self, results: Results) -> list[str]:
        """MoETTA against each; and what adapting costs on clean images."""
        others = [name for name in self.variants("laptop") if name != "moetta"]
        clean = results.streams[-1]
        return [
            *(results.says(s, "moetta", other) for s in results.streams for other in others),
            *(
                results.says(s, "moetta, tuned", f"{name}, tuned")
                for s in results.streams
                for name in ("tent", "eata", "deyo")
            ),
            *(results.says(s, "moetta, tuned", "noadapt") for s in results.streams),
            *(results.says(clean, name, "noadapt", metric="clean") for name in ("tent", "moetta")),
        ]


WEIGHTS = ("0", "0.05", "0.2", "0.5", "1")


class TTABalance(
    TTAStudy, name="tta-balance", source="Fan et al. 2025 (arXiv 2511.13760), ablation"
):
    """Does routing collapse without load balancing, and does it cost accuracy?"""

    on: ClassVar[dict[str, str]] = {  # in smaller batches four times as many steps
        "potpourri+": "--streams potpourri+",
        "potpourri+, batches of 8": "--streams potpourri+ --batch-size 8",
    }

    def variants(self, preset: Preset) -> dict[str, str]:
        """Five weights lambda."""
        return {"noadapt": "--method noadapt", "tent": "--method tent"} | {
            f"lambda {w}": f"--method moetta --method.balance-weight {w}" for w in WEIGHTS
        }

    def verdict(self, results: Results) -> list[str]:
        """Share of the most loaded expert and accuracy without balance against the default."""
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


COUNTS = (2, 3, 5, 9, 15)


class TTAExperts(TTAStudy, name="tta-experts", source="ours; the growth is our extension"):
    """How many experts does MoETTA need, and does growing them as the stream shifts do as well?"""

    def variants(self, preset: Preset) -> dict[str, str]:
        """Fixed numbers; from 2 to 9 at a rise of the entropy, and by the clock."""
        wait = 10 if preset == "laptop" else 500
        moetta = "--method moetta --method.num-experts"
        grow = f"{moetta} 2 --method.max-experts 9 --method.grow-wait {wait} --method.grow"
        return {
            "noadapt": "--method noadapt",
            "tent": "--method tent",
            **{f"E = {e}": f"{moetta} {e}" for e in COUNTS},
            "2 to 9, drift": f"{grow} drift",
            "2 to 9, clock": f"{grow} every",
        }

    def verdict(self, results: Results) -> list[str]:
        """Each number against the paper's 9, and growing against both of its ends."""
        pairs = [(f"E = {e}", "E = 9") for e in COUNTS if e != 9]
        for growing in ("2 to 9, drift", "2 to 9, clock"):
            pairs += [(growing, "E = 2"), (growing, "E = 9")]
        return [results.says(stream, a, b) for stream in results.streams for a, b in pairs]


class TTALayers(TTAStudy, name="tta-layers", source="Fan et al. 2025 (arXiv 2511.13760), ablation"):
    """How many of the first LayerNorms should stay without experts?"""

    on: ClassVar[dict[str, str]] = {"potpourri+": "--streams potpourri+"}

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


SIZES = (1, 4, 16, 64)


class TTABatchSize(TTAStudy, name="tta-batch-size", source="ours"):
    """Which methods survive small batches at learning rates made for large ones?

    The learning rates are scaled with the batch, so that all sizes learn at one pace per image.
    """

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


class TTARouter(TTAStudy, name="tta-router", source="ours; questions of Fan et al. 2025"):
    """Do routers become sure, experts different, and is the learned choice worth anything?

    Worth: accuracy on the stream's last batches under the learned routing minus that under experts
    drawn at random. Likeness: mean cosine of the experts' scales and shifts.
    """

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
                found = results.values(stream, variant, "routing_gain")
                gain = results.gap(found, [0.0] * len(found))
                point, low, high = (100 * x for x in gain)
                word = gain.verdict("more", "less", "not clearly more or less")
                sentences.append(
                    f"{stream}: {variant}: the learned routing is worth {word} than a random one: "
                    f"{point:+.1f} points [{low:.1f}, {high:.1f}]."
                )
        return sentences
