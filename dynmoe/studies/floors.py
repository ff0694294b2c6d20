"""Reinforcement learning where the world shifts: floors that come after learning, and phases."""

from __future__ import annotations

import json
import shlex
from typing import Any, ClassVar

from dynmoe.lab.experiment import Experiment, Results
from dynmoe.lab.study import Command, Preset, Study

GROWN = ("1 -> 2", "1 -> k", "1 -> 2, clock", "1 -> 2, drift", "1 -> 2, rows kept")
"""Variants whose experts come while they learn."""
FIXED = ("1 expert", "2 experts", "k experts", "dense", "wide", "wide, k")
"""Variants that stay as they are; k stands for as many experts as the world has stages."""
RESETS = ("head reset", "shrink-perturb", "l2-init")
"""What is done to the dense network instead: at each shift, but for l2-init, which acts always."""
ARRIVAL = "--trigger stage --trigger.share 0.5"


def agents(stages: int, clock: int) -> dict[str, str]:
    """Variant -> flags, for a world of that many stages.

    Args:
        stages: floors or phases.
        clock: environment steps after which the growth comes that goes by the clock.
    """
    every = f"{ARRIVAL} --trigger.limit {stages - 1}"
    drift = f"--trigger drift --trigger.unit deviation --trigger.threshold 8 --trigger.delta 0.5 \
--trigger.warmup 10 --trigger.cooldown {clock // 4} --trigger.limit 1"
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
        """Growth at arrival against all others; the newest expert on new floors against old."""
        sentences = []
        for stream in results.streams:
            others = [v for v in results.runs[stream] if v != "1 -> 2"]
            for metric in self.judged:
                sentences += [results.says(stream, "1 -> 2", v, metric) for v in others]
            for variant in (v for v in GROWN if v in results.runs[stream]):
                sentences.append(share_on_floors(results, stream, variant))
                sentences.append(share_over_time(results, stream, variant))
        return sentences


class RLFloors(Shifting, name="rl-floors", source="ours, after Kim 2025 (arXiv 2511.18987)"):
    """Where deeper floors come only after learning, does growing at arrival beat not growing?

    Stages-v0 with six floors: six right actions in a row lead on, and each floor has 16 symbols of
    its own, shown as 24 random numbers that all floors share. Of actions at random 2 % of episodes
    leave the first floor. `last stage after` are the steps until more than half of the environments
    were on the last floor; returns on earlier phases are those of episodes begun on each floor.
    """

    seeds: ClassVar[dict[Preset, int]] = {"laptop": 10, "paper": 20}
    judged: ClassVar = ("final_return", "last_stage", "earlier_return")

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


class RLPhases(Shifting, name="rl-phases", source="ours, after Kim 2025 (arXiv 2511.18987)"):
    """Where Craftax's episodes begin on deeper and deeper floors, does growing at the shift pay?

    Craftax-Phases-v1, symbolic: overworld, dungeon and gnomish mines, with what a player would
    carry there; with `paper` all nine floors. The agents are not told of the phases but by the
    floors that they stand on (`stage`), by the clock, which knows when the second phase begins, or
    by their value loss (`drift`).
    """

    seeds: ClassVar[dict[Preset, int]] = {"laptop": 5, "paper": 5}
    judged: ClassVar = ("phase_return", "recovery", "earlier_return", "forgetting")

    def streams(self, preset: Preset) -> dict[str, str]:
        """Three phases of 16,384 steps on a laptop."""
        floors, each = (3, 16_384) if preset == "laptop" else (9, 10_000_000)
        world = {
            "observation": "symbolic", "floors": list(range(floors)), "steps": each,
            "max_timesteps": 400,
        }  # fmt: skip
        envs = "--num-envs 32 --rollout-steps 32 --minibatches 4 --probe-every 2"
        if preset == "paper":
            envs = "--num-envs 1024 --rollout-steps 64 --minibatches 8 --probe-every 10"
        return {
            "phases": f"--preset craftax --env Craftax-Phases-v1 --env-args {quoted(world)} {envs} "
            f"--total-steps {floors * each} --encoder mlp --encoder.widths 128 --encoder.hidden 64 "
            "--lr 1e-3 --no-anneal-lr --threads 1 --phase-returns"
        }

    def variants(self, preset: Preset) -> dict[str, str]:
        """Those of `rl-floors`; the clock grows with the second phase."""
        return agents(3, 16_384) if preset == "laptop" else agents(9, 10_000_000)


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
    last, first = (results.values(stream, variant, m) for m in ("newest_on_new", "newest_at_first"))
    return _change(results, f"{stream}: {variant}: newest expert's share on its floor", last, first,
                   "from just after its growth to the end")  # fmt: skip


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
