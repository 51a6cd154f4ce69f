"""Models whose parameters are distributed tensors while they run (tensor parallelism): the processes of a mesh run
every pass together, and must run it on the same numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nngeom.capture.batch import Batch, tensors
from nngeom.core.errors import CoverageError, RankMismatchError
from nngeom.core.whole import between, whole
from nngeom.ranks.fingerprint import bits, digest_of

AGREE = 1e-5  # relative, of numbers that all processes compute alike


def require_same_batch(batch: Batch, parameter: Tensor) -> None:
    """Raise :class:`RankMismatchError` on all processes of the mesh of a ``parameter`` unless all were given this
    ``batch``.
    """
    held = [x.values() if x.is_nested else x for x in tensors(batch)]
    digest = int(digest_of([*map(str, (x.shape for x in held)), *bits(held)]), 16) % 2**53
    least, most = between(torch.tensor([digest], dtype=torch.float64, device=parameter.device), parameter)
    if not torch.equal(least, most):
        raise RankMismatchError(
            "the processes over which the model is split (tensor parallelism) were given different batches; expected "
            "the same: examples are split over the ranks of process_group=, as mesh['dp'], only"
        )


def in_step(outputs: Tensor, parameter: Tensor) -> Tensor:
    """The outputs, whole; what is pulled back from them must be the same on all processes of the mesh of a
    ``parameter``.
    """
    result: Tensor = _InStep.apply(whole(outputs), parameter.detach())
    return result


class _InStep(torch.autograd.Function):
    """The identity, whose backward pass compares."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, parameter: Tensor) -> Tensor:
        ctx.parameter = parameter
        return outputs.view_as(outputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        require_same(g, ctx.parameter, "what is pulled back")
        return g, None


def require_same(x: Tensor, parameter: Tensor, what: str) -> None:
    """Raise :class:`CoverageError`, which names ``what``, on all processes of the mesh of a ``parameter`` unless ``x``
    is the same on them, to rounding.
    """
    x = x.detach().flatten().double()
    weights = torch.arange(1, x.numel() + 1, dtype=x.dtype, device=x.device).cos()
    least, most = between(torch.stack([x.sum(), x @ weights, x.abs().sum()]), parameter)
    if bool((most - least > AGREE * most[2].abs()).any()):
        raise CoverageError(
            f"{what} differs between the processes over which the model is split (tensor parallelism); expected the "
            "same: the same batches, the same seeds (generator=), and no parameter that is no distributed tensor where "
            "activations are in parts"
        )
