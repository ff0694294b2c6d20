"""Growth that keeps its experts, against a reset: what it brings, by which parts, and why.

All four studies are made for two cores and 30 minutes each. Against the paper (Kim, arXiv
2511.18987; Tiny ImageNet, VGG-16 at 64 pixels, 10 tasks of 100 epochs) they are thinned: images of
32 pixels, 10 of the 200 classes (50 where tasks bring new ones), 400 to 2,500 images a task, a CNN
of two convolutions, 5 tasks of 12 to 15 epochs. Preset `paper` runs the same variants at that size.
"""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from dynmoe.lab.experiment import Experiment, Results
from dynmoe.lab.figures import cross, front, looks, new_figure, save
from dynmoe.lab.statistics import Interval
from dynmoe.lab.study import Preset, Study

PHOTOS = Path("data", "tiny-imagenet-200", "train")
"""Where Tiny ImageNet is looked for; the embedded fractal images stand in for it."""
HEAD = "--network.no-neck --network.place head"
FEATURES = "--network.norm --network.statistics"
SAMPLES = "--eval-samples 64 --probe-samples 128"
UNMEASURED = f"{SAMPLES} --measure-every 1000"
"""Plasticity metrics, and shares of the newest experts, in the first task only: they take time."""
DOMAINS = "--protocol domains --protocol.images same --access limited"
CLASS = "--protocol class --protocol.head full --access limited"
CUMULATIVE = "--protocol iid --access cumulative"
NOISE = "--protocol noise --access limited"
KEPT = (
    "--method dynamicmoe --granularity 1 --budget.mode per-growth --budget.start share "
    "--init.router new"
)
"""Growth that leaves its experts as they are, and ends with the units of a dense block."""
KEEP = f"{KEPT} --router gaussian --intervention freeze"

UNITS = {"laptop": 135, "paper": 86}
"""Hidden units of each progressive column: with adapters, about the others' parameters."""
ENOUGH = 0.97
"""Train accuracy of which more does not count in the search."""
ASKED = ("domains", "class")
"""Streams whose old tasks can be asked."""
SHOWN = {
    **dict.fromkeys(ASKED, ("old_accuracy", "accuracy on old tasks at the end")),
    "shuffle": ("online_accuracy", "online accuracy"),
}
"""Stream -> what stands upwards in the figure, where that is not test accuracy."""


def on_images(preset: Preset, classes: int, per_class: int, network: str, stream: str) -> str:
    """Flags of one stream: so many images of so many classes, or with preset paper all."""
    if preset == "paper":
        return f"--preset paper {HEAD} {stream}"
    data = f"--dataset fractal --dataset.train-per-class {per_class}"
    if PHOTOS.is_dir():
        data = f"--dataset tiny-imagenet --dataset.size 32 --dataset.per-class {per_class}"
    return f"{data} --dataset.classes {classes} --network cnn {HEAD} {network} --chunks 5 {stream}"


def about(results: Results) -> str:
    """The data that the streams are made of."""
    parts = [f"{s} on {runs['dense'][0]['dataset']}" for s, runs in results.runs.items()]
    return f"Data: {'; '.join(parts)}."


def points(gap: Interval) -> str:
    """A difference of shares, in points of 100, with its interval if known."""
    point, low, high = (100 * x for x in gap)
    ends = "" if low != low else f" [{low:.1f}, {high:.1f}]"
    return f"{point:+.1f} points{ends}"


