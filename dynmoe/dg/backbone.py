"""The vision transformers that methods of domain generalisation build on.

A backbone is a timm VisionTransformer or a module of the same shape: `blocks`, each with `attn.qkv`
and `attn.proj` (linear layers) and `mlp`; `embed_dim`; `forward_features(images)` and
`forward_head(tokens, pre_logits=True)`, which gives the feature [B, D] (the class token's, after
the last norm, in CLIP's transformers).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dynmoe.errors import UserError

PARTS = ("blocks", "embed_dim", "forward_features", "forward_head")


def check_backbone(backbone: nn.Module) -> None:
    """Refuse what is not such a vision transformer.

    Raises:
        UserError: a part is missing; the line names it.
    """
    kind = type(backbone).__name__
    missing = [name for name in PARTS if not hasattr(backbone, name)]
    if missing:
        raise UserError(
            f"backbone {kind} has no {missing[0]}; it must be a vision transformer as timm's "
            f"VisionTransformer, with {', '.join(PARTS)}"
        )
    blocks = list(backbone.blocks)  # type: ignore[arg-type]
    if not blocks:
        raise UserError(f"backbone {kind} has no blocks; it must have at least one")
    for number, block in enumerate(blocks):
        for name in ("attn.qkv", "attn.proj"):
            if not isinstance(submodule(block, name), nn.Linear):
                raise UserError(
                    f"backbone {kind}: blocks.{number}.{name} is not a linear layer; adapters go "
                    "beside the fused query-key-value map and the output map of attention"
                )


def submodule(module: nn.Module, name: str) -> Any:
    """What stands at a dotted name, or None."""
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def features(backbone: nn.Module, images: Tensor) -> Tensor:
    """[B, D] features of images [B, C, H, W]."""
    tokens = backbone.forward_features(images)  # type: ignore[operator]
    return backbone.forward_head(tokens, pre_logits=True)  # type: ignore[operator]


def beside(
    backbone: nn.Module, block: int, name: str, make: Callable[[nn.Linear], nn.Module]
) -> Any:
    """Replace the linear layer `name` ("qkv", "proj") of a block's attention by `make(it)`.

    Returns the new module.
    """
    attention = backbone.blocks[block].attn  # type: ignore[index,union-attr]
    module = make(getattr(attention, name))
    setattr(attention, name, module)
    return module


def make_backbone(name: str, *, pretrained: bool = False, weights: Path | None = None) -> nn.Module:
    """A timm vision transformer without its classifier.

    Args:
        name: of timm, such as vit_base_patch16_clip_224.laion2b.
        pretrained: take timm's weights, from its cache or the network.
        weights: a file of weights, in timm's format or one that timm converts; offline.

    Raises:
        UserError: timm is not installed, no such model, no such file, weights of another shape, or
            a model without the expected layers.
    """
    try:
        import timm
    except ImportError:
        raise UserError("backbones by name need the package timm; pip install timm") from None
    options: dict[str, Any] = {"num_classes": 0, "pretrained": pretrained or weights is not None}
    if weights is not None:
        if not weights.is_file():
            raise UserError(f"weights {weights}: there is no such file")
        options["pretrained_cfg_overlay"] = {"file": str(weights)}
    if not timm.is_model(name.split(".")[0]):
        raise UserError(f"timm has no model {name!r}; `timm.list_models('vit*')` lists them")
    try:
        backbone = timm.create_model(name, **options)
    except Exception as error:  # timm, torch and safetensors raise what they like
        source = f"weights {weights}" if weights is not None else f"model {name}"
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{source} cannot be loaded into {name}: {reason}") from error
    check_backbone(backbone)
    return backbone
