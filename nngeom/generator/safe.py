"""The operations that keep examples apart whatever the numbers, each with where it leaves them.

A rule is asked for the axis that holds the examples in an output and answers for one input: an axis, ``None`` where all
examples share that input, or :data:`ASK`. It may only rest on sizes and constants of the operation. A wrong rule would
be a wrong result that nobody sees: each is compared with derivatives of the operation in ``tests/test_placement.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from nngeom.generator.axes import ExampleAxis
from nngeom.generator.graph import operation


class Unknown:
    """What the graph does not tell: :data:`ASK`."""

    def __repr__(self) -> str:
        return "ASK"


ASK = Unknown()
Sizes = tuple[int, ...]
Place = ExampleAxis | None | Unknown
Rule = Callable[[Any, int, ExampleAxis, Sizes, Sizes, int], Place]
"""``(node, which input, axis in the output, sizes of the output, sizes of the input, n) -> place in the input``."""
RULES: dict[str, Rule] = {}


def _safe(names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations, by the names of their derivatives."""

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), rule))
        return rule

    return register


def _kept(dim: int, axis: ExampleAxis, out: Sizes, sizes: Sizes) -> Place:
    """Axis ``dim`` of the input is the axis of the output, entry by entry."""
    if not 0 <= dim < len(sizes) or sizes[dim] != out[axis.at]:
        return ASK
    return ExampleAxis(dim, axis.outer)


# -- entry by entry ----------------------------------------------------------------------------------------------------


