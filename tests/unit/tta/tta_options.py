"""Methods of test-time adaptation as the tests run over them all."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from tta_models import vit

from dynmoe import registry
from dynmoe.tta import Adapter, adapt

METHODS = [name for name in registry.names("tta") if name != "mgtta"]
LEARNERS = [name for name in METHODS if name != "noadapt"]
EAGER = {
    "eata": {"margin": 9.0, "redundancy": 2.0, "fisher_weight": 0.0},
    "sar": {"margin": 9.0},
    "deyo": {"filter": 9.0, "plpd": -1.0},
    "cotta": {"confidence": 0.99, "views": 2},
    "becotta": {"lr": 1e-3, "margin": 9.0},
    "moetta": {"max_experts": 12, "grow": "every", "grow_wait": 3},
}
"""Options with which every batch is learnt from, and every random number and growth is used."""
each_method = pytest.mark.parametrize("method", METHODS)
each_learner = pytest.mark.parametrize("method", LEARNERS)


def make(method: str, model: nn.Module | None = None, **options: object) -> Adapter:
    return adapt(vit() if model is None else model, method, **EAGER.get(method, {}) | options)


def same(first: object, second: object) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0)