class GrowthOrReset(Study, name="growth-or-reset", source="ours"):
    """What does growing experts buy that re-initialising one block does not?

    `keep` leaves its experts as they are, or nearly, and slows the trunk down after the first task.
    Its paces of old experts and of the trunk are chosen on the stream domains, on seeds
    apart, by the mean of two numbers at the stream's end: train accuracy on the last task, of which
    what is above 97 % does not count, and accuracy on old tasks. All variants have the same trunk,
    with normalised features and image statistics, and the same hidden units at the end.
    """

    seeds: ClassVar[dict[Preset, int]] = {"laptop": 5, "paper": 5}
    searched_on = "domains"
    search_seeds = 2

    def streams(self, preset: Preset) -> dict[str, str]:
        """Two whose old tasks can be asked, and three for trainability."""
        network = f"--network.hidden 1024 --epochs 12 {UNMEASURED}"
        shuffle = "--protocol shuffle --protocol.images 800 --access limited"
        sizes = {
            "domains": (10, 250, DOMAINS),
            "class": (50, 80, CLASS),
            "iid-cumulative": (10, 160, CUMULATIVE),
            "noise": (10, 400, NOISE),
            "shuffle": (10, 80, shuffle),
        }
        return {
            name: on_images(preset, classes, images, network, f"{FEATURES} {stream}")
            for name, (classes, images, stream) in sizes.items()
        }

    def variants(self, preset: Preset) -> dict[str, str]:
        """Growth that keeps; resets; today's growth; what the field has against forgetting."""
        return {
            "dense": "--method dense",
            "fresh": "--method fresh",
            "keep": self.searches(preset)["keep"][0],
            "reset-block": "--method reset-block",
            "reset-block, frozen trunk": "--method reset-block --intervention freeze",
            "moe-renewed": "--method moe-renewed",
            "dynamicmoe": "--method dynamicmoe",
            "progressive": f"--method progressive --method.units {UNITS[preset]}",
            "replay": "--method dense --intervention replay",
            "ewc": "--method dense --intervention ewc",
            "l2-init": "--method dense --intervention l2-init",
        }

    def variants_on(self, stream: str, preset: Preset) -> dict[str, str]:
        """All where old tasks can be asked; elsewhere those that the question is about."""
        asked = ("dense", "fresh", "keep", "reset-block", "reset-block, frozen trunk", "dynamicmoe")
        found = self.variants(preset)
        return found if stream in ASKED else {name: found[name] for name in asked}

    def searches(self, preset: Preset) -> dict[str, list[str]]:
        """Paces of `keep`; the first is what stands without a search."""
        return {
            "keep": [
                f"{KEEP} --old-experts.lr {lr} --intervention.factor {trunk}"
                for lr, trunk in product((0.1, 0, 1), (0.03, 0, 0.1))
            ]
        }

    def score(self, experiment: Experiment, summary: dict[str, Any]) -> float:
        """Train accuracy on the last task, up to 97 %, and accuracy on old tasks; their mean."""
        train = experiment.value(summary, "train_accuracy", "last")
        return (min(train, ENOUGH) + experiment.value(summary, "old_accuracy", "last")) / 2

    def verdict(self, results: Results) -> list[str]:
        """`keep` against the reset, also with its trunk frozen, and against fresh networks."""
        sentences = []
        for stream in results.streams:
            metrics = ["train_accuracy"] + ["test_accuracy"] * (stream != "shuffle")
            pairs = [("reset-block", m) for m in metrics] + [("fresh", m) for m in metrics]
            if stream in ASKED:
                others = ("reset-block", "reset-block, frozen trunk", "fresh")
                pairs += list(product(others, ("old_accuracy", "forgetting")))
            sentences += [results.says(stream, "keep", other, metric) for other, metric in pairs]
            sentences.append(self.reached(results, stream))
        return [*sentences, about(results), self.sizes(results)]

    def reached(self, results: Results, stream: str) -> str:
        """Whether the aims are met: 3 points from fresh networks, 15 less forgotten than a reset.

        From differences that the verdict makes anyway: these sentences add no comparison.
        """
        gap = results.difference(stream, "keep", "fresh", "train_accuracy", "last")
        words = [f"within 3 points of fresh networks in train accuracy: {_met(gap, -0.03)}"]
        if stream in ASKED:
            gap = results.difference(stream, "keep", "reset-block", "forgetting", "last")
            less = Interval(-gap.point, -gap.high, -gap.low)
            words.append(f"15 points less forgotten than reset-block: {_met(less, 0.15)}")
        return f"{stream}: keep is {'; '.join(words)}."

    def sizes(self, results: Results) -> str:
        """Parameters at the end of the first stream, and where the figures are."""
        runs = next(iter(results.runs.values()))
        counts = {v: own[0]["tasks"][-1]["parameters"] for v, own in runs.items()}
        least, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        return (
            f"Parameters at the end: {counts[least]:,} ({least}) to {counts[most]:,} ({most}). "
            "The figure has means over seeds with 95 % intervals, and a line through what no other "
            "variant beats in both; accuracies by task are in tasks.png beside it."
        )

    def draw(self, path: Path, results: Results, title: str) -> None:
        """Train accuracy on the last task against what is kept or else learnt, a panel a stream."""
        super().draw(path.with_name("tasks.png"), results, title)
        figure, own = new_figure(title, 4, 3 + 4 * len(results.streams)), looks(results.variants)
        panels = figure.subplots(1, len(results.streams), squeeze=False)[0]
        for stream, axes in zip(results.streams, panels, strict=True):
            metric, label = SHOWN.get(stream, ("test_accuracy", "test accuracy"))
            means = []
            for variant in results.runs[stream]:
                x = results.interval(stream, variant, "train_accuracy", "last")
                y = results.interval(stream, variant, metric, "last")
                cross(axes, x, y, own[variant], variant, 100)
                means.append((100 * x.point, 100 * y.point))
            axes.plot(*zip(*front(means), strict=True), ":", color="#8a8a8a", zorder=0)
            axes.set_title(stream)
            axes.set_xlim(min(axes.get_xlim()[0], 95))  # differences of 0.01 points are none
            axes.set(xlabel="train accuracy, last task (%)", ylabel=f"{label} (%)")
        save(figure, path)


