"""Operations along some axes, which must not be that of the examples."""

from __future__ import annotations

from typing import Any

import torch

from nngeom.capture.graph import operation
from nngeom.pullback.axes import ExampleAxis
from nngeom.pullback.safe.rule import ASK, Place, Sizes, from_front, kept, safe


@safe(
    "Cat Cumprod Cumsum FftC2C FftC2R FftR2C Flip Gather Glu IndexSelect LogSoftmax SafeSoftmax Logcumsumexp Roll "
    "Scatter ScatterAdd Slice Softmax Sort Split SplitWithSizes Topk UnsafeSplit UnsafeSplitWithSizes SelectScatter "
    "SliceScatter LinalgCross SoftmaxBackwardData LogSoftmaxBackwardData"
)
def _along(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """The operation acts along the axes that it names; all others it leaves as they are."""
    given = getattr(node, "_saved_dims", None) if hasattr(node, "_saved_dims") else getattr(node, "_saved_dim", None)
    if sizes == out and operation(node) == "Slice":
        return kept(axis.at, axis, out, sizes)  # all of it
    if given is None or len(sizes) != len(out):
        return ASK
    dims = from_front(given if isinstance(given, (tuple, list)) else (given,), len(out))
    return ASK if axis.at in dims or not dims else kept(axis.at, axis, out, sizes)


@safe(
    "ConstantPadNd ReflectionPad1D ReflectionPad2D ReflectionPad3D ReplicationPad1D ReplicationPad2D ReplicationPad3D"
)
def _padded(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    pads: tuple[int, ...] = node._saved_pad if hasattr(node, "_saved_pad") else node._saved_padding
    touched = {len(out) - 1 - j // 2 for j, p in enumerate(pads) if p}
    return ASK if axis.at in touched or not pads else kept(axis.at, axis, out, sizes)


@safe("Unfold")
def _unfolded(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """Windows of one axis, laid down on a new last one."""
    (dim,) = from_front((node._saved_dimension,), len(sizes))
    return ASK if axis.at == dim or axis.at >= len(sizes) else kept(axis.at, axis, out, sizes)


@safe(
    "Sum Mean Nansum Var Std Logsumexp Amax Amin Max Min Mode Median Nanmedian Kthvalue Prod Norm LinalgVectorNorm "
    "VarMean StdMean Aminmax"
)
def _reduced(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """Over some axes, which the output lacks or has with size one."""
    given = getattr(node, "_saved_dim", None)
    given = () if given is None else given if isinstance(given, (tuple, list)) else (given,)
    dims = from_front(given, len(sizes)) or set(range(len(sizes)))
    left = [dim for dim in range(len(sizes)) if dim not in dims]
    if len(out) == len(sizes):
        return ASK if axis.at in dims else kept(axis.at, axis, out, sizes)
    return kept(left[axis.at], axis, out, sizes) if len(out) == len(left) and axis.at < len(left) else ASK


@safe("Index")
def _indexed(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """One axis indexed by a tensor, whatever it holds; the others are left as they are."""
    try:
        indices = list(node._saved_indices)
    except RuntimeError:  # saved by a checkpoint, which would compute them again
        return ASK
    at = [dim for dim, index in enumerate(indices) if index is not None]
    if number or len(at) != 1 or indices[at[0]].dtype not in (torch.int64, torch.int32):
        return ASK  # a mask may stand for several axes
    (dim,), width = at, indices[at[0]].ndim
    if dim <= axis.at < dim + width:
        return ASK
    return kept(axis.at if axis.at < dim else axis.at - width + 1, axis, out, sizes)


@safe("NllLoss NllLoss2D BinaryCrossEntropy BinaryCrossEntropyWithLogits MseLoss SmoothL1Loss HuberLoss SoftMarginLoss")
def _loss(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """Of every position by itself; classes, where there are, behind the first axis."""
    if node._saved_reduction != 0 or (len(sizes) != len(out) and axis.at):
        return ASK
    return kept(axis.at, axis, out, sizes)
