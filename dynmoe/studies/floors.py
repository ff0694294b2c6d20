"""Reinforcement learning where the world shifts: floors that come after learning, and phases."""

from __future__ import annotations

import json
import shlex
from typing import Any, ClassVar

from dynmoe.lab.experiment import Experiment, Results
from dynmoe.lab.study import Command, Preset, Study

OTHERS = ("1 expert", "2 experts", "dense", "wide", "head reset", "shrink-perturb", "l2-init")
"""What 1 -> 2 at arrival is compared with in all that is judged. Head reset and shrink-perturb act
on the dense network at each shift, l2-init always."""
TIMES = ("1 -> k", "1 -> 2, clock", "1 -> 2, drift", "1 -> 2, rows kept")
"""Other ways to grow, compared in the first thing that is judged."""
FULL = ("k experts", "wide, k")
"""What 1 -> k is compared with in the first thing that is judged, where a study has them."""
WATCHED = ("1 -> 2", "1 -> k", "1 -> 2, rows kept")
"""Variants whose newest expert is looked at: it comes with a floor."""
ROUTING = ("floor_information", "segment_routing")
"""What the router's use of experts is judged by, grown against experts from the start."""
OVER_TIME = ("newest_on_new", "newest_at_first")
"""The newest expert's share on its floor at the end, and just after its growth."""
ARRIVAL = "--trigger stage --trigger.share 0.5"
ROUTERS = {
    "cosine": "",
    "cosine, sharp": "--router cosine --router.temperature 0.1",
    "softmax": "--router softmax",
    "gaussian": "--router gaussian",
    "prototypes": "--router prototypes",
    "top-1": "--router topk --router.k 1",
}
"""Routers that `rl-routers` compares, by flags. `cosine` is the default, of temperature 0.2."""
KEPT = "gaussian, rows kept"
"""Growth with the Gaussian router that leaves the old experts' statistics as they are."""


def agents(stages: int, clock: int) -> dict[str, str]:
    """Variant -> flags, for a world of that many stages.

    Args:
        stages: floors or phases.
        clock: environment steps after which the growth comes that goes by the clock.
    """
    every = f"{ARRIVAL} --trigger.limit {stages - 1}"
    drift = (
        "--trigger drift --trigger.unit deviation --trigger.threshold 8 --trigger.delta 0.5 "
        f"--trigger.warmup 10 --trigger.cooldown {clock // 4} --trigger.limit 1"
    )
    return {
        "1 -> 2": f"--method dynamicmoe {ARRIVAL}",
        "1 -> k": f"--method dynamicmoe {every}",
        "1 -> 2, clock": f"--method dynamicmoe --trigger at --trigger.steps {clock}",
        "1 -> 2, drift": f"--method dynamicmoe {drift}",
        "1 -> 2, rows kept": f"--method dynamicmoe {ARRIVAL} --init random --init.router new",
        "1 expert": f"--method moe-start {ARRIVAL}",
        "2 experts": f"--method moe-static {ARRIVAL}",
        "k experts": f"--method moe-static {every}",
        "dense": "--method dense",
        "wide": f"--method wide {ARRIVAL}",
        "wide, k": f"--method wide {every}",
        "head reset": "--method dense --intervention head-reset",
        "shrink-perturb": "--method dense --intervention shrink-perturb --intervention.shrink 0.8",
        "l2-init": "--method dense --intervention l2-init --intervention.strength 1e-4",
    }


class Shifting(Study):
    """Base of studies whose agents meet shifts: their verdict and their columns."""

    command: ClassVar[Command] = "rl"
    judged: ClassVar[tuple[str, ...]]
    """metrics on which growth is compared with each other agent"""

    def experiment(self, own: Experiment) -> Experiment:
        """With the columns of phases and floors."""
        from agents.experiment import PhasedLearning

        return PhasedLearning()

    def verdict(self, results: Results) -> list[str]:
        """Growth at arrival against the others; the newest expert on new floors against old."""
        sentences = []
        for stream in results.streams:
            others, times, full, watched = (
                [v for v in names if v in results.runs[stream]]
                for names in (OTHERS, TIMES, FULL, WATCHED)
            )
            for metric in self.judged:
                sentences += [results.says(stream, "1 -> 2", other, metric) for other in others]
            first = self.judged[0]
            sentences += [results.says(stream, "1 -> 2", other, first) for other in times]
            sentences += [results.says(stream, "1 -> k", other, first) for other in full]
            for variant in watched:
                sentences.append(share_on_floors(results, stream, variant))
                sentences.append(share_over_time(results, stream, variant))
            sentences += [routing_against(results, stream, metric) for metric in ROUTING]
        return sentences


