"""Kernels whose derivatives can themselves be differentiated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


class _Composite(TorchFunctionMode):
    """Fused operations whose second derivative is wrong, written out.

    The fused weight norm treats the norms it saved as constants when differentiated again (torch 2.13, CPU).
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch._weight_norm:
            v, g, dim = (*args, *(kwargs[name] for name in ("v", "g", "dim")[len(args) :] if name in kwargs), 0)[:3]
            return v * (g / torch.norm_except_dim(v, 2, dim))
        return func(*args, **kwargs)


@contextlib.contextmanager
def twice_differentiable(model: nn.Module | None = None) -> Iterator[None]:
    """Within: attention by its formula, weight norm written out, and no cuDNN for the recurrent cells of ``model``."""
    recurrent = model is not None and any(isinstance(m, nn.RNNBase) for m in model.modules())
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False) if recurrent else contextlib.nullcontext(), _Composite():
        yield
