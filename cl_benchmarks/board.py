"""What TensorBoard shows of a run of continual learning, see `dynmoe.lab.board`."""

from __future__ import annotations

from dynmoe.lab.board import GROWTH, Board

TASK = "1 accuracy by task"
"""Groups that end in "by task" have the number of the task as their axis."""
LAYER = "(?!.*/expert_)(?:.*)"
"""Name of an MoE layer; the chart is the mean over all."""

BOARD = Board(
    {
        TASK: {
            "at end, train": "task/train_accuracy",
            "at end, test": "task/test_accuracy",
            "online": "task/online_accuracy",
            "old tasks": "task/old_accuracy",
            "old tasks, forgetting": "task/forgetting",
        },
        "2 growth": GROWTH,
        "3 each epoch": {
            "accuracy, train": "epoch/train_accuracy",
            "accuracy, test": "epoch/test_accuracy",
            "loss of a batch": "epoch/loss",
        },
        "4 plasticity": {
            "dormant units": r"dormant/0\.025",
            "dormant units, weighted by the router": r"dormant_routed/0\.025",
            "inactive units": "inactive_share",
            "rank, effective": "rank/effective_rank",
            "rank, srank99": "rank/srank99",
            "rank, stable": "rank/stable_rank_fro",
            "rank, number of features": "rank/feature_rank",
            "rank, of the experts' outputs": "expert_features/effective_rank",
            "weights, norm": "weight_norm/l2",
            "weights, distance from the start": "weight_norm/distance_to_init",
            "gradients, norm": "grad_norm/l2",
            "gradients, share of zeros": "grad_norm/zero_share",
        },
        "5 experts": {
            "gates, entropy": "router/entropy",
            "gates, balance": "router/balance",
            "load, largest": "router/load_max",
            "load, smallest": "router/load_min",
            "load, newest experts": "router/newest_share",
            "dead experts": "router/dead_experts",
        },
        "6 experts by task": {
            "newest experts, share now": "router/newest_share_now",
            "newest experts, share on old tasks": "router/newest_share_old",
            "lock-out": "router/lock_out",
            "routing of old tasks, drift": f"router/drift/{LAYER}",
            "what experts tell of the task": f"router/task_information_share/{LAYER}",
            "next task, probe of the oldest": "task/next_oldest",
            "next task, probe of the newest": "task/next_newest",
            "next task, probe of fresh units": "task/next_fresh",
        },
        "7 more by task": {
            "calibration, ECE": "task/ece",
            "calibration, adaptive ECE": "task/adaptive_ece",
            "parameters": "task/parameters",
            "rank of the tangent kernel": "task/entk_effective_rank",
        },
    },
    {
        "1 Accuracy": {
            "at the end of each task": (f"{TASK}/at end, .*",),
            "during training": ("3 each epoch/accuracy, .*",),
            "old tasks": (f"{TASK}/old tasks.*",),
        },
        "2 Indicators of plasticity loss": {
            "dormant units": ("4 plasticity/(dormant|inactive) units.*",),
            "rank of the features": ("4 plasticity/rank, (effective|srank99|stable)",),
            "norms": ("4 plasticity/(weights|gradients), norm",),
        },
        "3 Experts": {
            "number of experts": ("2 growth/experts",),
            "load": ("5 experts/load, .*",),
            "newest experts": ("6 experts by task/newest experts.*",),
            "linear probes of the next task": ("6 experts by task/next task.*",),
            "shock of a growth": ("2 growth/loss .*",),
        },
    },
)