class RLFloors(Shifting, name="rl-floors", source="ours, after Kim 2025 (arXiv 2511.18987)"):
    """Where deeper floors come only after learning, does growing at arrival beat not growing?

    Stages-v0 with six floors: six right actions in a row lead on, and each floor has 16 symbols of
    its own, shown as 24 random numbers that all floors share. Of actions at random 2 % of episodes
    leave the first floor. `last stage after` are the steps until more than half of the environments
    were on the last floor; returns on earlier phases are those of episodes begun on each floor.
    """

    seeds: ClassVar[dict[Preset, int]] = {"laptop": 10, "paper": 20}
    judged: ClassVar = ("final_return", "last_stage", "recovery", "earlier_return")

    def streams(self, preset: Preset) -> dict[str, str]:
        """One game, longer with `paper`."""
        game = {"need": 6, "floors": 6, "symbols": 16, "sights": 24, "longest": 96}
        steps = 40_960 if preset == "laptop" else 409_600
        return {
            "stages": f"--preset smoke --env Stages-v0 --env-args {quoted(game)} --phase-returns "
            f"--total-steps {steps} --encoder mlp --encoder.hidden 32 --encoder.widths 64 "
            "--probe-every 5"
        }

    def variants(self, preset: Preset) -> dict[str, str]:
        """The clock grows when half of the time is over."""
        return agents(6, 20_480 if preset == "laptop" else 204_800)


class RLRouters(RLFloors, name="rl-routers", source="ours, after Kim 2025 (arXiv 2511.18987)"):
    """Does any router hand new floors to the new expert, and does that bring return?

    The world of rl-floors. 1 -> 2 experts at arrival against 2 from the start, router by router.
    """

    def variants(self, preset: Preset) -> dict[str, str]:
        """Each router grown and from the start; 1 expert and the dense network for reference."""
        grown, start = f"--method dynamicmoe {ARRIVAL}", f"--method moe-static {ARRIVAL}"
        return {
            **{f"1 -> 2, {name}": f"{grown} {own}".strip() for name, own in ROUTERS.items()},
            f"1 -> 2, {KEPT}": f"{grown} --router gaussian --init random --init.router new",
            **{f"2 experts, {name}": f"{start} {own}".strip() for name, own in ROUTERS.items()},
            "1 expert": f"--method moe-start {ARRIVAL}",
            "dense": "--method dense",
        }

    def verdict(self, results: Results) -> list[str]:
        """Shares of the newest expert by router, and what each growth brings."""
        (stream,) = results.streams
        pairs = [(f"1 -> 2, {name}", f"2 experts, {name}") for name in ROUTERS]
        pairs.append((f"1 -> 2, {KEPT}", "2 experts, gaussian"))
        sentences = [share_on_floors(results, stream, grown) for grown, _ in pairs]
        sentences += [share_over_time(results, stream, grown) for grown, _ in pairs]
        sentences += [results.says(stream, grown, start) for grown, start in pairs]
        return sentences + [results.says(stream, grown, "1 expert") for grown, _ in pairs]


