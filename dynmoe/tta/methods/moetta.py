"""MoETTA: experts in the LayerNorms, so that mixed shifts need not share one direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
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
from dynmoe.tta.clusters import Clusters
from dynmoe.tta.entropy import (
    margin,
    mean_of,
    mean_prediction_entropy,
    softmax_entropy,
    wide,
)
from dynmoe.tta.norm import MoELayerNorm
from dynmoe.tta.options import for_stream, sure_margin
from dynmoe.tta.params import UnfitModelError, channel_last_norms

Setting = Literal["paper", "official"]
DECAY = 0.99
"""What a sample counts in its expert's mean prediction, as a share of what the next one does."""


class Moetta(Adapter, name="moetta", source="Fan et al. 2025 (arXiv 2511.13760)"):
    """Weighted entropy of reliable samples plus balanced routing, over LayerNorms with experts.

    All LayerNorms but the first `keep` become `MoELayerNorm`; experts and routers are trained.
    `L = mean_S exp(E0 - H) H + alpha_t sum_l E sum_e f_e P_e` (the factor exp(E0 - H) without
    gradient), S = {H <= T_t}, alpha_t = lambda T_t. T_t follows the mean entropy of all samples so
    far, see `next_threshold`. Where S is empty the step balances only.

    Ours: the experts may grow, see `grow_on`; `-im H(mean_b p_b)` may be added to L; the experts
    may be clusters of images (`router`), each with a mean prediction of its own (`im_per`). The
    paper's ablations and the code's switches are options: `threshold`, `reweight`, `route_per`,
    `top_k`, `frozen`.

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
        num_experts: int | None = None
        """experts per layer (E); by default 9, paper and code for ViT-B on classical, and in the
        command on the stream potpourri 11, paper"""
        balance_weight: float | None = None
        """lambda; by default 0.2, paper and code for ViT-B on classical, and in the command on the
        stream potpourri 0.5, paper"""
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
        frozen: tuple[int, ...] = ()
        """LayerNorms that stay as they are, by number in module order from 0, in place of the first
        `keep`; code's `disabled_layer`"""
        top_k: int = 1
        """experts per image and layer, with gates p_e / stopgrad(sum of the largest p); code, where
        it is 1"""
        route_per: Literal["sample", "batch"] = "sample"
        """batch: all images of a batch get the expert of the largest mean probability; paper,
        ablation"""
        router: Literal["learned", "clusters"] = "learned"
        """what chooses experts. learned: a router in each layer; clusters (ours): one choice for
        all layers, the nearest of E centres that follow the stream (k-means on the input of the
        first layer with experts)"""
        threshold: Literal["dynamic", "fixed"] = "dynamic"
        """T. dynamic: follows the stream, see `setting`; fixed: 0.4 ln(classes), as EATA's margin
        (ours)"""
        reweight: bool = True
        """weigh samples by exp(E0 - H); without it L is the mean of H over S; paper, ablation"""
        im: float = 0.0
        """weight of -H(mean p), the entropy of the batch's mean prediction over all its samples
        (ours, see tent)"""
        im_per: Literal["batch", "expert"] = "batch"
        """what has a mean prediction of its own in that term; expert (ours, with router=clusters):
        each expert's samples, over the last hundred or so of the stream"""
        max_experts: int = 0
        """most experts that a layer can grow to; 0: num_experts"""
        grow: Literal["no", "drift", "every"] = "no"
        """when layers get experts more (ours), which needs `max_experts`: drift, when the batches'
        mean entropy has risen; every, each `grow_wait` batches"""
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

    @staticmethod
    def by_stream(stream: str, config: Any) -> dict[str, Any]:
        """Experts and lambda: the paper's for the stream `potpourri`, else those for classical.

        Clusters have no router that could learn to balance: lambda is 0.
        """
        experts, balance = (11, 0.5) if stream == "potpourri" else (9, 0.2)
        balance = 0.0 if config.router == "clusters" else balance
        return {"num_experts": experts, "balance_weight": balance}

    def prepare(self) -> None:
        """Replace the LayerNorms."""
        config: Any = for_stream(self.config, "")
        self.config = config
        check_options(config)
        norms = self._chosen()
        generator = torch.Generator().manual_seed(config.seed)
        self.norms: list[MoELayerNorm] = []
        clusters = None
        if config.router == "clusters":
            (dim,) = norms[0][1].normalized_shape
            clusters = Clusters(config.num_experts, dim, config.seed).to(norms[0][1].weight.device)
        for _, norm in norms:
            most = config.max_experts or config.num_experts
            new = MoELayerNorm(norm, config.num_experts, most, generator, config.top_k,
                               config.route_per, clusters)  # fmt: skip
            replace_module(self.model, norm, new)
            self.norms.append(new.train())  # in which layers compute their losses
        for module in self.model.modules():
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0  # or its fast path reads past the experts
        parameters = [p for norm in self.norms for p in norm.parameters()]
        self.use_sgd(parameters, config.lr, config.momentum)
        self.memory = {"threshold": None, "first": None, "later": None, "batches": 0}
        if config.im_per == "expert":
            self.memory["predictions"] = None  # [E, classes] mean predictions, once there are some
        self.controller: GrowthController | None = None
        wait = config.grow_wait
        if config.grow == "drift":
            self.grow_on(DriftTrigger.Config(cooldown=wait, threshold=1.0, warmup=10))
        elif config.grow == "every":
            self.grow_on(EveryTrigger.Config(steps=wait))

    def _chosen(self) -> list[tuple[str, nn.LayerNorm]]:
        """The LayerNorms that get experts.

        Raises:
            UserError: there are none, or no such LayerNorm as one of `frozen`.
        """
        found, config = channel_last_norms(self.model), self.config
        for number in config.frozen:
            if not 0 <= number < len(found):
                raise UserError(
                    f"moetta: frozen={list(config.frozen)} names LayerNorm {number}, and the "
                    f"model's are 0 to {len(found) - 1}"
                )
        frozen = config.frozen or range(config.keep)
        norms = [norm for number, norm in enumerate(found) if number not in frozen]
        if not norms:
            which = "those in frozen" if config.frozen else f"the first {config.keep}"
            raise UnfitModelError(
                "moetta puts experts into LayerNorms over the last axis; the model has none beyond "
                f"{which}; use another model, another method or keep fewer"
            )
        return norms

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
        logits, config = self.model(images), self.config
        h = softmax_entropy(logits)
        fixed = h.detach()
        mean = fixed.mean()
        memory = next_threshold(self.memory, mean, config.setting)
        dynamic = config.threshold == "dynamic"
        threshold = memory["threshold"] if dynamic else mean.new_tensor(margin(None, 0.4, logits))
        weighted = (self.option("margin", logits) - fixed).exp() * h if config.reweight else h
        loss = mean_of(weighted, fixed <= threshold)
        if config.im_per == "expert":
            spread, predictions = self._spread(logits)
            loss, memory = loss - config.im * spread, memory | {"predictions": predictions}
        elif config.im:
            loss = loss - config.im * mean_prediction_entropy(logits)
        if config.balance_weight:
            balance = torch.stack([norm.balance for norm in self.norms]).sum()
            loss = loss + config.balance_weight * threshold * balance
        if self.learn(loss, logits):
            self.memory = memory
            self._grow(images, mean)
        return logits

    def _spread(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Entropy of each expert's mean prediction, and the new mean predictions [E, classes].

        q_e is the running mean of expert e's predictions p_b: a sample counts DECAY times as much
        as the next. The scalar `-sum_b p_b log q_e(b) / B` has the gradient of the experts'
        H(q_e), weighed by their samples, as if those of the batch were all there are. A batch holds
        few samples of an expert, too few to say how its answers are spread.
        """
        p = wide(logits).softmax(dim=1)
        clusters = self.norms[0].clusters
        assert clusters is not None
        own = F.one_hot(clusters.chosen, self.config.num_experts).to(p.dtype)  # [B, E]
        count = own.sum(dim=0)[:, None]
        old = self.memory["predictions"]
        if old is None:
            old = torch.full_like(own.T @ p.detach(), 1 / p.shape[1])
        kept = DECAY**count
        means = kept * old + (1 - kept) * (own.T @ p.detach()) / count.clamp(min=1)
        log_q = means.clamp_min(torch.finfo(means.dtype).tiny).log()
        return -(p * log_q[clusters.chosen]).sum() / len(p), means

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


def check_options(config: Any) -> None:
    """Refuse options of MoETTA that cannot work, or that would have no effect.

    Raises:
        UserError: one is out of range.
    """
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
    if not 0 <= config.im < float("inf") or not 1 <= config.top_k <= config.num_experts:
        raise UserError(
            f"moetta: im={config.im} must be at least 0, and top_k={config.top_k} from 1 to "
            f"num_experts={config.num_experts}"
        )
    if config.im_per == "expert" and not (config.router == "clusters" and config.im > 0):
        raise UserError(
            f"moetta: im_per=expert needs router=clusters and im above 0 (now router="
            f"{config.router}, im={config.im})"
        )
    if config.router == "clusters":
        idle = {"balance_weight": config.balance_weight != 0, "top_k": config.top_k != 1,
                "route_per": config.route_per != "sample",
                "max_experts": config.max_experts not in (0, config.num_experts),
                "grow": config.grow != "no"}  # fmt: skip
        for option in (name for name, given in idle.items() if given):
            raise UserError(
                f"moetta: {option}={getattr(config, option)} has no effect with router=clusters, "
                "which neither learns by gradient nor grows; leave it out"
            )
    most = config.max_experts or config.num_experts
    if config.grow != "no" and config.num_experts + config.granularity > most:
        raise UserError(
            f"moetta: grow={config.grow} adds granularity={config.granularity} to num_experts="
            f"{config.num_experts}, and layers hold {most}; use max_experts="
            f"{config.num_experts + config.granularity} or more"
        )
    if config.frozen and config.keep != 1:
        raise UserError(
            f"moetta: keep={config.keep} has no effect beside frozen={list(config.frozen)}; give "
            "one of them"
        )
    if config.threshold == "fixed" and config.setting != "paper":
        raise UserError(
            "moetta: setting=official says how a dynamic threshold follows the stream, and "
            "threshold=fixed has none; give one of them"
        )


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