def _met(gap: Interval, aim: float) -> str:
    """Whether a difference is certainly at or above the aim."""
    return "shown" if gap.low >= aim else "missed" if gap.high < aim else "not shown"


NEWEST = "newest_share"
ROUTERS = ("softmax", "cosine", "gaussian", "prototypes", "domain")


class RouterShiftDomains(Study, name="router-shift-domains", source="Kim 2025 (arXiv 2511.18987)"):
    """Do gates move to the newest experts on the new domain, and stay with the old ones on old?

    One expert a domain, experts kept, trunk frozen after the first task, so that only routers
    differ. The newest expert's share of the gates on images of the present domain and of earlier
    ones, at the ends of tasks. It is locked out where its share is below a quarter of an even one.
    """

    seeds: ClassVar[dict[Preset, int]] = {"laptop": 5, "paper": 5}

    def streams(self, preset: Preset) -> dict[str, str]:
        """The same images in each style; another part of the images in each."""
        network = f"--network.hidden 1024 --epochs 12 {SAMPLES}"
        parts = DOMAINS.replace("same", "parts")
        return {
            "same images": on_images(preset, 10, 80, network, f"{FEATURES} {DOMAINS}"),
            "other images": on_images(preset, 10, 400, network, f"{FEATURES} {parts}"),
        }

    def variants(self, preset: Preset) -> dict[str, str]:
        """A router each, new rows drawn; and one with all rows."""
        base = f"{KEPT} --intervention freeze --old-experts.lr 0.1"
        return {
            "dense": "--method dense",
            "fresh": "--method fresh",
            **{router: f"{base} --router {router}" for router in ROUTERS},
            "cosine, all rows": base.replace("router new", "router all") + " --router cosine",
        }

    def verdict(self, results: Results) -> list[str]:
        """Shares on new against old domains; and at the last task against a quarter of even."""
        sentences = []
        for stream in results.streams:
            for router in (*ROUTERS, "cosine, all rows"):
                now = results.values(stream, router, NEWEST, "mean")
                old = results.values(stream, router, f"{NEWEST}_old", "mean")
                gap = results.gap(now, old)
                word = gap.verdict("higher on the new domain", "lower on it", "no difference seen")
                sentences.append(
                    f"{stream}, {router}: share of the newest expert {100 * fmean(now):.1f} % on "
                    f"the new domain, {100 * fmean(old):.1f} % on old ones: {points(gap)}, {word} "
                    f"(mean over tasks 2 and later). {self.locked(results, stream, router)}"
                )
        return [*sentences, about(results)]

    def locked(self, results: Results, stream: str, router: str) -> str:
        """Whether the newest expert is locked out in the last task."""
        share = results.values(stream, router, NEWEST, "last")
        even = results.values(stream, router, "newest_even", "last")
        gap = results.gap(share, [value / 4 for value in even])
        word = gap.verdict("not locked out", "locked out", "perhaps locked out")
        return f"Last task: {word}, {points(gap)} over a quarter of an even share."