class RLPhases(Shifting, name="rl-phases", source="ours, after Kim 2025 (arXiv 2511.18987)"):
    """Where Craftax's episodes begin on deeper and deeper floors, does growing at the shift pay?

    Craftax-Phases-v1, symbolic: overworld, dungeon and gnomish mines, with what a player would
    carry there; with `paper` all nine floors. The agents are not told of the phases but by the
    floors that they stand on (`stage`), by the clock, which knows when the second phase begins, or
    by their value loss (`drift`).
    """

    seeds: ClassVar[dict[Preset, int]] = {"laptop": 5, "paper": 5}
    judged: ClassVar = ("phase_return", "recovery", "earlier_return", "forgetting")
    phase: ClassVar[int] = 8_192
    """environment steps of a phase on a laptop"""

    def streams(self, preset: Preset) -> dict[str, str]:
        """Three phases on a laptop."""
        floors, each = (3, self.phase) if preset == "laptop" else (9, 10_000_000)
        return {"phases": phases(list(range(floors)), each, floors * each, preset)}

    def variants(self, preset: Preset) -> dict[str, str]:
        """Those of `rl-floors`, but for k from the start; the clock grows with the second phase."""
        found = agents(3, self.phase) if preset == "laptop" else agents(9, 10_000_000)
        return {name: own for name, own in found.items() if name not in FULL}


class RLPhasesLong(
    RLPhases, name="rl-phases-long", source="ours, after Kim 2025 (arXiv 2511.18987)"
):
    """rl-phases with phases four times as long, asked of fewer agents.

    Does growing at the shift beat one expert, two from the start, and the dense network?
    """

    phase: ClassVar[int] = 32_768
    asked: ClassVar = ("1 -> 2", "1 expert", "2 experts", "dense")

    def variants(self, preset: Preset) -> dict[str, str]:
        """Growth at arrival, and what the claim compares it with."""
        return {name: own for name, own in super().variants(preset).items() if name in self.asked}


