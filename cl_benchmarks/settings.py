"""The settings of a continual-learning run, as `python -m dynmoe.cl` takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cl_benchmarks.losses import LossOver
from cl_benchmarks.trunks import Trunk
from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.growth.settings import GROWTH, LAYER, GrowthSettings
from dynmoe.lab.config import KEEPING, RUNNING, RunConfig, place
from dynmoe.registry import PartConfig, slot

MORE = "More of training, and measurements"
"""Title of a group of options, in `--help` without their texts."""


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig, GrowthSettings):
    """Settings of a continual-learning run."""

    GROUPS: ClassVar[dict[str, tuple[str, ...]]] = {
        "What to run": (
            "method", "intervention", "compare", "dataset", "protocol", "network", "seed", "seeds",
        ),
        "Stream and training": (
            "chunks", "access", "epochs", "batch_size", "lr", "optimizer", "loss_over", "augment",
        ),
        MORE: (
            "weight_decay", "momentum", "clip", "reset_optimizer", "precision", "channels_last",
            "eval_samples", "probe_samples", "old_samples", "measure_every", "expert_probes",
        ),
        "MoE layers": LAYER,
        "Growth": GROWTH,
        "Runs": (*KEEPING, *RUNNING),
    }  # fmt: skip
    BRIEF: ClassVar[tuple[str, ...]] = (MORE,)

    method: PartConfig = slot("method", "dynamicmoe")
    intervention: PartConfig = slot("intervention", "none")
    compare: tuple[str, ...] = place(("dense", "fresh"))
    """methods, or interventions on dense, to run as well"""
    dataset: PartConfig = slot("dataset", "auto")
    protocol: PartConfig = slot("protocol", "class")
    access: Literal["limited", "cumulative"] = "limited"
    """limited: a task's own chunk; cumulative: all so far"""
    chunks: int = 10
    """tasks in the stream"""
    network: Trunk.Config = slot("network", "cnn")
    epochs: int = 20
    """passes over each chunk"""
    batch_size: int = 64
    """images per optimizer step"""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """the algorithm of the optimizer steps"""
    lr: float = 1e-3
    """learning rate"""
    weight_decay: float = 0.0
    """of the optimizer"""
    momentum: float = 0.9
    """of sgd"""
    clip: float = 0.0
    """largest global gradient norm; 0 for none"""
    loss_over: LossOver = "all"
    """classes in the loss; present: the task's, and replayed ones"""
    reset_optimizer: bool = False
    """clear the optimizer's state at each task"""
    augment: Literal["none", "crop-flip"] = "none"
    """random crops and mirror images of the training images"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """of training passes; weights and losses stay float32"""
    channels_last: bool = False
    """channels innermost in memory: faster for large convolutions"""
    eval_samples: int = 256
    """test images for each epoch's accuracy; all at a task's end"""
    probe_samples: int = 256
    """training images for each epoch's accuracy and metrics"""
    old_samples: int = 256
    """test images of each old task, for forgetting; 0 for all"""

    measure_every: int = 1
    """N: metrics and maps in every Nth task only; accuracies in all"""
    expert_probes: bool = False
    """linear probes of experts on the next task; costs a pass over its images"""

    @property
    def variant(self) -> str:
        """What is compared: the method, the intervention on the dense network, or both."""
        method, intervention = self.method.part.name, self.intervention.part.name
        if intervention == "none":
            return method
        return intervention if method == "dense" else f"{method}+{intervention}"

    def unused(self) -> dict[str, str]:
        """Setting -> why it has no effect, and what to do."""
        dense, known = registry.get("method", "dense"), registry.names("method")
        others = [registry.get("method", n) if n in known else dense for n in self.compare]
        methods = [self.method.build(), *(part.Config().build() for part in others)]
        names = " ".join(dict.fromkeys(method.name for method in methods))
        reasons = self.unused_growth(f"--method {names}", {o for m in methods for o in m.reads()})
        if self.optimizer == "sgd":
            reasons["moments"] = "--optimizer sgd has no second moments; use adam"
        else:
            reasons["momentum"] = f"only --optimizer sgd uses it (now {self.optimizer})"
        if not self.network.neck:
            reasons["network.width"] = "without --network.neck blocks are as wide as the features"
        if self.network.part.name == "mlp":
            reasons["channels_last"] = "--network mlp has no convolutions"
        if self.network.place not in ("trunk", "everywhere"):
            reasons["network.trunk_hidden"] = "only --network.place trunk or everywhere uses it"
        if getattr(self.protocol, "updates", 2) == 1:
            one = "--protocol.updates is 1; give it another value"
            reasons |= {"protocol.rows": one, "protocol.window": one}
        if self.trigger.part.name == "stage":
            reasons.setdefault("trigger", "streams have no stages; use --trigger task, for example")
        if reason := self._no_probes([set(method.reads()) for method in methods]):
            reasons["expert_probes"] = reason
        if reason := self.protocol.build().no_old_tasks():
            reasons["old_samples"] = f"{reason}; use --protocol domains, or class with head full"
        reasons |= {f"intervention.{o}": r for o, r in self.intervention.build().unused().items()}
        if all(method.name == "fresh" for method in methods):
            reasons["reset_optimizer"] = "--method fresh clears the optimizer at each task anyway"
        return reasons

    def _no_probes(self, reads: list[set[str]]) -> str | None:
        """Why `expert_probes` would tell nothing of methods that read these settings, if so."""
        reads = [own for own in reads if "bank" in own]
        if not reads:
            return "these methods have no experts; add dynamicmoe"
        forgets = self.pruning.part.name == "reinit" and self.init.part.name != "duplicate"
        if forgets and self.budget.mode == "constant" and all("pruning" in own for own in reads):
            return (
                "--pruning reinit re-initialises the old experts at every growth, so that none is "
                "older than another; use --pruning utility, or --budget.mode per-growth"
            )
        return None


def check_without_tasks(config: Config) -> None:
    """Refuse what needs task starts, for streams in time order, which tell of none.

    Raises:
        UserError: names the setting and what works.
    """
    name, method = f"protocol {config.protocol.part.name}", config.method.build()
    if config.epochs != 1:
        raise UserError(f"{name} shows every row once; use --epochs 1 (now {config.epochs})")
    if config.augment != "none":
        raise UserError(f"{name}: its rows are not images; use --augment none")
    if config.reset_optimizer:
        raise UserError(f"--reset-optimizer acts at task starts, and {name} has none")
    if config.loss_over != "all":
        raise UserError(f"{name}: the classes of a window are not known; use --loss-over all")
    reasons = [method.without_tasks(), config.intervention.build().without_tasks()]
    if "trigger" in method.reads():
        reasons.append(config.trigger.build().without_tasks())
    for reason in filter(None, reasons):
        raise UserError(f"{name}: {reason}")
