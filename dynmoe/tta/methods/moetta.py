"""MoETTA: experts in the LayerNorms, so that mixed shifts need not share one direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.growth import GrowthController, Signals
from dynmoe.growth.controller import classification_shock
from dynmoe.growth.initialisation import RandomInit
from dynmoe.growth.triggers.changes import DriftTrigger
from dynmoe.growth.triggers.clock import EveryTrigger
from dynmoe.interventions.weights import replace_module
from dynmoe.registry import PartConfig
from dynmoe.tta.adapter import Adapter
from dynmoe.tta.entropy import mean_of, softmax_entropy
from dynmoe.tta.norm import MoELayerNorm
from dynmoe.tta.options import sure_margin
from dynmoe.tta.params import channel_last_norms

Setting = Literal["paper", "official"]


class Moetta(Adapter, name="moetta", source="Fan et al. 2025 (arXiv 2511.13760)"):
    """Weighted entropy of reliable samples plus balanced routing, over LayerNorms with experts.

    All LayerNorms but the first `keep` become `MoELayerNorm`; experts and routers are trained.
    `L = mean_S exp(E0 - H) H + alpha_t sum_l E sum_e f_e P_e` (the factor exp(E0 - H) without
    gradient), S = {H <= T_t}, alpha_t = lambda T_t. T_t follows the mean entropy of all samples so
    far, see `next_threshold`. Where S is empty the step balances only.

    Ours: the experts may grow, see `grow_on`.

    Attributes:
        norms: the MoELayerNorms, in module order.
        controller: grows them, or None.
        memory: `threshold` (T), `batches` so far, and their mean entropies: the `first`, and the
            sum of the `later` ones; see `next_threshold`.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of MoETTA."""

        setting: Setting = "paper"
        """how the threshold follows the stream. paper: the mean over all batches so far; official:
        as the authors' code computes it, in which the history's first entry follows the threshold.
        Both agree for two batches"""
        num_experts: int = 9
        """experts per layer (E); paper and code for ViT-B on classical (paper, potpourri: 11)"""
        balance_weight: float = 0.2
        """lambda; paper and code for ViT-B on classical (paper, potpourri: 0.5)"""
        lr: float = 1e-3
        """learning rate of SGD, for batches of 64, of experts and routers; code"""
        momentum: float = 0.9
        """momentum of SGD; code"""
        margin: float | None = None
        """E0 in nats; by default 0.4 ln 1000, code, and for 200 classes or fewer 0.4 ln(classes),
        ours"""
        keep: int = 1
        """LayerNorms that stay as they are, the first ones; code (1 for ViT-B, 15 for ViT-L, 4 for
        ConvNeXt-B)"""
        max_experts: int = 0
        """most experts that a layer can grow to; 0: num_experts"""
        grow: Literal["no", "drift", "every"] = "no"
        """when layers get experts more (ours): drift, when the batches' mean entropy has risen;
        every, each `grow_wait` batches"""
        grow_wait: int = 100
        """batches before the first growth, and between two"""
        granularity: int = 1
        """experts per growth"""
        seed: int = 0
        """of the routers' initial weights, and of those of experts to come"""

    @staticmethod
    def by_classes(classes: int) -> dict[str, float]:
        """The margin."""
        return {"margin": sure_margin(classes)}

    def prepare(self) -> None:
        """Replace the LayerNorms."""
        config = self.config
        if config.num_experts < 1 or 0 < config.max_experts < config.num_experts or config.keep < 0:
            raise UserError(
                f"moetta: num_experts={config.num_experts} must be at least 1, max_experts="
                f"{config.max_experts} no fewer (or 0), keep={config.keep} at least 0"
            )
        if not config.balance_weight >= 0 or config.grow_wait < 1 or config.granularity < 1:
            raise UserError(
                f"moetta: balance_weight={config.balance_weight} must be at least 0, grow_wait="
                f"{config.grow_wait} and granularity={config.granularity} at least 1"
            )
        norms = channel_last_norms(self.model)[config.keep :]
        if not norms:
            raise UserError(
                "moetta puts experts into LayerNorms over the last axis; the model has none beyond "
                f"the first {config.keep}; use another model, another method or a smaller keep"
            )
        generator = torch.Generator().manual_seed(config.seed)
        self.norms: list[MoELayerNorm] = []
        for _, norm in norms:
            most = config.max_experts or config.num_experts
            new = MoELayerNorm(norm, config.num_experts, most, generator)
            replace_module(self.model, norm, new)
            self.norms.append(new.train())  # in which layers compute their losses
        for module in self.model.modules():
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0  # or its fast path reads past the experts
        parameters = [p for norm in self.norms for p in norm.parameters()]
        self.use_sgd(parameters, config.lr, config.momentum)
        self.memory = {"threshold": None, "first": None, "later": None, "batches": 0}
        self.controller: GrowthController | None = None
        wait = config.grow_wait
        if config.grow == "drift":
            self.grow_on(DriftTrigger.Config(cooldown=wait, threshold=1.0, warmup=10))
        elif config.grow == "every":
            self.grow_on(EveryTrigger.Config(steps=wait))

    def grow_on(self, trigger: PartConfig) -> None:
        """Let `trigger` decide after each batch whether all layers get `granularity` experts more.

        It sees the number of batches as its clock and the batch's mean entropy (nats) as `loss`. A
        new expert starts at 0, so its samples see the source's LayerNorm; its row of the router is
        drawn, the others keep theirs. Call it before the stream; growth ends at `max_experts`.
        """
        self.controller = GrowthController(
            self.model,
            self.optimizer,
            granularity=self.config.granularity,
            trigger=trigger,
            init=RandomInit.Config(router="new"),
            measure_shock=unmasked_shock,
            generator=torch.Generator().manual_seed(self.config.seed),
        )
        if hasattr(self, "start"):
            self.mark_start()

    def adapt(self, images: Tensor) -> Tensor:
        """One step, then growth if it is time."""
        logits = self.model(images)
        h = softmax_entropy(logits)
        e0, fixed = self.option("margin", logits), h.detach()
        mean = fixed.mean()
        memory = next_threshold(self.memory, mean, self.config.setting)
        threshold = memory["threshold"]
        loss = mean_of((e0 - fixed).exp() * h, fixed <= threshold)
        if self.config.balance_weight:
            balance = torch.stack([norm.balance for norm in self.norms]).sum()
            loss = loss + self.config.balance_weight * threshold * balance
        if self.learn(loss, logits):
            self.memory = memory
            self._grow(images, mean)
        return logits

    def _grow(self, images: Tensor, mean: Tensor) -> None:
        """Ask the trigger, while there is room."""
        layer, granularity = self.norms[0].layer, self.config.granularity
        if self.controller is None or layer.num_experts + granularity > layer.max_experts:
            return
        signals = Signals(step=self.memory["batches"], loss=float(mean))
        self.controller.step(signals, lambda: (images, None))

    def get_extra_state(self) -> dict[str, Any]:
        """As every adapter's, and the controller's."""
        growth = None if self.controller is None else self.controller.state_dict()
        return super().get_extra_state() | {"growth": growth}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore `get_extra_state()`."""
        super().set_extra_state(state)
        if self.controller is not None:
            self.controller.load_state_dict(state["growth"])


def unmasked_shock(before: Tensor, after: Tensor, labels: Tensor | None) -> dict[str, float]:
    """How a growth changed logits [B, classes], masked ones (-inf) left out."""
    masked = before.isneginf() & after.isneginf()
    return classification_shock(before.masked_fill(masked, 0), after.masked_fill(masked, 0), labels)


def next_threshold(memory: dict[str, Any], mean: Tensor, setting: Setting) -> dict[str, Any]:
    """The memory after a batch whose mean entropy is `mean`, with the threshold T to use for it.

    paper: T_t = mean(m_1..m_t). official: the authors' code keeps T and its history's first entry
    in one tensor, and scales T in place by the ratio of the history's means after and before m_t:
    T_1 = m_1, `T_t = T_{t-1} * [(T_{t-1} + S_t) / t] / [(T_{t-1} + S_{t-1}) / (t - 1)]` with
    S_t = m_2 + ... + m_t. Where that mean was 0 (ours) T starts again at the mean after m_t.
    """
    batches = memory["batches"]
    if batches == 0:
        zero = torch.zeros_like(mean)
        return {"threshold": mean, "first": mean, "later": zero, "batches": 1}
    old, first, before = memory["threshold"], memory["first"], memory["later"]
    later, count = before + mean, batches + 1
    if setting == "paper":
        threshold = (first + later) / count
    else:
        last, now = (old + before) / batches, (old + later) / count
        threshold = torch.where(last > 0, old * now / last, now)
    return {"threshold": threshold, "first": first, "later": later, "batches": count}
