"""Stacks of linear maps, one a group: ``bmm`` and products with a parameter of three axes, as experts use them."""

from __future__ import annotations

import torch
from torch import Tensor

from nngeom.core.layout import Arrangement
from nngeom.layers.adapter import Call, NotStructured, Use, adapts
from nngeom.layers.use import Slot


def slot(call: Call, w: Tensor) -> Slot | None:
    """Of ``w [s, i, o]``: a parameter of these axes, or the transpose of one of ``[s, o, i]``."""
    s, i, o = w.shape
    turned = w.mT
    if call.is_parameter(turned) and turned.is_contiguous() and not w.is_contiguous():
        return call.whole(turned, Arrangement.plain(s, o, i))
    return call.whole(w, Arrangement((s, i, o), (0, 2, 1), (s, o, i)))


def _on_the_right(call: Call, x: Tensor, w: Tensor) -> Use:
    """``x [s, m, i] @ w [s, i, o]``: one matrix a group, at ``m`` places."""
    if x.ndim != 3 or w.ndim != 3 or x.shape[0] != w.shape[0] or call.is_parameter(x):
        raise NotStructured
    weight, kept = slot(call, w), call.keep(x)
    return Use(
        "bmm",
        weight,
        None,
        (x.shape[1],),
        gradients=lambda g: g.transpose(1, 2),
        inputs=lambda: kept.transpose(0, 1),
    )


def _on_the_left(call: Call, w: Tensor, x: Tensor) -> Use:
    """``w [s, o, i] @ x [s, i, m]``: the transpose of the same."""
    if x.ndim != 3 or w.ndim != 3 or x.shape[0] != w.shape[0] or call.is_parameter(x):
        raise NotStructured
    weight, kept = slot(call, w.mT), call.keep(x)
    return Use(
        "bmm",
        weight,
        None,
        (x.shape[2],),
        gradients=lambda g: g.permute(0, 3, 1, 2),
        inputs=lambda: kept.permute(2, 0, 1),
        channels=1,
    )


@adapts(torch.bmm, torch.Tensor.bmm)
def bmm(call: Call, input: Tensor, mat2: Tensor) -> Use:
    """``input @ mat2``, group by group, with a parameter on one side."""
    return _on_the_left(call, input, mat2) if call.is_parameter(input) else _on_the_right(call, input, mat2)


@adapts(torch.baddbmm, torch.Tensor.baddbmm)
def baddbmm(call: Call, input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Use:
    """``input + batch1 @ batch2`` with a parameter ``batch2``, and a bias ``input [s, 1, o]`` that may be one too."""
    if beta != 1 or alpha != 1:
        raise NotStructured
    use = _on_the_right(call, batch1, batch2)
    if not call.is_parameter(input):
        return use
    s, _, o = call.out.shape
    if tuple(input.shape) != (s, 1, o):
        raise NotStructured
    bias = call.whole(input, Arrangement.plain(s, o, 1))
    return Use("bmm", use.weight, bias, use.lead, gradients=use.gradients, inputs=use.inputs)
