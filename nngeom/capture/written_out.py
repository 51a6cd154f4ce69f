"""Operations of torch by their formulas, where torch's own derivatives cannot be differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    if max_norm is not None or mode == "max":
        options = (
            max_norm,
            norm_type,
            scale_grad_by_freq,
            mode,
            sparse,
            per_sample_weights,
            include_last_offset,
            padding_idx,
        )
        return F.embedding_bag(input, weight, offsets, *options)
    if offsets is None:
        offsets = torch.arange(0, input.numel(), input.shape[1], device=input.device)
        input, per_sample_weights = (
            input.flatten(),
            None if per_sample_weights is None else per_sample_weights.flatten(),
        )
    return _bags(
        weight,
        input,
        offsets,
        scale_grad_by_freq,
        int(mode == "mean"),
        sparse,
        per_sample_weights,
        include_last_offset,
        padding_idx,
    )[0]


def _bags(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> tuple[Tensor, ...]:
    if mode == 2:
        return torch.embedding_bag(
            weight,
            indices,
            offsets,
            scale_grad_by_freq,
            mode,
            sparse,
            per_sample_weights,
            include_last_offset,
            padding_idx,
        )
    starts = offsets[:-1] if include_last_offset else offsets
    bag = (
        torch.searchsorted(
            starts.contiguous(), torch.arange(len(indices), device=indices.device).to(starts), right=True
        )
        - 1
    )
    counted = (
        torch.ones_like(indices, dtype=weight.dtype)
        if padding_idx is None
        else (indices != padding_idx % len(weight)).to(weight.dtype)
    )
    share = counted if per_sample_weights is None else counted * per_sample_weights
    out = weight.new_zeros(len(starts), weight.shape[1]).index_add(0, bag, weight[indices] * share.unsqueeze(1))
    if mode == 1:
        out = out / weight.new_zeros(len(starts)).index_add(0, bag, counted).clamp_min(1).unsqueeze(1)
    return (out,) * 4


def _view_as_complex(input: Tensor) -> Tensor:
    return torch.complex(*input.unbind(-1))


def _view_as_real(input: Tensor) -> Tensor:
    return torch.stack((input.real, input.imag), -1)


COMPOSED: dict[Any, Callable[..., Any]] = {
    # the fused one takes the norms it saved for constants when differentiated again (torch 2.13, CPU)
    torch._weight_norm: _weight_norm,
    torch.embedding_bag: _bags,  # no second derivative; those with max_norm or the maximum stay as they are
    F.embedding_bag: _embedding_bag,
    # as views these two fail on gradients that start at an odd place of their memory
    torch.view_as_complex: _view_as_complex,
    torch.view_as_real: _view_as_real,
}


# Of forward mode (see nngeom.capture.fused.ReverseConventions).


def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *cudnn: bool,
) -> Tensor:
    out = _normalised(input, list(range(-len(tuple(normalized_shape)), 0)), eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *cudnn: bool,
) -> Tensor:
    if not use_input_stats:
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    out, channels = _normalised(input, list(range(2, input.ndim)), eps), (-1, *[1] * (input.ndim - 2))
    out = out if weight is None else out * weight.view(channels)
    return out if bias is None else out + bias.view(channels)


def _normalised(x: Tensor, dims: list[int], eps: float) -> Tensor:
    x = x - x.mean(dims, keepdim=True)
    return x * (x.square().mean(dims, keepdim=True) + eps).rsqrt()


def _softmax(input: Tensor, dim: int | None = None, *options: Any, **named: Any) -> Tensor:
    return _log_softmax(input, dim, *options, **named).exp()


def _log_softmax(input: Tensor, dim: int | None = None, *options: Any, **named: Any) -> Tensor:
    dim = (0 if input.ndim in (0, 1, 3) else 1) if dim is None else dim  # as torch.nn.functional reads no dim
    dtype = next((x for x in (*options, named.get("dtype")) if isinstance(x, torch.dtype)), input.dtype)
    x = input.to(dtype)
    x = x - x.detach().amax(dim, keepdim=True)
    return x - x.exp().sum(dim, keepdim=True).log()


def _prelu(input: Tensor, weight: Tensor) -> Tensor:
    """Where the input is zero the slope is that of its negative side, as in reverse mode; torch's forward mode takes
    one.
    """
    slope = weight.view(-1, *[1] * (input.ndim - 2)) if weight.numel() > 1 and input.ndim > 1 else weight
    return torch.where(input > 0, input, slope * input)


WRITTEN_OUT: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.instance_norm: _instance_norm,
    torch.instance_norm: _instance_norm,
    **dict.fromkeys((F.prelu, torch.prelu, Tensor.prelu), _prelu),
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), _softmax),
    **dict.fromkeys((F.log_softmax, torch.log_softmax, Tensor.log_softmax), _log_softmax),
}
