"""Convolutions, pooling and normalisations."""

from __future__ import annotations

from typing import Any

from nngeom.pullback.axes import ExampleAxis
from nngeom.pullback.safe.rule import ASK, Place, Sizes, kept, safe


@safe("Convolution MkldnnConvolution CudnnConvolution SlowConv2D ConvDepthwise2D MpsConvolution")
def _convolution(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """Examples on the first axis, with channels behind them."""
    if axis.at != 0:
        return ASK
    return kept(0, axis, out, sizes) if number == 0 else None


@safe(
    "MaxPool2DWithIndices MaxPool3DWithIndices MkldnnMaxPool2D MaxPool2D AvgPool2D AvgPool3D AdaptiveAvgPool2D "
    "AdaptiveAvgPool3D AdaptiveMaxPool2D AdaptiveMaxPool3D UpsampleLinear1D UpsampleBilinear2D UpsampleBicubic2D "
    "UpsampleTrilinear3D UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D UpsampleNearestExact1D "
    "UpsampleNearestExact2D UpsampleNearestExact3D UpsampleBilinear2DAa UpsampleBicubic2DAa"
)
def _spatial(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """Each plane by itself: the first axis is one of examples or of channels."""
    return kept(0, axis, out, sizes) if axis.at == 0 and len(out) == len(sizes) else ASK


@safe("PixelShuffle PixelUnshuffle ChannelShuffle Im2Col Col2Im GridSampler2D GridSampler3D")
def _first(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """Examples on the first axis, channels behind them."""
    return kept(0, axis, out, sizes) if axis.at == 0 and len(sizes) >= 3 and len(out) >= 3 else ASK


@safe("NativeGroupNorm")
def _group_norm(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """Over groups of channels (axis 1) and all that is behind them."""
    if axis.at:
        return ASK
    return kept(0, axis, out, sizes) if number == 0 else None


@safe("NativeLayerNorm FusedRmsNorm")
def _layer_norm(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """Over the last axes."""
    if axis.at >= len(out) - len(node._saved_normalized_shape):
        return ASK
    return kept(axis.at, axis, out, sizes) if number == 0 else None


@safe(
    "NativeBatchNorm CudnnBatchNorm MiopenBatchNorm NativeBatchNormLegit NativeBatchNormLegitNoTraining "
    "BatchNormWithUpdate"
)
def _batch_norm(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """Each channel (axis 1) by itself; entry by entry with frozen statistics."""
    if number:
        return kept(0, axis, out, sizes) if axis.at == 1 and len(sizes) == 1 else None
    frozen = getattr(node, "_saved_training", True) is False
    return kept(axis.at, axis, out, sizes) if frozen or axis.at == 1 else ASK
