"""A small vision transformer over a frozen convolutional stem, for real photographs on few cores.

The stem is the first five stages of timm's tf_efficientnet_lite0 (Tan and Le 2019, arXiv
1905.11946; stride 16, 112 channels) on images of 128 px, always in evaluation mode and never
trained, so that its output can be computed once and kept. On it stand timm's pre-norm blocks
(Dosovitskiy et al. 2021, arXiv 2010.11929; the hybrid of their Section 3.1). It has the parts of
timm's VisionTransformer (`blocks`, `embed_dim`, `forward_features`, `forward_head`).

Shapes: B images, N = 64 places of the stem's output, F = 112 its channels, D the width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_benchmarks.weights import load_weights, read_weights
from dynmoe import seeding
from dynmoe.errors import UserError

STEM = "tf_efficientnet_lite0"
STAGES = 5
CHANNELS = 112
"""F, channels of the stem's output"""
SIZE = 128
"""side in pixels of the stem's input; images of other sizes are resized"""
TOKENS = 64
"""N, places of the stem's output"""


class StemViT(nn.Module):
    """Images [B, 3, H, W] in 0 .. 1, or the stem's tokens [B, N, F] -> logits [B, classes].

    Args:
        classes: of the linear head on the class token; 0 for none, the output is then [B, D].
        width: D.
        depth: blocks.
        heads: of the attention.
        mlp_ratio: width of the blocks' MLPs over D.
        pretrained: take timm's ImageNet weights for the stem, from its cache or the network.

    Attributes:
        stem: frozen; normalised images [B, 3, 128, 128] -> [B, F, 8, 8].
        embed: linear map F -> D.
        blocks: timm's blocks.
        class_names: the outputs' names, if known.
    """

    class_names: tuple[str, ...] | None = None
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        classes: int,
        width: int = 192,
        depth: int = 6,
        heads: int = 6,
        mlp_ratio: float = 3.0,
        *,
        pretrained: bool = False,
    ) -> None:
        with seeding.kept():  # timm's import draws nothing today; it must not matter
            import timm
            from timm.layers import trunc_normal_
            from timm.models.vision_transformer import Block

        super().__init__()
        net: Any = timm.create_model(STEM, pretrained=pretrained)
        stages = list(net.blocks.children())[:STAGES]
        self.stem = nn.Sequential(net.conv_stem, net.bn1, *stages).requires_grad_(False).eval()
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5))
        self.register_buffer("std", torch.full((1, 3, 1, 1), 0.5))
        self.embed_dim = self.num_features = width
        self.embed = nn.Linear(CHANNELS, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + TOKENS, width))
        trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.Sequential(
            *(Block(width, heads, mlp_ratio=mlp_ratio, qkv_bias=True) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes) if classes else nn.Identity()

    def train(self, mode: bool = True) -> StemViT:
        """As of any module, but the stem stays in evaluation mode."""
        super().train(mode)
        self.stem.eval()
        return self

    def features(self, images: Tensor) -> Tensor:
        """The stem's tokens [B, N, F] of images [B, 3, H, W] in 0 .. 1."""
        if images.shape[-2:] != (SIZE, SIZE):
            images = F.interpolate(images, (SIZE, SIZE), mode="bilinear", align_corners=False)
        return self.stem((images - self.mean) / self.std).flatten(2).transpose(1, 2)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, 1 + N, D], after the last norm, of images [B, 3, H, W] or tokens [B, N, F]."""
        tokens = self.embed(self.features(x) if x.dim() == 4 else x)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], dim=1)
        return self.norm(self.blocks(tokens + self.pos_embed))

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits [B, classes] of tokens [B, 1 + N, D]; the class token [B, D] for `pre_logits`."""
        return tokens[:, 0] if pre_logits else self.head(tokens[:, 0])

    def transformer(self, tokens: Tensor) -> Tensor:
        """Logits [B, classes] of the stem's tokens [B, N, F]."""
        return self.forward_head(self.forward_features(tokens))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, 3, H, W] or tokens [B, N, F]."""
        return self.forward_head(self.forward_features(x))


def sizes_of(model: StemViT) -> dict[str, Any]:
    """The arguments that a `StemViT` was made with, the classes apart."""
    block: Any = model.blocks[0]
    width = model.embed_dim
    return {
        "width": width,
        "depth": len(model.blocks),
        "heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / width,
    }


def load_stem_vit(file: Path, classes: int = 0, heads: int = 6) -> StemViT:
    """The model of a file of weights (16 or 32 bits), as float32 and in evaluation mode.

    Width, depth and the MLPs' width are those of the file.

    Args:
        file: names of tensors as `StemViT` has them.
        classes: of the head, as many as the file's; 0 leaves the head out.
        heads: attention heads, which no tensor tells.

    Raises:
        UserError: no such file, another model's weights, or another number of classes.
    """
    state = read_weights(file)
    try:
        width, own = state["embed.weight"].shape[0], state["head.weight"].shape[0]
        hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise UserError(f"weights {file} are not a stem-vit's: they lack {error.args[0]}") from None
    if classes and classes != own:
        raise UserError(
            f"weights {file} have a head of {own} classes, and {classes} are asked for; use data "
            f"of {own} classes, or weights that were trained on yours"
        )
    if heads < 1 or width % heads:
        raise UserError(f"heads={heads} must divide the width {width} of the weights {file}")
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    with seeding.seeded(0, "stem-vit"):  # all draws are overwritten
        model = StemViT(classes, width, depth, heads, hidden / width)
    if not classes:
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
    load_weights(model, state, file)
    return model.eval()
