"""What a run is made of: its domains, its backbone, and what that backbone expects of images."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from cl_benchmarks.backbone import MEAN, STD, embedded_vit, new_vit
from cl_benchmarks.domain_set import DomainSet, Preparation, check_domains
from cl_benchmarks.stem_tokens import IMAGES, MOST, StemTokens, keep_tokens
from cl_benchmarks.stem_vit import StemViT, load_stem_vit
from dynmoe import seeding
from dynmoe.dg.backbone import make_backbone
from dynmoe.errors import UserError
from dynmoe.experiments.dg.selection import check_selection
from dynmoe.experiments.dg.settings import Config

STEM_VIT = "stem-vit"
"""Name of the model `cl_benchmarks.stem_vit.StemViT`."""


@dataclass(frozen=True)
class Source:
    """What all methods of a comparison share."""

    data: DomainSet
    """domains"""
    backbone: nn.Module
    """never trained itself: methods get copies"""
    prepare: Preparation | StemTokens
    """makes its input"""
    tests: list[int]
    """numbers of the domains that are left out in turn"""

    @property
    def about(self) -> str:
        """What tables must say of the input, after a comma; often nothing."""
        kept = isinstance(self.prepare, StemTokens)
        return ", stem computed once, no augmentation" if kept else ""

    def new_backbone(self) -> Any:
        """A copy to build a method on."""
        return copy.deepcopy(self.backbone)


def load_source(config: Config) -> Source:
    """Read or make the data set and the backbone.

    Raises:
        UserError: data, names or weights that cannot be used.
    """
    data = config.domains.build().load()
    tests = check_domains(data.names, config.test_domains)
    check_selection(config.selection, len(data.names))
    if config.model == "embedded":
        if config.pretrained or config.weights is not None:
            raise UserError(
                "--pretrained and --weights are for timm's models; name one with --model"
            )
        backbone = embedded_vit(config.vit)
        return Source(data, backbone, Preparation(config.vit.size, MEAN, STD), tests)
    if config.model == STEM_VIT:
        return _over_stem(config, data, tests)
    if not config.pretrained and config.weights is None:
        raise UserError(
            f"model {config.model} needs weights: --weights FILE, or --pretrained to let timm get "
            "them; --model embedded needs neither"
        )
    backbone = make_backbone(
        config.model, pretrained=config.pretrained, weights=_expanded(config.weights)
    )
    about: Any = backbone.pretrained_cfg
    size = about["input_size"][-1]
    prepare = Preparation(size, tuple(about["mean"]), tuple(about["std"]))
    return Source(data, backbone.eval(), prepare, tests)


def _over_stem(config: Config, data: DomainSet, tests: list[int]) -> Source:
    """The transformer over a frozen stem, whose tokens are kept where images stay as they are."""
    weights = _expanded(config.weights)
    if weights is None:
        raise UserError(
            f"model {STEM_VIT} needs --weights FILE, a safetensors file of its stem and transformer"
        )
    backbone = load_stem_vit(weights)
    count = sum(len(domain) for domain in data.domains)
    if config.augment or count > MOST:
        return Source(data, backbone, IMAGES, tests)
    return Source(data, backbone, keep_tokens(backbone, data), tests)


def empty_backbone(config: Config, sizes: dict[str, Any]) -> Any:
    """A backbone of the same make whose weights are still to be loaded.

    Args:
        config: names it.
        sizes: of stem-vit, what its file of weights told.

    Raises:
        UserError: timm is not installed, or has no such model.
    """
    if config.model == "embedded":
        return new_vit(config.vit).eval()
    if config.model == STEM_VIT:
        with seeding.seeded(0, "stem-vit"):  # all draws are overwritten
            return StemViT(0, **sizes).eval()
    return make_backbone(config.model).eval()


def _expanded(path: Path | None) -> Path | None:
    return None if path is None else path.expanduser()
