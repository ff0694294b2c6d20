"""Studies of growth, in continual learning and in reinforcement learning."""

from __future__ import annotations

from typing import ClassVar

from dynmoe.lab.experiment import Results
from dynmoe.lab.statistics import confidence_interval
from dynmoe.lab.study import Command, Preset, Study


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
        plain = (
            "--router softmax --gate-scale one --pruning utility --init random --init.router new"
        )
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


RANK = "rank/effective_rank"
EXPERTS = (1, 2, 4, 8, 16, 32)


class GranularityCapacity(Study, name="granularity-capacity", source="ours"):
    """At a fixed budget, do many narrow experts or few wide ones keep rank and performance?

    Static mixtures of 1 to 32 experts share 256 hidden units; DynamicMoE at g = 2 and networks of
    half and twice the budget stand beside them.
    """

    tags = (("effective rank of the features", RANK),)

    on: ClassVar[dict[str, str]] = {"class": "--protocol class"}

    def variants(self, preset: Preset) -> dict[str, str]:
        """Experts x width at one budget, and two other budgets."""
        static = {
            f"{e} experts": f"--method moe-static --method.experts {e}"
            for e in (1, 2, 4, 8, 16, 32)
        }
        return {
            "dense": "--method dense",
            "fresh": "--method fresh",
            **static,
            "grow g2": "--granularity 2",
            "8 experts, half budget":
                "--method moe-static --method.experts 8 --network.hidden {half}",
            "8 experts, double budget":
                "--method moe-static --method.experts 8 --network.hidden {double}",
        }  # fmt: skip

    def flags_on(self, stream: str, flags: str) -> str:
        """The flags with the laptop's budgets: 256 hidden units, half and double."""
        return flags.format(half=128, double=512)

    def verdict(self, results: Results) -> list[str]:
        """Against one expert; and the features' rank at the end."""
        sentences = []
        for stream in results.streams:
            for e in (4, 32):
                sentences.append(results.says(stream, f"{e} experts", "1 experts", at="mean"))
            sentences.append(results.says(stream, "grow g2", "8 experts", at="mean"))
            for variant in ("1 experts", "8 experts", "32 experts", "grow g2", "fresh"):
                ranks = [seed[-1] for seed in results.scalars(stream, variant, RANK)]
                point, low, high = confidence_interval(ranks, "mean")
                sentences.append(
                    f"{stream}: effective rank of the features after the last task, {variant}: "
                    f"{point:.1f} [{low:.1f}, {high:.1f}]."
                )
        return sentences


STEPS = {"class": 640, "shuffle": 320}
"""Optimizer steps of one task in the laptop's streams."""
TASKS = 10


