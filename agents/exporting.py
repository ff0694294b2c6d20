"""Trained policies, to be exported and made again without their environments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from agents.actor_critic import Spaces
from agents.making import make_env, make_policy
from agents.settings import Config
from dynmoe.errors import UserError
from dynmoe.interventions.intervention import Intervention
from dynmoe.lab.export import Exporter, no_checkpoint
from envs.vector import TorchVectorEnv
from envs.wrappers import LIMIT

CPU = torch.device("cpu")
EPSILON = 1e-8
"""What gymnasium's NormalizeObservation adds to the variance."""


class Normalise(nn.Module):
    """Observations [B, D] or [B, C, H, W] as the agent saw them: by running statistics, clipped.

    Args:
        mean, var: [D] or [C, H, W], of the training environments.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, mean: Tensor, var: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("var", var.float())

    def forward(self, x: Tensor) -> Tensor:
        """Observations [B, D] or [B, C, H, W], numbers in and float32 out."""
        return ((x - self.mean) / (self.var + EPSILON).sqrt()).clamp(-LIMIT, LIMIT)


class PolicyExporter(Exporter):
    """The policy as the newest checkpoint has it: of a finished run, after the last update."""

    def state(
        self, folder: Path, config: Config, shared: None, saved: dict[str, Any] | None, part: str
    ) -> dict[str, Any]:
        """Weights, what goes in and out, statistics of observations, what changed the make."""
        if saved is None:
            raise no_checkpoint(folder, "there is a checkpoint after --checkpoint-every-s seconds")
        env = make_env(config, CPU)
        try:
            state: dict[str, Any] = {
                "input_shape": list(env.input_shape),
                "actions": describe(env.single_action_space),
                "normaliser": _statistics(env, config, saved),
            }
        finally:
            env.close()
        intervention: Intervention = config.intervention.build()
        state["intervention"] = saved["intervention"] if intervention.reshapes else None
        return {**state, "weights": saved["policy"]}

    def network(self, config: Config, state: dict[str, Any]) -> nn.Module:
        """The policy; where observations were normalised, behind a module that does so."""
        intervention: Intervention = config.intervention.build()
        given = Spaces(tuple(state["input_shape"]), action_space(state["actions"]))
        policy = make_policy(config, given, CPU, intervention)
        if state["intervention"] is not None:
            optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)  # for what it rebuilds
            intervention.attach(policy, optimizer, torch.Generator())
            intervention.rebuild_from(state["intervention"])
        policy.load_state_dict(state["weights"])
        seen = state["normaliser"]
        if seen is None:
            return policy.eval()
        return nn.Sequential(Normalise(seen["mean"], seen["var"]), policy).eval()

    def weights(self, network: nn.Module) -> dict[str, Any]:
        """The policy's own."""
        own = network[-1] if isinstance(network, nn.Sequential) else network
        return dict(own.state_dict())

    def usage(self, config: Config, shared: None, part: str) -> str:
        """What goes in and comes out."""
        env = make_env(config, CPU)
        try:
            shape, actions = " ".join(map(str, env.input_shape)), env.single_action_space
        finally:
            env.close()
        image = len(env.input_shape) == 3
        kind = "uint8 or float32 in 0 .. 1 [B, C, H, W]" if image else "[B, D]"
        if config.normalize_observations:
            kind = f"values as the environment gives them {'[B, C, H, W]' if image else '[B, D]'}"
        return (
            f"`model(observations)`: {kind}, of shape {shape} each -> (parameters of the "
            f"distribution over actions, values [B]). Actions: {actions}; of `Discrete` the "
            "parameters are logits."
        )


def _statistics(env: TorchVectorEnv, config: Config, saved: dict[str, Any]) -> Any:
    """Those of normalised observations, in the layout of the network's inputs; None without."""
    if not config.normalize_observations:
        return None
    seen = saved["env"]["normaliser"]["observations"]
    return {**seen, **{name: env.unpack(seen[name][None])[0] for name in ("mean", "var")}}


def describe(space: spaces.Space) -> dict[str, Any]:
    """An action space as plain values and tensors.

    Raises:
        UserError: it is of a kind that no policy has.
    """
    match space:
        case spaces.Discrete():
            return {"kind": "Discrete", "n": int(space.n)}
        case spaces.MultiDiscrete():
            return {"kind": "MultiDiscrete", "n": torch.from_numpy(space.nvec.copy())}
        case spaces.MultiBinary():
            return {"kind": "MultiBinary", "n": list(space.shape)}
        case spaces.Box():
            low, high = (torch.from_numpy(np.array(bound)) for bound in (space.low, space.high))
            return {"kind": "Box", "low": low, "high": high}
    raise UserError(f"a policy over the actions {space} cannot be exported")


def action_space(about: dict[str, Any]) -> spaces.Space:
    """What `describe` was given."""
    match about["kind"]:
        case "Discrete":
            return spaces.Discrete(about["n"])
        case "MultiDiscrete":
            return spaces.MultiDiscrete(about["n"].numpy())
        case "MultiBinary":
            return spaces.MultiBinary(about["n"])
    low, high = about["low"].numpy(), about["high"].numpy()
    return spaces.Box(low, high, dtype=low.dtype.type)
