"""BECoTTA: tiny experts beside every block, one per image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.interventions.weights import replace_module
from dynmoe.moe.draws import Noise
from dynmoe.registry import PartConfig
from dynmoe.tta.adapter import Adapter
from dynmoe.tta.entropy import mean_of, softmax_entropy
from dynmoe.tta.options import sure_margin
from dynmoe.tta.params import NORMS, UnfitModelError, plain_modules


class BlockExperts(nn.Module):
    """A frozen block and E adapters D -> 1 -> D of its output, of which each image uses one.

    `y = block(x); y + up_e gelu(down_e y + a_e) + b_e`, e the argmax over experts of the sum over
    tokens of `y W + noise softplus(y V)`. With one expert per image its gate is 1, so that W and V
    get no gradient and stay as drawn.

    Args:
        block: maps its first argument to [B, ..., D], or to [B, D, H, W] (`channel_axis` 1).
        dim: D. experts: E. std: of the initial weights; biases start at 0.
    """

    def __init__(
        self, block: nn.Module, dim: int, experts: int, std: float, generator: torch.Generator
    ) -> None:
        super().__init__()

        def weights(*shape: int) -> nn.Parameter:
            return nn.Parameter(std * torch.randn(*shape, generator=generator))

        self.block = block
        self.down, self.up = weights(experts, dim), weights(experts, dim)
        self.down_bias = nn.Parameter(torch.zeros(experts))
        self.up_bias = nn.Parameter(torch.zeros(experts, dim))
        self.gate, self.gate_noise = weights(experts, dim), weights(experts, dim)
        self.noise = Noise(generator)

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """What the block gives, and the chosen adapter's word on it.

        Tokens [B, T, D], or maps [B, D, H, W] or [B, H, W, D]; the shape is the block's own.
        """
        y = self.block(*args, **kwargs)
        channels_first = y.dim() == 4 and y.shape[-1] != self.down.shape[1]
        x = y.movedim(1, -1) if channels_first else y
        tokens = x.reshape(len(x), -1, x.shape[-1])
        change = self._change(tokens, self._choose(tokens.detach())).view(x.shape)
        return y + (change.movedim(-1, 1) if channels_first else change)

    @torch.no_grad()
    def _choose(self, tokens: Tensor) -> Tensor:
        """[B] the expert of each image, from tokens [B, T, D]."""
        scale = F.softplus(F.linear(tokens, self.gate_noise))
        noisy = F.linear(tokens, self.gate) + self.noise.normal(scale) * scale
        return noisy.sum(dim=1).argmax(dim=1)

    def _change(self, tokens: Tensor, expert: Tensor) -> Tensor:
        """[B, T, D] from tokens [B, T, D] and their expert [B]."""
        hidden = torch.bmm(tokens, self.down[expert].unsqueeze(2))
        hidden = F.gelu(hidden + self.down_bias[expert].view(-1, 1, 1))
        return torch.baddbmm(
            self.up_bias[expert].unsqueeze(1), hidden, self.up[expert].unsqueeze(1)
        )


class Becotta(
    Adapter,
    name="becotta",
    source="Lee et al. 2024 (arXiv 2402.08712), as in MoETTA's code; blocks as in timm's models",
):
    """Entropy of sure samples, minimised by tiny adapters beside each block; the rest is frozen.

    `L = mean of H over {H < E0}`. The adapters are random at the start (`std`), so the model begins
    slightly changed, as in MoETTA's code. What is ours: the gates are drawn as the adapters are,
    biases start at 0, and a batch without sure samples takes a step with a gradient of 0.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of BECoTTA."""

        lr: float = 1e-5
        """learning rate of Adam; MoETTA's code"""
        num_experts: int = 6
        """adapters beside each block; MoETTA's code"""
        margin: float | None = None
        """E0 in nats; by default 0.4 ln 1000, MoETTA's code, and for 200 classes or fewer
        0.4 ln(classes), ours"""
        std: float = 0.02
        """standard deviation of the adapters' initial weights; MoETTA's code"""
        seed: int = 0
        """of the initial weights and the gates' noise"""

    @staticmethod
    def by_classes(classes: int) -> dict[str, float]:
        """The margin."""
        return {"margin": sure_margin(classes)}

    def prepare(self) -> None:
        """Wrap the blocks.

        Raises:
            UserError: an option is out of range.
            UnfitModelError: the model has no blocks with a normalisation layer.
        """
        config = self.config
        if config.num_experts < 1 or not config.lr > 0 or not config.std >= 0:
            raise UserError(
                f"becotta: num_experts={config.num_experts} must be at least 1, lr={config.lr} "
                f"above 0 and std={config.std} at least 0"
            )
        generator = torch.Generator().manual_seed(config.seed)
        trained: list[nn.Parameter] = []
        for block in find_blocks(self.model):
            like = next(block.parameters())
            wrapped = BlockExperts(block, _width(block), config.num_experts, config.std, generator)
            replace_module(self.model, block, wrapped.to(like))
            wrapped.gate.requires_grad_(False)
            wrapped.gate_noise.requires_grad_(False)
            trained += [p for p in wrapped.parameters(recurse=False) if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=config.lr)

    def adapt(self, images: Tensor) -> Tensor:
        """One step down the entropy of the sure samples."""
        logits = self.model(images)
        h = softmax_entropy(logits)
        self.learn(mean_of(h, h.detach() < self.option("margin", logits)), logits)
        return logits


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The children of all modules called `blocks`, as timm's ViT and ConvNeXt have them.

    Raises:
        UserError: there are none.
    """
    found = [
        block
        for name, module in plain_modules(model)
        if name.split(".")[-1] == "blocks" and isinstance(module, nn.Sequential | nn.ModuleList)
        for block in module
    ]
    if not found:
        raise UnfitModelError(
            "becotta puts experts beside the blocks of a model with `blocks`, such as timm's ViT "
            "and ConvNeXt; this model has none"
        )
    return found


def _width(block: nn.Module) -> int:
    """Channels of a block's output: those of its first normalisation layer."""
    for module in block.modules():
        if isinstance(module, NORMS) and module.weight is not None:
            return len(module.weight)
    raise UnfitModelError("becotta: a block without a normalisation layer does not show its width")