class GrowthTiming(Study, name="growth-timing", source="ours"):
    """Does growth have to come often, and at the true points of shift?

    Growths at half, once and twice the interval between shifts; and as often as the shifts, but in
    the middle of the tasks. All have the same budget.
    """

    def variants(self, preset: Preset) -> dict[str, str]:
        """Schedules in tasks; the stream's own clock is filled in by `flags_on`."""
        return {
            "dense": "--method dense",
            "fresh": "--method fresh",
            "at shifts (1x)": "--trigger task",
            "twice per task (0.5x)": "--trigger every --trigger.steps {half}",
            "every second task (2x)": "--trigger every --trigger.steps {double}",
            "mid-task (1x)": "--trigger at --trigger.steps {middles}",
            "once": "--trigger at --trigger.steps {once}",
        }

    def flags_on(self, stream: str, flags: str) -> str:
        """The flags with the stream's steps."""
        steps = STEPS[stream]
        middles = [str(task * steps + steps // 2) for task in range(TASKS - 1)]
        return flags.format(
            half=steps // 2, double=2 * steps, middles=" ".join(middles), once=steps
        )

    def verdict(self, results: Results) -> list[str]:
        """Each schedule against growth at the shifts; and the gap to fresh networks."""
        others = ("twice per task (0.5x)", "every second task (2x)", "mid-task (1x)", "once")
        return [
            results.says(stream, other, "at shifts (1x)", at="mean")
            for stream in results.streams
            for other in others
        ] + [results.says(s, "at shifts (1x)", "fresh", at="mean") for s in results.streams]


class Preservation(Study, name="preservation", source="ours; inits after arXiv 1511.05641"):
    """Do random new experts learn better than ones that preserve the network's function?

    The paper draws them at random. Each start is combined with cutting old experts by utility and,
    where it applies, with re-initialising them.
    """

    def variants(self, preset: Preset) -> dict[str, str]:
        """Random, silent and duplicated experts."""
        return {
            "dense": "--method dense",
            "fresh": "--method fresh",
            "random, redraw": "--init random --pruning reinit",
            "random, utility": "--init random --pruning utility",
            "random, utility, new router rows only":
                "--init random --init.router new --pruning utility",
            "zero-output, utility": "--init zero-output --pruning utility",
            "duplicate, utility": "--init duplicate --pruning utility",
        }  # fmt: skip

    def verdict(self, results: Results) -> list[str]:
        """The preserving starts against the random ones at the same pruning; and the criteria."""
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


class DynamicAgainstStatic(Study, name="dynamic-against-static", source="ours"):
    """Is it growth that helps, or would the same capacity from the start do as well?

    With a constant budget, growing and static networks have the same parameters and, as all experts
    are used softly, the same multiplications at every step. With a budget per growth the static
    peers are matched in final parameters, and in multiplications averaged over the stream. The
    control `renewed` re-draws a constant number of experts at every task.
    """

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


NEWEST = "router/newest_share"
G = 2


class RouterShift(Study, name="router-shift", source="Kim 2025 (arXiv 2511.18987)"):
    """Do router weights move to the new experts at boundaries?

    The share of the gates that the newest experts hold on the task's probe images, at the end of
    the first epoch after a growth and at the end of the task, against an even share.
    """

    tags = (("share of the newest experts", NEWEST), ("router entropy", "router/entropy"))

    def variants(self, preset: Preset) -> dict[str, str]:
        """Our recipe; only new rows drawn; the plain form."""
        plain = "--router softmax --gate-scale one --pruning utility --init.router new"
        return {
            "dense": "--method dense",
            "fresh": "--method fresh",
            "all rows redrawn": f"--granularity {G}",
            "new rows only": f"--granularity {G} --init.router new",
            "plain": f"--granularity {G} --init random {plain}",
        }

    def verdict(self, results: Results) -> list[str]:
        """Share of the newest experts minus an even share, by the last growth."""
        sentences = []
        for stream in results.streams:
            for variant in ("all rows redrawn", "new rows only", "plain"):
                for moment, text in ((0, "one epoch after growths"), (-1, "at the end of tasks")):
                    gap = results.gap(*self._shares(results, stream, variant, moment))
                    low, high = 100 * gap.low, 100 * gap.high
                    word = gap.verdict("move to", "avoid", "show no bias to")
                    sentences.append(
                        f"{stream}, {variant}: gates {word} the newest experts {text}: "
                        f"{100 * gap.point:+.1f} points [{low:.1f}, {high:.1f}] over an even share "
                        "(mean over tasks 2 and later)."
                    )
        return sentences

    def _shares(
        self, results: Results, stream: str, variant: str, moment: int
    ) -> tuple[list[float], list[float]]:
        """Per seed: the newest experts' share, and an even one, as means over tasks 2 and later."""
        shares, evens = [], []
        for values, run in zip(
            results.scalars(stream, variant, NEWEST), results.runs[stream][variant], strict=True
        ):
            tasks = run["tasks"]
            epochs = len(values) // len(tasks)
            at = [values[k * epochs : (k + 1) * epochs][moment] for k in range(1, len(tasks))]
            even = [G / task["num_experts"] for task in tasks[1:]]
            shares.append(sum(at) / len(at))
            evens.append(sum(even) / len(even))
        return shares, evens


class RLGrowth(Study, name="rl-growth", source="Kim 2025 (arXiv 2511.18987)"):
    """Does a PPO agent that grows from one to two experts beat one or two from the start?"""

    command: ClassVar[Command] = "rl"

    def streams(self, preset: Preset) -> dict[str, str]:
        """Craftax-Classic pixels on a laptop; full Craftax with the paper's preset."""
        if preset == "paper":
            return {"craftax": "--preset paper"}
        return {"craftax-classic": "--total-steps 65536 --trigger.steps 32768 --threads 1"}

    def variants(self, preset: Preset) -> dict[str, str]:
        """The paper's comparison, and a wide dense network."""
        return {
            "1 -> 2 experts": "--method dynamicmoe",
            "1 expert": "--method moe-start",
            "2 experts": "--method moe-static",
            "wide": "--method wide",
            "dense": "--method dense",
        }

    def verdict(self, results: Results) -> list[str]:
        """The growing agent against each other one."""
        return [
            results.says(stream, "1 -> 2 experts", other)
            for stream in results.streams
            for other in ("1 expert", "2 experts", "wide", "dense")
        ]
