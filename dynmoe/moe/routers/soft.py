"""Routers by softmax over all experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dynmoe.moe.draws import draw_linear, seeded_linear
from dynmoe.moe.router import Router, RouterInput, RouterSize, Routing, check_option
from dynmoe.registry import PartConfig


class SoftmaxRouter(Router, name="softmax", source="Kim 2025 (arXiv 2511.18987)"):
    """Softmax of a linear map, all experts weighted: the plain form of DynamicMoE (2511.18987)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the softmax router."""

        temperature: float = 1.0
        """divides the logits"""

    def __init__(self, config: Config, *size: *RouterSize) -> None:
        check_option(config, "temperature", config.temperature > 0, "above 0")
        super().__init__(*size)
        self.temperature = config.temperature

    def route(self, inputs: RouterInput) -> Routing:
        """Route x [N, D]: `softmax((x W^T) / temperature)`."""
        return self.dense(F.linear(inputs.x, self.weight) / self.temperature)


class CosineRouter(Router, name="cosine", source="Chi et al. 2022 (arXiv 2204.09179), Section 3"):
    """Softmax of cosine similarities to expert prototypes; bounded logits cannot saturate.

    With logits in +-1/temperature no expert's gate can fall below exp(-2/temperature) of another's,
    so new experts keep receiving gradient.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the cosine router."""

        temperature: float = 0.2
        """divides the similarities; smaller is sharper"""

    def __init__(self, config: Config, *size: *RouterSize) -> None:
        check_option(config, "temperature", config.temperature > 0, "above 0")
        super().__init__(*size)
        self.temperature = config.temperature

    def route(self, inputs: RouterInput) -> Routing:
        """Route x [N, D]: `softmax(cos(x, w_e) / temperature)`."""
        similarity = F.linear(F.normalize(inputs.x, dim=1), F.normalize(self.weight, dim=1))
        return self.dense(similarity / self.temperature)


class LaplaceRouter(
    Router, name="laplace", source="Nguyen et al. 2024 (arXiv 2410.02935), Laplace gating"
):
    """Softmax of `-||x - w_e||_2`, all experts weighted: near experts get the weight.

    The temperature is ours. A logit difference is at most `||w_e - w_f|| / temperature`, however
    far x is.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the Laplace router."""

        temperature: float = 1.0
        """divides the distances; smaller is sharper"""

    def __init__(self, config: Config, *size: *RouterSize) -> None:
        check_option(config, "temperature", config.temperature > 0, "above 0")
        super().__init__(*size)
        self.temperature = config.temperature

    def route(self, inputs: RouterInput) -> Routing:
        """Route x [N, D]: `softmax(-||x - w_e|| / temperature)`."""
        logits = -distances(inputs.x, self.weight) / self.temperature
        return self.dense(logits.to(inputs.x.dtype))


class ScalingRouter(
    Router, name="xlora", source="Buehler and Buehler 2024 (arXiv 2402.07148), X-LoRA"
):
    """Softmax of a small network of x: X-LoRA's scaling head, a hidden layer deep.

    `softmax(w_e . relu(A x + a))`. The head of each layer reads that layer's own input: the paper's
    one head for all layers, which reads the hidden states of a first pass through the model, is
    left out. `dynmoe.moe.xlora.mix_adapters` puts it before frozen adapters.

    Attributes:
        weight: Parameter [M, hidden]. head: submodule, A and a.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the scaling head."""

        hidden: int = 64
        """units of the hidden layer"""
        temperature: float = 1.0
        """divides the logits"""

    def __init__(self, config: Config, *size: *RouterSize) -> None:
        dim, num_experts, most, generator = size
        check_option(config, "hidden", config.hidden >= 1, "at least 1")
        check_option(config, "temperature", config.temperature > 0, "above 0")
        super().__init__(config.hidden, num_experts, most, generator)
        self.temperature = config.temperature
        self.head = seeded_linear(dim, config.hidden, generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Back to the start: rows and head."""
        super().reset_parameters(generator)
        draw_linear(self.head, generator)

    def route(self, inputs: RouterInput) -> Routing:
        """Route x [N, D] to all experts."""
        return self.dense(F.linear(self.head(inputs.x).relu(), self.weight) / self.temperature)


def distances(x: Tensor, rows: Tensor) -> Tensor:
    """[N, M] Euclidean distances of x [N, D] to rows [M, D], at least in float32.

    By differences, not by the expansion into dot products, which cancels where rows are near.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cdist(x.to(wide), rows.to(wide), compute_mode=mode)
