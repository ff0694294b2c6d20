"""The vision transformers that methods of domain generalisation build on.

A backbone is a timm VisionTransformer or a module of the same shape: `blocks`, each with `attn.qkv`
and `attn.proj` (linear layers) and `mlp`; `embed_dim`; `forward_features(images)` and
`forward_head(tokens, pre_logits=True)`, which gives the feature [B, D] (the class token's, after
the last norm, in CLIP's transformers).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynmoe.errors import UserError

PARTS = ("blocks", "embed_dim", "forward_features", "forward_head")
HEADS = ("head", "head_dist", "fc", "pre_logits", "attn_pool")
"""What timm calls the classifier, and what stands before it in other models of the same tokens."""


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
    """[B, D] features of images [B, C, H, W].

    In training mode the pass is in the backbone's `precision`, if it has been given one (see
    `DGMethod.train_in`). What it returns is not in half precision.
    """
    precision = getattr(backbone, "precision", torch.float32)
    half = backbone.training and precision != torch.float32
    with torch.autocast(images.device.type, precision, enabled=half):
        tokens = backbone.forward_features(images)  # type: ignore[operator]
        return wide(backbone.forward_head(tokens, pre_logits=True))  # type: ignore[operator]


def wide(x: Tensor) -> Tensor:
    """x [...] in float32 where it is in half precision; else as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def beside(
    backbone: nn.Module, block: int, name: str, make: Callable[[nn.Linear], nn.Module]
) -> Any:
    """Replace the linear layer `name` ("qkv", "proj") of a block's attention by `make(it)`.

    Returns the new module.
    """
    attention = backbone.blocks[block].attn  # type: ignore[index,union-attr]
    if getattr(attention, "q_bias", None) is not None:  # BEiT's and EVA's
        attention.qkv_bias_separate = True  # else they read qkv's weight, and do not call it
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
    if weights is not None and not weights.is_file():
        raise UserError(f"weights {weights}: there is no such file")
    if not timm.is_model(name.split(".")[0]):
        raise UserError(f"timm has no model {name!r}; `timm.list_models('vit*')` lists them")
    try:
        backbone = timm.create_model(name, num_classes=0, pretrained=pretrained and not weights)
    except Exception as error:  # timm and its downloads raise what they like
        raise UserError(f"model {name} cannot be loaded: {_line(error)}") from error
    check_backbone(backbone)
    if weights is not None:
        _load_weights(backbone, name, weights)
    return backbone


def _load_weights(backbone: nn.Module, name: str, weights: Path) -> None:
    """Read a file of weights; those of a classifier are left out.

    timm itself passes over weights that a file lacks, or has too many of, and so takes any other
    model's file.
    """
    from timm.models import load_state_dict

    convert = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    try:
        state = load_state_dict(str(weights))
        state = convert(state, backbone) if convert else state
        missing, found = backbone.load_state_dict(state, strict=False)
    except Exception as error:  # torch and safetensors too
        raise UserError(
            f"weights {weights} cannot be loaded into {name}: {_line(error)}"
        ) from error
    if missing:
        raise UserError(
            f"weights {weights} cannot be loaded into {name}: they lack {missing[0]} and "
            f"{len(missing) - 1} more of its tensors; they are another model's"
        )
    extra = [key for key in found if key.split(".")[0] not in HEADS]
    if extra:
        raise UserError(
            f"weights {weights} cannot be loaded into {name}: they hold {extra[0]} and "
            f"{len(extra) - 1} more tensors that it lacks; they are another model's, name it with "
            "--model"
        )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
