"""TensorBoard's Custom Scalars page: how well it plays, whether it can still learn, and why."""

from __future__ import annotations

from typing import Any


def _chart(*tags: str) -> tuple[str, list[str]]:
    """One chart with a line per tag; tags are regular expressions."""
    return ("Multiline", [f"^{tag}$" for tag in tags])


def layout() -> dict[str, Any]:
    """Categories of charts."""
    heads = ("actor", "critic")
    return {
        "1 Play": {
            "episodic return": _chart("episode/return", "episode/return_recent"),
            "% of the most possible": _chart("episode/return_percent"),
            "success rate of each achievement": _chart("achievement/.*"),
            "deepest floor": _chart("episode/deepest_floor", "episode/mean_deepest_floor"),
            "environment steps per second": _chart("time/steps_per_s"),
        },
        "2 Experts": {
            "number of experts": _chart("growth/experts"),
            "load by floor": _chart(r"router/floor_\d+/.*"),
            "what experts tell of the floor": _chart("router/floor_information_share/.*"),
            "router: sharpness and balance": _chart("router/entropy/.*", "router/balance/.*"),
            "growth shock": _chart("growth/policy_kl", "growth/value_change"),
        },
        "3 Indicators of plasticity loss": {
            "dormant units": _chart(*(f"{h}/dormant/0.025" for h in heads)),
            "rank of the features": _chart(*(f"{h}/rank/effective_rank" for h in heads)),
            "weight norm": _chart(*(f"{h}/weight_norm/l2" for h in heads)),
            "gradient norm": _chart(*(f"{h}/grad_norm/l2" for h in heads)),
        },
        "4 PPO": {
            "losses": _chart("ppo/policy_loss", "ppo/value_loss"),
            "entropy": _chart("ppo/entropy"),
            "KL and clipping": _chart("ppo/approx_kl", "ppo/clip_share"),
            "explained variance": _chart("ppo/explained_variance"),
        },
    }