class RLTakeover(Shifting, name="rl-takeover", source="ours, after Kim 2025 (arXiv 2511.18987)"):
    """Why does the newest expert get most of the weight on Craftax, on every floor?

    Two worlds: after half of the time episodes begin in the dungeon, or go on in the overworld. One
    expert becomes two at that moment. The new one is drawn at random (the default), is a copy of
    the old one, starts with output 0, or learns at a tenth of the pace. If a new floor is the
    reason, its share rises in the first world alone. If being untrained is, a copy's does not rise.
    If it learns faster than the old one, at a tenth of the pace it rises less.
    """

    seeds: ClassVar[dict[Preset, int]] = {"laptop": 5, "paper": 5}
    half: ClassVar[dict[Preset, int]] = {"laptop": 24_576, "paper": 10_000_000}
    """environment steps before the growth, and after it"""
    drawn: ClassVar = "drawn at random"

    def streams(self, preset: Preset) -> dict[str, str]:
        """With the next floor, and without."""
        total, worlds = 2 * self.half[preset], {"next floor": [0, 1], "same floor": [0]}
        return {
            name: phases(floors, total // len(floors), total, preset)
            for name, floors in worlds.items()
        }

    def variants(self, preset: Preset) -> dict[str, str]:
        """Ways to make the new expert, one change each."""
        grown = f"--method dynamicmoe --trigger at --trigger.steps {self.half[preset]}"
        return {
            self.drawn: grown,
            "a copy": f"{grown} --init duplicate",
            "output 0": f"{grown} --init zero-output",
            "a tenth of the pace": f"{grown} --new-experts.lr 0.1 --new-experts.lr-steps 1000000",
        }

    def verdict(self, results: Results) -> list[str]:
        """Does its share rise after the growth, by world and start?"""
        sentences = [
            share_over_time(results, stream, variant)
            for stream in results.streams
            for variant in results.variants
        ]
        others = [name for name in results.variants if name != self.drawn]
        sentences += [
            results.says(stream, other, self.drawn, "newest_on_new")
            for stream in results.streams
            for other in others
        ]
        if len(results.streams) == 2:
            new, same = results.streams
            ones, twos = (_rise(results, stream, self.drawn) for stream in (new, same))
            gap = results.gap(ones, twos)
            sentences.append(
                f"{self.drawn}: the rise on the {new} less that on the {same}: "
                f"{gap.point:+.3f} [{gap.low:.3f}, {gap.high:.3f}], "
                f"{gap.verdict('higher', 'lower', 'no difference seen')}."
            )
        return sentences


class RLCraftaxRouters(
    RLTakeover, name="rl-craftax-routers", source="ours, after Kim 2025 (arXiv 2511.18987)"
):
    """Does any router give Craftax's next floor to the new expert, and leave the first alone?

    The first world of rl-takeover, with the new expert drawn at random. Those routers are asked
    that brought the most return in rl-routers, and the one whose newest expert was used most.
    """

    asked: ClassVar = ("cosine", "cosine, sharp", "softmax", "gaussian")

    def streams(self, preset: Preset) -> dict[str, str]:
        """With the next floor."""
        return {"next floor": super().streams(preset)["next floor"]}

    def variants(self, preset: Preset) -> dict[str, str]:
        """One a router."""
        grown = super().variants(preset)[self.drawn]
        return {name: f"{grown} {ROUTERS[name]}".strip() for name in self.asked}

    def verdict(self, results: Results) -> list[str]:
        """The newest expert's share, by floor and over time; what gates tell of floors; return."""
        sentences = []
        for stream in results.streams:
            sentences += [share_on_floors(results, stream, name) for name in self.asked]
            sentences += [share_over_time(results, stream, name) for name in self.asked]
            for metric in ("floor_information", "phase_return"):
                sentences += [
                    results.says(stream, name, self.asked[0], metric) for name in self.asked[1:]
                ]
        return sentences


def phases(floors: list[int], each: int, total: int, preset: Preset) -> str:
    """Flags of Craftax in phases, symbolic, with a small network on a laptop.

    Args:
        floors: that episodes of each phase begin on.
        each, total: environment steps of a phase, and in all.
        preset: of the study.
    """
    world = {"observation": "symbolic", "floors": floors, "steps": each, "max_timesteps": 400}
    envs, width = "--num-envs 32 --rollout-steps 32 --minibatches 4 --probe-every 2", 64
    if preset == "paper":
        envs, width = "--num-envs 1024 --rollout-steps 64 --minibatches 8 --probe-every 10", 512
    return (
        f"--preset craftax --env Craftax-Phases-v1 --env-args {quoted(world)} {envs} "
        f"--total-steps {total} --encoder mlp --encoder.widths {width} "
        "--encoder.hidden 64 --lr 1e-3 --no-anneal-lr --threads 1 --phase-returns"
    )


def quoted(options: dict[str, Any]) -> str:
    """Options of an environment as one word of a command line."""
    return shlex.quote(json.dumps(options))


def share_on_floors(results: Results, stream: str, variant: str) -> str:
    """One sentence: is the newest expert used more where it came than on the floors before?"""
    new, old = (results.values(stream, variant, f"newest_on_{age}") for age in ("new", "old"))
    return _change(results, f"{stream}: {variant}: newest expert's share", new, old,
                   "on the floor that it came on, against the floors before")  # fmt: skip


def share_over_time(results: Results, stream: str, variant: str) -> str:
    """One sentence: does the newest expert's share on its floor rise after its growth?"""
    last, first = (results.values(stream, variant, m) for m in OVER_TIME)
    return _change(results, f"{stream}: {variant}: newest expert's share on its floor", last, first,
                   "from just after its growth to the end")  # fmt: skip


def _rise(results: Results, stream: str, variant: str) -> list[float]:
    """[S] by how much the newest expert's share on its floor rises after its growth."""
    last, first = (results.values(stream, variant, m) for m in OVER_TIME)
    return [a - b for a, b in zip(last, first, strict=True)]


def routing_against(results: Results, stream: str, metric: str) -> str:
    """One sentence: do grown experts divide the work otherwise than those from the start?"""
    from agents.phases import METRICS

    grown, started = (results.values(stream, v, metric) for v in ("1 -> 2", "2 experts"))
    what = f"{stream}: 1 -> 2 against 2 experts: {METRICS[metric]}"
    return _change(results, what, grown, started, "at the end of training")


def _change(results: Results, what: str, ones: list[float], others: list[float], where: str) -> str:
    """One sentence on two numbers of each seed, of those seeds that have both."""
    pairs = [(a, b) for a, b in zip(ones, others, strict=True) if a == a and b == b]
    if not pairs:
        return f"{what} {where}: not measured, no growth or no older floor."
    gap = results.gap(*zip(*pairs, strict=True))
    word = gap.verdict("higher", "lower", "no difference seen")
    return (
        f"{what} {where}: {gap.point:+.3f} [{gap.low:.3f}, {gap.high:.3f}], {word} "
        f"({len(pairs)} of {len(ones)} seeds)."
    )
