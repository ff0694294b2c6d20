"""Small networks of each kind that the plasticity tests probe."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dynmoe.moe import MoELayer

Case = tuple[nn.Module, Tensor, Tensor]


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


def make_case(kind: str, samples: int = 48) -> Case:
    """(model, inputs, labels) of a plain MLP, a convnet with BatchNorm, or a net with an MoE."""
    labels = torch.randint(0, 5, (samples,))
    if kind == "mlp":
        mlp = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.Tanh())
        return nn.Sequential(*mlp, nn.Linear(12, 5)), torch.randn(samples, 6), labels
    if kind == "convnet":
        trunk = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        model = nn.Sequential(*trunk, nn.Dropout(), nn.Flatten(), nn.Linear(128, 5))
        return model, torch.randn(samples, 2, 6, 6), labels
    moe = MoELayer(16, 12, 20, num_experts=3, max_experts=6)
    moe.created[:3] = torch.tensor([0, 0, 1])
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), moe, nn.Linear(12, 5))
    return model, torch.randn(samples, 6), labels


@pytest.fixture(params=["mlp", "convnet", "moe"])
def case(request: pytest.FixtureRequest) -> Case:
    """Each kind of network in turn."""
    return make_case(request.param)


@pytest.fixture
def moe_case() -> Case:
    """A network with three experts, the third born at growth 1, and room for three more."""
    return make_case("moe")
