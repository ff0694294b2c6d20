"""Batch normalisation of a batch that several processes share, on any device.

torch's SyncBatchNorm is for GPUs alone, and could not be tested without several of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynmoe.moe.passes import batch_sum, one_batch, sum_over_processes


class SharedBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d by the statistics of the whole batch, see `dynmoe.moe.passes.share_batch`.

    In evaluation mode, and where no batch is shared, it is torch's own.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] normalised, of the same shape; there may be no rows, B = 0."""
        if not (self.training and one_batch()):
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count = sum_over_processes(wide.new_tensor(float(x.numel() // x.shape[1])))
        mean = batch_sum(wide.sum(dim=(0, 2, 3))) / count
        centred = wide - mean[:, None, None]
        variance = batch_sum(centred.square().sum(dim=(0, 2, 3))) / count
        self._follow(mean.detach(), variance.detach() * count / (count - 1))
        y = centred * (variance + self.eps).rsqrt()[:, None, None]
        return (y * self.weight[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics [C] by those of a batch, as torch does."""
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)


def share_batch_norms(model: nn.Module) -> None:
    """Put a SharedBatchNorm in place of every BatchNorm2d, with its own parameters and buffers."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if type(module) is nn.BatchNorm2d:
                shared = SharedBatchNorm(module.num_features, module.eps, module.momentum)
                for own in ("_parameters", "_buffers"):
                    getattr(shared, own).update(getattr(module, own))
                setattr(parent, name, shared.train(module.training))
