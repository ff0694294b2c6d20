"""Settings of `python -m dynmoe.dg`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from cl_benchmarks.backbone import SmallVit
from dynmoe import registry
from dynmoe.dg.method import DGMethod
from dynmoe.growth.triggers.clock import Trigger
from dynmoe.lab.config import KEEPING, RUNNING, RunConfig, place
from dynmoe.registry import PartConfig, slot

Selection = Literal["training-domain", "held-out-domain", "oracle"]


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Settings of a comparison of methods by leave-one-domain-out."""

    GROUPS: ClassVar[dict[str, tuple[str, ...]]] = {
        "What to run": ("method", "compare", "domains", "test_domains", "seeds", "seed"),
        "Backbone": ("model", "pretrained", "weights", "vit"),
        "Training": (
            "steps", "eval_every", "batch_size", "eval_batch", "lr", "weight_decay", "augment",
            "selection", "precision",
        ),
        "Growth": ("granularity", "trigger", "init"),
        "Figures": ("features", "landscape", "headroom"),
        "Runs": (*KEEPING, "keep_model", *RUNNING),
    }  # fmt: skip

    method: PartConfig = slot("dg", "moe2")
    """the method; its options as --method.OPTION"""
    compare: tuple[str, ...] = place(())
    """methods to train beside it, each with its defaults; `--compare` alone for none"""
    seeds: int = place(3)
    """trials: seeds SEED, SEED+1, ..., each with splits, batches and weights of its own"""
    jobs: int = place(os.cpu_count() or 1)
    """runs at a time, each a process"""
    domains: PartConfig = slot("domains", "embedded")
    """the data set"""
    test_domains: tuple[str, ...] = ()
    """domains to leave out in turn; none named: each of them"""
    model: str = "embedded"
    """embedded: a small vision transformer trained on the spot; stem-vit: one over a frozen
    convolutional stem, which is computed once where nothing is augmented; or one of timm's"""
    pretrained: bool = False
    """take timm's weights for it, from timm's cache or the network"""
    weights: Path | None = None
    """a file of weights for it, which needs no network"""
    vit: SmallVit = field(default_factory=SmallVit)
    """the embedded backbone"""
    steps: int = 5001
    """steps of a training (DomainBed: 5,001; MoA 15,001 on DomainNet)"""
    eval_every: int = 300
    """steps between two evaluations, of which one is selected (DomainBed: 300, DomainNet 1,000)"""
    batch_size: int = 32
    """training images per source domain and step (DomainBed)"""
    eval_batch: int = 128
    """images per evaluation batch"""
    lr: float = 5e-5
    """learning rate of Adam (DomainBed's ERM, and MoA)"""
    weight_decay: float = 0.0
    """of Adam"""
    augment: bool = False
    """augment training images, and these alone, as DomainBed does"""
    selection: Selection = "training-domain"
    """the evaluation that is reported. training-domain: best on the source domains' held-out
    images; held-out-domain: best on source domains that other trainings leave out, too; oracle:
    the last one"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """of the backbone's passes in training"""
    granularity: int = 0
    """outer experts added by each growth; 0: no growth, as in the paper"""
    trigger: PartConfig = slot("trigger", "every")
    """when to grow; a plateau is one of the mean accuracy on held-out images of the sources"""
    init: PartConfig = slot("init", "zero-output")
    """where new outer experts start; zero-output leaves the function as it was"""
    features: int = 40
    """images per domain whose features and routing are kept for the figures; 0: none"""
    landscape: int = 0
    """side of the grids on which the loss around the last weights is drawn: in random directions,
    and in those in which the weights moved most; 0: none"""

    headroom: bool = False
    """measure what a perfect router of a method's experts could reach on the images that the
    accuracy is of, four fifths of the left-out domain; costs a pass per expert"""
    keep_model: bool = place(False)
    """keep the networks of the last steps, for `dynmoe export`"""

    def unused(self) -> dict[str, str]:
        """Setting -> why it has no effect, and what to do."""
        if self.model == "embedded":
            both = "--pretrained and --weights are for timm's models; name one with --model"
            reasons = {"pretrained": both, "weights": both}
        else:
            reasons = {"vit": f"it is for --model embedded (now {self.model})"}
            if self.model == "stem-vit":
                reasons["pretrained"] = "stem-vit takes its weights from --weights FILE; leave it"
        if self.granularity == 0:
            reason = "nothing grows; use --granularity 1 or more"
            reasons |= {"trigger": reason, "init": reason}
        else:
            trigger: Trigger = self.trigger.build()
            if trigger.name == "stage" or trigger.needs - {"score", "loss"}:
                reasons["trigger"] = "dg does not measure what it looks at; use --trigger every"
            elif trigger.planned(self.steps, 1) == 0:
                never = f"it never fires in --steps {self.steps}; change its options, or run longer"
                reasons["trigger"] = never
        reasons["trigger.rows"] = "steps of dg are values as they are, not joined; leave it out"
        parts: list[Any] = [self.method.part, *(registry.get("dg", n) for n in self.compare)]
        if all(part.expert_logits is DGMethod.expert_logits for part in parts):
            reasons["headroom"] = "no method has experts; add --compare domain-experts"
        if self.eval_every > self.steps:
            reasons["eval_every"] = f"the run ends before, at --steps {self.steps}; use fewer"
        return reasons
