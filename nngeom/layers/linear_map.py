"""Modules as the matrices that they are: linear maps, and convolutions on inputs of one shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nngeom.core.errors import StructureError

CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}


@dataclass(frozen=True)
class LinearMap:
    """A linear map or a convolution as a matrix, on inputs of one shape; its bias is apart.

    ``name``: of the ``module``. ``shape``: of the input of one example.
    """

    name: str
    module: Any
    shape: tuple[int, ...] = ()

    @staticmethod
    def of(name: str, module: nn.Module) -> LinearMap:
        """That of this ``name`` and ``module``; raises :class:`StructureError` where it pads with other than zeros."""
        mode = getattr(module, "padding_mode", "zeros")
        if mode != "zeros":
            raise StructureError(f"{name} pads with {mode!r}; expected 'zeros'")
        return LinearMap(name, module)

    @property
    def is_dense(self) -> bool:
        """Whether the weight is the matrix."""
        return isinstance(self.module, nn.Linear)

    @property
    def weight(self) -> Tensor:
        """The weight, without a graph."""
        return self.module.weight.detach()

    @property
    def bias(self) -> Tensor | None:
        """The bias, without a graph, where there is one."""
        return None if self.module.bias is None else self.module.bias.detach()

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The outputs for inputs ``x (n, *shape)`` with this ``weight`` and ``bias``."""
        m = self.module
        if self.is_dense:
            return F.linear(x, weight, bias)
        convolve = next(f for kind, f in CONVOLUTIONS.items() if isinstance(m, kind))
        return convolve(x, weight, bias, stride=m.stride, padding=m.padding, dilation=m.dilation, groups=m.groups)

    def row_norms(self, weight: Tensor) -> Tensor:
        """``(outputs,)``: 2-norms of the rows of the matrix with this ``weight``: at borders some are cut off."""
        ones = torch.ones(1, *self.shape, dtype=weight.dtype, device=weight.device)
        return self(ones, weight.square()).flatten().sqrt()

    def require_input(self, x: Tensor) -> None:
        """Raise :class:`StructureError` where inputs ``x`` hold more than one vector, or image, an example."""
        expected = self.module.weight.ndim
        if x.ndim != expected:
            raise StructureError(
                f"{self.name} is given {tuple(x.shape)}; expected {expected} axes, examples first: a map that is "
                "applied position by position is no layer of a chain (flatten its inputs)"
            )


def is_linear_map(module: nn.Module) -> bool:
    """Whether :class:`LinearMap` knows a module of this class."""
    return isinstance(module, (nn.Linear, *CONVOLUTIONS))
