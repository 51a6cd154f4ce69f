"""Normalisations with affine parameters: the normalised input scaled and shifted, feature by feature.

As many groups as features and one output each (``s`` features, ``o = 1``), so that their blocks are small and exact.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from nngeom.core.errors import ModeError
from nngeom.core.layout import Arrangement
from nngeom.layers.adapter import Call, Use, adapts


def _use(
    call: Call,
    name: str,
    weight,
    bias,
    lead,
    *,
    normalised: Callable[[], Tensor],
    features_last: Callable[[Tensor, int], Tensor],
) -> Use:
    """``features_last(x, b)`` moves ``[*b, *out]`` to ``[*b, *lead, s]``."""
    size = next(p.numel() for p in (weight, bias) if p is not None)
    plain = Arrangement.plain(size, 1, 1)
    w = call.whole(weight, plain)
    return Use(
        name,
        w,
        call.whole(bias, plain),
        lead,
        gradients=lambda g: features_last(g, 1).unsqueeze(-1),
        inputs=None if w is None else lambda: features_last(normalised(), 0).unsqueeze(-1),
        elementwise=True,
    )


def _last(d: int) -> Callable[[Tensor, int], Tensor]:
    return lambda x, b: x.flatten(x.ndim - d)


def _channels(x: Tensor, b: int) -> Tensor:
    return x.movedim(b + 1, -1)


def _channel_lead(out: Tensor) -> tuple[int, ...]:
    return (out.shape[0], *out.shape[2:])


@adapts(F.layer_norm, torch.layer_norm)
def layer_norm(
    call: Call, input: Tensor, normalized_shape, weight=None, bias=None, eps: float = 1e-5, cudnn_enable=True
) -> Use:
    """Over the last axes."""
    x, d = call.keep(input), len(normalized_shape)
    normalised = lambda: F.layer_norm(x, normalized_shape, eps=eps)
    return _use(
        call, "layer_norm", weight, bias, tuple(input.shape[:-d]), normalised=normalised, features_last=_last(d)
    )


@adapts(F.rms_norm, torch.rms_norm)
def rms_norm(call: Call, input: Tensor, normalized_shape, weight=None, eps: float | None = None) -> Use:
    """Over the last axes, without centring."""
    x, d = call.keep(input), len(normalized_shape)
    normalised = lambda: F.rms_norm(x, normalized_shape, eps=eps)
    return _use(call, "rms_norm", weight, None, tuple(input.shape[:-d]), normalised=normalised, features_last=_last(d))


@adapts(F.group_norm, torch.group_norm)
def group_norm(
    call: Call, input: Tensor, num_groups: int, weight=None, bias=None, eps: float = 1e-5, cudnn_enabled=True
) -> Use:
    """Over groups of channels and all positions of one example."""
    x = call.keep(input)
    normalised = lambda: F.group_norm(x, num_groups, eps=eps)
    return _use(
        call, "group_norm", weight, bias, _channel_lead(call.out), normalised=normalised, features_last=_channels
    )


@adapts(F.batch_norm)
def batch_norm(
    call: Call, input: Tensor, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
) -> Use:
    """With frozen statistics: in training mode it mixes examples and is refused before it gets here."""
    if training:
        raise ModeError("batch normalisation in training mode mixes the examples of a batch; call model.eval()")
    x = call.keep(input)
    normalised = lambda: F.batch_norm(x, running_mean, running_var, eps=eps)
    return _use(
        call, "batch_norm", weight, bias, _channel_lead(call.out), normalised=normalised, features_last=_channels
    )


@adapts(F.instance_norm)
def instance_norm(
    call: Call,
    input: Tensor,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    use_input_stats=True,
    momentum=0.1,
    eps=1e-5,
) -> Use:
    """Over the positions of one channel of one example."""
    x = call.keep(input)
    normalised = lambda: F.instance_norm(
        x, running_mean, running_var, use_input_stats=use_input_stats, momentum=0.0, eps=eps
    )
    return _use(
        call, "instance_norm", weight, bias, _channel_lead(call.out), normalised=normalised, features_last=_channels
    )
