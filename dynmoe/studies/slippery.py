"""A long run whose ground changes: does PPO go on learning, with and without what should help?"""

from __future__ import annotations

from typing import ClassVar

from dynmoe.lab.experiment import Experiment, Results
from dynmoe.lab.study import Command, Preset, Study
from dynmoe.studies.floors import quoted

PLAIN = "dense"


class RLSlippery(
    Study, name="rl-slippery", source="Dohare et al. 2024 (Nature 632, 768-774), Figure 3"
):
    """Does PPO decline where friction changes, and do L2 or continual backprop keep it learning?

    SlipperyAnt-v0, plain PPO: a constant learning rate, no limit on gradients, ten passes over each
    rollout. The decline is the best mean return over a tenth of training less that of the last
    tenth.
    """

    command: ClassVar[Command] = "rl"
    seeds: ClassVar[dict[Preset, int]] = {"laptop": 3, "paper": 5}
    steps: ClassVar[dict[Preset, int]] = {"laptop": 2_457_600, "paper": 50_003_968}
    """environment steps in all"""

    def streams(self, preset: Preset) -> dict[str, str]:
        """One world: friction changes every 153,600 steps, with `paper` every two million."""
        envs, rollout, every = (8, 256, 19_200) if preset == "laptop" else (1, 2048, 2_000_000)
        world = quoted({"every": every})
        return {
            "friction": f"--preset smoke --env SlipperyAnt-v0 --env-args {world} "
            "--normalize-observations --normalize-rewards --encoder mlp --encoder.widths 256 "
            f"--encoder.hidden 256 --num-envs {envs} --rollout-steps {rollout} --minibatches 16 "
            "--epochs 10 --lr 1e-4 --no-anneal-lr --max-grad-norm 0 --no-clip-value --entropy 0 "
            f"--gae-lambda 0.95 --probe-every 20 --threads 1 --total-steps {self.steps[preset]}"
        }

    def variants(self, preset: Preset) -> dict[str, str]:
        """Plain, and kept plastic."""
        return {
            PLAIN: "--method dense",
            "l2": "--method dense --intervention l2",
            "cbp": "--method dense --intervention cbp --intervention.maturity 10000",
        }

    def experiment(self, own: Experiment) -> Experiment:
        """With the best stretch of training, and the decline from it."""
        from agents.experiment import LongLearning

        return LongLearning()

    def verdict(self, results: Results) -> list[str]:
        """How far each falls from its best, and each against the plain network."""
        sentences = []
        for stream in results.streams:
            for variant in results.runs[stream]:
                best = results.values(stream, variant, "best_return")
                gap = results.gap(best, results.values(stream, variant, "final_return"))
                sentences.append(
                    f"{stream}: {variant}: return of its best tenth less that of the last: "
                    f"{gap.point:.0f} [{gap.low:.0f}, {gap.high:.0f}]."
                )
            others = [name for name in results.runs[stream] if name != PLAIN]
            for metric in ("final_return", "decline"):
                sentences += [results.says(stream, other, PLAIN, metric) for other in others]
        return sentences
