"""TensorBoard's Custom Scalars page: plasticity first, then what may explain it."""

from __future__ import annotations


def _chart(*tags: str) -> tuple[str, list[str]]:
    """One chart with a line per tag; tags are regular expressions."""
    return ("Multiline", [f"^{tag}$" for tag in tags])


LAYOUT = {
    "1 Plasticity": {
        "train accuracy at the end of each task": _chart("task/train_accuracy"),
        "online accuracy of each task": _chart("task/online_accuracy"),
        "test accuracy at the end of each task": _chart("task/test_accuracy"),
        "accuracy during training": _chart("epoch/train_accuracy", "epoch/test_accuracy"),
    },
    "2 Indicators of plasticity loss": {
        "dormant units": _chart("dormant/0", r"dormant/0\.025", r"dormant/0\.1", "inactive_share"),
        "rank of the features": _chart(
            "rank/srank99", "rank/effective_rank", "rank/stable_rank_fro", "rank/feature_rank"
        ),
        "weight norm": _chart("weight_norm/l2"),
        "gradient norm": _chart("grad_norm/l2", "grad_norm/layer_min", "grad_norm/layer_max"),
        "effective rank of the tangent kernel": _chart("task/entk_effective_rank"),
    },
    "3 Experts": {
        "number of experts": _chart("growth/experts"),
        "router: sharpness and balance": _chart("router/entropy", "router/balance"),
        "load": _chart("router/load_max", "router/load_min", "router/newest_share"),
        "dead experts": _chart("router/dead_experts"),
        "gradient norm by age": _chart(r"grad_norm/expert_age_\d+"),
        "drift of past tasks' routing": _chart("router/drift/.*"),
        "what experts tell of the task": _chart("router/task_information_share/.*"),
        "growth shock": _chart("growth/output_change", "growth/loss_before", "growth/loss_after"),
    },
}
