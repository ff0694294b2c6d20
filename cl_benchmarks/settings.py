"""The settings of a continual-learning run, as `python -m dynmoe.cl` takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cl_benchmarks.networks import Trunk
from dynmoe.growth.settings import GrowthSettings
from dynmoe.lab.config import RunConfig, place
from dynmoe.registry import PartConfig, slot


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig, GrowthSettings):
    """Settings of a continual-learning run."""

    method: PartConfig = slot("method", "dynamicmoe")
    intervention: PartConfig = slot("intervention", "none")
    compare: tuple[str, ...] = place(("dense", "fresh"))
    """methods to run as well, or interventions on the dense network, for the figure and the table;
    none if nothing follows the flag"""
    dataset: PartConfig = slot("dataset", "auto")
    protocol: PartConfig = slot("protocol", "class")
    access: Literal["limited", "cumulative"] = "limited"
    """limited: a task's own chunk; cumulative: all chunks so far"""
    chunks: int = 10
    """tasks in the stream"""
    network: Trunk.Config = slot("network", "cnn")
    epochs: int = 20
    """passes over each chunk"""
    batch_size: int = 64
    """images per optimizer step"""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = 1e-3
    """learning rate"""
    weight_decay: float = 0.0
    momentum: float = 0.9
    """of sgd"""
    clip: float = 0.0
    """largest global gradient norm; 0 for none"""
    reset_optimizer: bool = False
    """clear the optimizer's state at each task"""
    augment: Literal["none", "crop-flip"] = "none"
    eval_samples: int = 256
    """test images for each epoch's accuracy; a task's end looks at all"""
    probe_samples: int = 256
    """training images for each epoch's accuracy and plasticity metrics"""

    @property
    def variant(self) -> str:
        """What is compared: the method, the intervention on the dense network, or both."""
        method, intervention = self.method.part.name, self.intervention.part.name
        if intervention == "none":
            return method
        return intervention if method == "dense" else f"{method}+{intervention}"