@_safe(
    "Abs Acos Acosh Add Addcdiv Addcmul Alias Angle Asin Asinh Atan Atan2 Atanh Ceil Celu Clamp ClampMax "
    "ClampMin Clone "
    "Complex Conj ConjPhysical Copysign CopyBackwards Cos Cosh Deg2Rad Digamma Div Elu Erf Erfc Erfinv Exp Exp2 Expand "
    "Expm1 FakeQuantizePerTensorAffineCachemask Floor Fmax Fmin Fmod Frac Gelu Hardshrink Hardsigmoid "
    "Hardswish Hardtanh "
    "Hypot I0 Igamma Igammac LeakyRelu Lerp Lgamma Log Log10 Log1P Log2 LogSigmoid Logaddexp Logaddexp2 "
    "Logit MaskedFill "
    "Maximum Minimum Mish Mul NanToNum Neg NegView Polar Polygamma Pow PreluKernel Rad2Deg Reciprocal Relu Remainder "
    "Round Rsqrt Rsub Sgn Sigmoid Sign Silu Sin Sinc Sinh Softplus Softshrink SpecialEntr SpecialErfcx "
    "SpecialI0E SpecialI1 "
    "SpecialI1E SpecialLogNdtr SpecialNdtri SpecialXlog1Py Sqrt Sub Tan Tanh Threshold ToCopy Tril Triu "
    "Trunc Where Xlogy "
    "NativeDropout FusedDropout RreluWithNoise TanhBackward SigmoidBackward GeluBackward "
    "SoftplusBackward EluBackward HardtanhBackward "
    "HardswishBackward LeakyReluBackward ThresholdBackward LogSigmoidBackward"
)
def entrywise(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """Inputs are broadcast: an axis that an input lacks is shared."""
    dim = axis.at - (len(out) - len(sizes))
    if dim < 0 or (sizes[dim] == 1 and out[axis.at] != 1):
        return None
    return _kept(dim, axis, out, sizes)


# -- other views of the same entries -----------------------------------------------------------------------------------


@_safe("View UnsafeView ReshapeAlias Unsqueeze Squeeze")
def _viewed(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """The same order: the examples stay ``n`` equal runs inside ``before`` blocks."""
    before, seen = math.prod(out[: axis.at]) * axis.outer, 1
    if 0 in out or math.prod(out) != math.prod(sizes):
        return ASK
    for dim, size in enumerate(sizes):
        if before % seen == 0 and size % (before // seen * n) == 0:
            return ExampleAxis(dim, before // seen)
        seen *= size
    return ASK


@_safe("Permute")
def _permuted(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    return _kept(_dims(node._saved_dims, len(sizes))[axis.at], axis, out, sizes)


@_safe("T Transpose")
def _transposed(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    a, b = _dims((getattr(node, "_saved_dim0", 0), getattr(node, "_saved_dim1", 1)), len(sizes))
    return _kept({a: b, b: a}.get(axis.at, axis.at), axis, out, sizes)


@_safe("Select Unbind")
def _selected(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """One entry of an axis, or each: the output lacks it."""
    (dim,) = _dims((node._saved_dim,), len(sizes))
    return _kept(axis.at + (axis.at >= dim), axis, out, sizes)


@_safe("Stack")
def _stacked(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    (dim,) = _dims((node._saved_dim,), len(out))
    return ASK if axis.at == dim else _kept(axis.at - (axis.at > dim), axis, out, sizes)


@_safe("ViewAsReal ViewAsComplex")
def _leading(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """A last axis comes or goes."""
    return _kept(axis.at, axis, out, sizes)


@_safe("Repeat")
def _repeated(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    dim = axis.at - (len(out) - len(sizes))
    if dim < 0 or sizes[dim] == 1:
        return None
    return _kept(dim, axis, out, sizes) if node._saved_repeats[axis.at] == 1 else ASK


# -- along some axes, which must not be that of the examples -----------------------------------------------------------


@_safe(
    "Cat Cumprod Cumsum FftC2C FftC2R FftR2C Flip Gather Glu IndexSelect LogSoftmax SafeSoftmax "
    "Logcumsumexp Roll Scatter ScatterAdd "
    "Slice Softmax Sort Split SplitWithSizes Topk UnsafeSplit UnsafeSplitWithSizes SelectScatter "
    "SliceScatter LinalgCross "
    "SoftmaxBackwardData LogSoftmaxBackwardData"
)
def _along(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """The operation acts along the axes that it names; all others it leaves as they are."""
    given = getattr(node, "_saved_dims", None) if hasattr(node, "_saved_dims") else getattr(node, "_saved_dim", None)
    if sizes == out and operation(node) == "Slice":
        return _kept(axis.at, axis, out, sizes)  # all of it
    if given is None or len(sizes) != len(out):
        return ASK
    dims = _dims(given if isinstance(given, (tuple, list)) else (given,), len(out))
    return ASK if axis.at in dims or not dims else _kept(axis.at, axis, out, sizes)


@_safe(
    "ConstantPadNd ReflectionPad1D ReflectionPad2D ReflectionPad3D ReplicationPad1D ReplicationPad2D ReplicationPad3D"
)
def _padded(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    pads: tuple[int, ...] = node._saved_pad if hasattr(node, "_saved_pad") else node._saved_padding
    touched = {len(out) - 1 - j // 2 for j, p in enumerate(pads) if p}
    return ASK if axis.at in touched or not pads else _kept(axis.at, axis, out, sizes)


@_safe("Unfold")
def _unfolded(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """Windows of one axis, laid down on a new last one."""
    (dim,) = _dims((node._saved_dimension,), len(sizes))
    return ASK if axis.at == dim or axis.at >= len(sizes) else _kept(axis.at, axis, out, sizes)


@_safe(
    "Sum Mean Nansum Var Std Logsumexp Amax Amin Max Min Mode Median Nanmedian Kthvalue Prod Norm "
    "LinalgVectorNorm VarMean "
    "StdMean Aminmax"
)
def _reduced(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """Over some axes, which the output lacks or has with size one."""
    given = getattr(node, "_saved_dim", None)
    given = () if given is None else given if isinstance(given, (tuple, list)) else (given,)
    dims = _dims(given, len(sizes)) or set(range(len(sizes)))
    left = [dim for dim in range(len(sizes)) if dim not in dims]
    if len(out) == len(sizes):
        return ASK if axis.at in dims else _kept(axis.at, axis, out, sizes)
    return _kept(left[axis.at], axis, out, sizes) if len(out) == len(left) and axis.at < len(left) else ASK


@_safe("Index")
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
    return _kept(axis.at if axis.at < dim else axis.at - width + 1, axis, out, sizes)


@_safe(
    "NllLoss NllLoss2D BinaryCrossEntropy BinaryCrossEntropyWithLogits MseLoss SmoothL1Loss HuberLoss SoftMarginLoss"
)
def _loss(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """Of every position by itself; classes, where there are, behind the first axis."""
    if node._saved_reduction != 0 or (len(sizes) != len(out) and axis.at):
        return ASK
    return _kept(axis.at, axis, out, sizes)


# -- products ----------------------------------------------------------------------------------------------------------


@_safe("Mm Addmm Bmm Baddbmm")
def _product(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """``[..., p, q] = [..., p, r] @ [..., r, q]``, a third term added first: rows go with the left side, columns with
    the right.
    """
    added = len(node.next_functions) == 3
    if added and number == 0:
        return entrywise(node, number, axis, out, sizes, n)
    left = number == int(added)
    if axis.at < len(out) - 2:
        return _kept(axis.at, axis, out, sizes)
    rows = axis.at == len(out) - 2
    return _kept(axis.at, axis, out, sizes) if rows == left else None


@_safe("Mv")
def _matrix_vector(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    return _kept(0, axis, out, sizes) if number == 0 else None


@_safe("Linear MkldnnLinear")
def _linear(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """The last axis of the input is contracted."""
    if axis.at == len(out) - 1:
        return ASK
    return _kept(axis.at, axis, out, sizes) if number == 0 else None


@_safe("Cdist EuclideanDist")
def _distances(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """``[..., p, r]`` between ``[..., p, q]`` and ``[..., r, q]``."""
    if axis.at < len(out) - 2:
        return _kept(axis.at, axis, out, sizes) if len(sizes) == len(out) else ASK
    mine = (axis.at == len(out) - 2) == (number == 0)
    return _kept(len(sizes) - 2, axis, out, sizes) if mine else None


@_safe(
    "ScaledDotProductFlashAttentionForCpu ScaledDotProductFlashAttention ScaledDotProductEfficientAttention "
    "ScaledDotProductCudnnAttention ScaledDotProductFusedAttentionOverrideable"
)
def _attention(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """Queries, keys, values ``[b, h, t, q]`` and a mask: examples on either of the first two axes."""
    if axis.at > 1 or len(out) != 4:
        return ASK
    return entrywise(node, number, axis, out, sizes, n) if number > 2 else _kept(axis.at, axis, out, sizes)


@_safe(
    "LinalgInvEx LinalgCholeskyEx LinalgSolveEx LinalgSolveTriangular LinalgDet LinalgSlogdet LinalgEigh "
    "LinalgSvd LinalgQr "
    "LinalgMatrixExp CholeskySolve"
)
def _matrices(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """Each of a batch of matrices by itself."""
    return _kept(axis.at, axis, out, sizes) if axis.at < len(sizes) - 2 and len(out) >= len(sizes) - 2 else ASK


# -- layers ------------------------------------------------------------------------------------------------------------


@_safe("Convolution MkldnnConvolution CudnnConvolution SlowConv2D ConvDepthwise2D MpsConvolution")
def _convolution(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """Examples on the first axis, with channels behind them."""
    if axis.at != 0:
        return ASK
    return _kept(0, axis, out, sizes) if number == 0 else None


@_safe(
    "MaxPool2DWithIndices MaxPool3DWithIndices MkldnnMaxPool2D MaxPool2D AvgPool2D AvgPool3D AdaptiveAvgPool2D "
    "AdaptiveAvgPool3D AdaptiveMaxPool2D AdaptiveMaxPool3D UpsampleLinear1D UpsampleBilinear2D UpsampleBicubic2D "
    "UpsampleTrilinear3D UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D UpsampleNearestExact1D "
    "UpsampleNearestExact2D UpsampleNearestExact3D UpsampleBilinear2DAa UpsampleBicubic2DAa"
)
def _spatial(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """Each plane by itself: the first axis is one of examples or of channels."""
    return _kept(0, axis, out, sizes) if axis.at == 0 and len(out) == len(sizes) else ASK


@_safe("PixelShuffle PixelUnshuffle ChannelShuffle Im2Col Col2Im GridSampler2D GridSampler3D")
def _first(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """Examples on the first axis, channels behind them."""
    return _kept(0, axis, out, sizes) if axis.at == 0 and len(sizes) >= 3 and len(out) >= 3 else ASK


@_safe("NativeGroupNorm")
def _group_norm(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """Over groups of channels (axis 1) and all that is behind them."""
    if axis.at:
        return ASK
    return _kept(0, axis, out, sizes) if number == 0 else None


@_safe("NativeLayerNorm FusedRmsNorm")
def _layer_norm(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """Over the last axes."""
    if axis.at >= len(out) - len(node._saved_normalized_shape):
        return ASK
    return _kept(axis.at, axis, out, sizes) if number == 0 else None


@_safe(
    "NativeBatchNorm CudnnBatchNorm MiopenBatchNorm NativeBatchNormLegit NativeBatchNormLegitNoTraining "
    "BatchNormWithUpdate"
)
def _batch_norm(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """Each channel (axis 1) by itself; entry by entry with frozen statistics."""
    if number:
        return _kept(0, axis, out, sizes) if axis.at == 1 and len(sizes) == 1 else None
    frozen = getattr(node, "_saved_training", True) is False
    return _kept(axis.at, axis, out, sizes) if frozen or axis.at == 1 else ASK


def _dims(given: Iterable[int], rank: int) -> list[int]:
    """Axes counted from the front; torch keeps negative ones as unsigned numbers."""
    return [(d - 2**64 if d >= 2**63 else d) % max(rank, 1) for d in given]
