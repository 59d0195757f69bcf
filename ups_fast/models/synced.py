"""Batch-norm over the whole batch of a run of several processes, where each of them has a part of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ups_fast.messages import LINE, whole_sum


class _Synced(nn.modules.batchnorm._BatchNorm):
    """In training by mean and variance of all processes' rows; the messages are two for a layer, forward and back."""

    def forward(self, x: Tensor) -> Tensor:  # [B / R, C, ..]
        if not self.training:
            return super().forward(x)
        y, seen = x.float(), [0, *range(2, x.ndim)]
        shape = [1, -1, *[1] * (x.ndim - 2)]
        n = x.numel() // x.shape[1] * LINE.size
        mean = whole_sum(y.sum(seen)) / n
        y = y - mean.view(shape)
        var = whole_sum(y.square().sum(seen)) / n
        with torch.no_grad():
            assert self.momentum is not None
            if self.running_mean is not None and self.running_var is not None:
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * (n / max(1, n - 1)), self.momentum)
                assert self.num_batches_tracked is not None
                self.num_batches_tracked.add_(1)
        y = y * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)


class Synced1d(_Synced, nn.BatchNorm1d):
    pass


class Synced2d(_Synced, nn.BatchNorm2d):
    pass


class Synced3d(_Synced, nn.BatchNorm3d):
    pass


KINDS = {nn.BatchNorm1d: Synced1d, nn.BatchNorm2d: Synced2d, nn.BatchNorm3d: Synced3d}


def synced(network: nn.Module) -> None:
    """Makes the network's batch-norm, in place, one over all processes. Names and shapes of weights stay.

    Raises ValueError where a layer of normalization is of a kind that cannot be.
    """
    for module in network.modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or isinstance(module, _Synced):
            continue
        if type(module) not in KINDS or module.momentum is None:
            raise ValueError(
                f"train.sync_bn cannot serve the network's {type(module).__name__}: set it false"
            )
        module.__class__ = KINDS[type(module)]
