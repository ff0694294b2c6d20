"""What TensorBoard shows of a run of reinforcement learning, see `dynmoe.lab.board`."""

from __future__ import annotations

from dynmoe.lab.board import Board

MOST_ACHIEVEMENTS = 22
"""That have charts of their own, as many as Craftax Classic has; of more, their mean alone."""
STEPS_PER_S = "1 play/speed, environment steps per second"
ROUTER_STRIP = "1 play/router in the deepest episode"
"""A picture."""


def board(achievements: int) -> Board:
    """The charts of an environment with so many achievements."""
    few = 0 < achievements <= MOST_ACHIEVEMENTS
    return Board(
        {
            "1 play": {
                "return": "episode/return",
                "return, latest 100 episodes": "episode/return_recent",
                "return, % of the most possible": "episode/return_percent",
                "return, evaluation": "evaluation/return_mean",
                "stage, mean of the deepest floor": "episode/mean_deepest_floor",
                "steps of an episode": "episode/length",
            },
            "2 growth": {
                "change of the policy, KL": "growth/policy_kl",
                "change of the values": "growth/value_change",
            },
            "3 achievements": {r"\1": "achievement/(.*)"} if few else {"mean": "achievement/.*"},
            "4 plasticity": {
                f"{measure}, {head}": f"{head}/{tag}"
                for head in ("actor", "critic")
                for measure, tag in (
                    ("dormant units", r"dormant/0\.025"),
                    ("rank, effective", "rank/effective_rank"),
                    ("weights, norm", "weight_norm/l2"),
                    ("gradients, norm", "grad_norm/l2"),
                )
            },
            "5 experts": {
                r"dead experts, \1": "(actor|critic)/router/dead_experts",
                r"gates, entropy, \1": "(actor|critic)/router/entropy",
                r"load, newest expert, \1": "(actor|critic)/router/newest_share",
                "what experts tell of the floor": r"router/floor_information_share/[^/]*",
            },
            "6 PPO": {
                "entropy of the policy": "ppo/entropy",
                "explained variance": "ppo/explained_variance",
                "KL of an update": "ppo/approx_kl",
                "loss of the policy": "ppo/policy_loss",
                "loss of the values": "ppo/value_loss",
                "share of clipped ratios": "ppo/clip_share",
            },
        },
        {
            "1 Play": {
                "return": ("1 play/return", "1 play/return, latest.*"),
                "success rate of each achievement": ("3 achievements/.*",),
            },
            "2 Experts": {
                "number of experts": ("2 growth/experts",),
                "gates, entropy": ("5 experts/gates, entropy, .*",),
                "load of the newest expert": ("5 experts/load, newest expert, .*",),
            },
            "3 Indicators of plasticity loss": {
                measure: (f"4 plasticity/{measure}, .*",)
                for measure in ("dormant units", "rank, effective", "weights, norm",
                                "gradients, norm")
            },
        },
    )  # fmt: skip