class EarlyOverfit(Study, name="early-overfit", source="Kim 2025 (arXiv 2511.18987)"):
    """Do experts that have seen early tasks serve later ones worse than fresh ones?

    The paper assumes so where it grows instead of training all experts from the start. At each
    task's end, hidden units of the oldest, the newest and of freshly drawn experts, equally many,
    are read out by a linear probe of the next task: they differ in what they were trained on alone.
    """

    seeds: ClassVar[dict[Preset, int]] = {"laptop": 5, "paper": 5}

    def streams(self, preset: Preset) -> dict[str, str]:
        """New classes, where early tasks are others; parts that add up, where they are few."""
        short = f"--network.hidden 1024 --epochs 12 {SAMPLES}"
        more = f"{FEATURES} --expert-probes"
        return {
            "class": on_images(preset, 50, 80, short, f"{more} {CLASS}"),
            "iid-cumulative": on_images(preset, 10, 160, short, f"{more} {CUMULATIVE}"),
        }

    def variants(self, preset: Preset) -> dict[str, str]:
        """Experts that rest or learn on, in a trunk that does; and a constant budget."""
        return {
            "dense": "--method dense",
            "fresh": "--method fresh",
            "all learn": KEPT,
            "old experts rest": f"{KEPT} --old-experts.lr 0",
            "frozen trunk": f"{KEPT} --intervention freeze",
            "constant budget": "--method dynamicmoe --pruning utility --init.router new",
        }

    def verdict(self, results: Results) -> list[str]:
        """Oldest and newest experts against fresh ones, on the next task."""
        sentences = []
        for stream in results.streams:
            for variant, age in product(GROWN, ("oldest", "newest")):
                ones, fresh = on_next_task(results, stream, variant, age)
                gap = results.gap(ones, fresh)
                word = gap.verdict("better", "worse", "no difference seen")
                sentences.append(
                    f"{stream}, {variant}: probes of the {age} experts on the next task "
                    f"{100 * fmean(ones):.1f} %, of fresh ones {100 * fmean(fresh):.1f} %: "
                    f"{points(gap)}, {word} (mean over tasks since the first growth)."
                )
        return [*sentences, about(results)]


GROWN = ("all learn", "old experts rest", "frozen trunk", "constant budget")
"""Variants of `early-overfit` that grow."""


def on_next_task(
    results: Results, stream: str, variant: str, age: str
) -> tuple[list[float], list[float]]:
    """[S] accuracy of probes of experts of an age, and [S] of fresh ones: means over equal tasks.

    Only tasks where all ages are known: after the first growth, and not the last task.
    """
    ones: list[float] = []
    fresh: list[float] = []
    for run in results.runs[stream][variant]:
        rows = [row for row in run["tasks"] if row.get("next_newest") is not None]
        for found, field in ((ones, f"next_{age}"), (fresh, "next_fresh")):
            found.append(fmean(row[field] for row in rows) if rows else math.nan)
    return ones, fresh
