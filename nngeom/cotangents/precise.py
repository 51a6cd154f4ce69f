"""A user's function of the outputs, run so that its derivatives do not cancel where a model is confident.

The second derivatives of torch's own ``log_softmax``, ``logsumexp``, ``logsigmoid``, ... are differences of nearly
equal numbers there, and some first ones are. Within :class:`Precise` these calls, wherever in the function they come,
are those of :mod:`nngeom.cotangents.softmax` and :mod:`nngeom.cotangents.logistic`: the same values, derivatives right
to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from nngeom.cotangents import logistic, softmax
from nngeom.cotangents.softmax import Labels

Call = Callable[..., Any]


class Precise(TorchFunctionMode):
    """Runs :data:`WRITTEN` instead of torch's operations, where they know the arguments."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = WRITTEN.get(func)
        out = None if written is None else written(*args, **kwargs)
        return func(*args, **kwargs) if out is None else out


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """``torch.nn.functional.cross_entropy`` for constant targets."""
    if not _plain(size_average, reduce, reduction, input) or _differentiable(target, weight):
        return None
    rows = input.unsqueeze(0) if input.ndim == 1 else input.movedim(1, -1)
    c = rows.shape[-1]
    soft = target.is_floating_point()
    if soft and target.shape != input.shape:
        return None
    y = target.movedim(1, -1).reshape(-1, c) if soft and target.ndim > 1 else target.reshape(-1, *[c] * soft)
    positions = torch.Size(rows.shape[:-1])
    if len(y) != positions.numel():
        return None
    labels = Labels(y, weight, label_smoothing, ignore_index)
    each = softmax.cross_entropy(rows.reshape(-1, c), labels)
    if reduction != "mean":
        return _reduced(each.view(positions if input.ndim > 1 else ()), reduction)
    counted = Labels(y, weight, 0.0, ignore_index).totals(rows.reshape(-1, c)) if not soft else None
    return each.sum() / (len(y) if counted is None else counted.sum())


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor | None:
    """``torch.nn.functional.binary_cross_entropy_with_logits``."""
    if not _plain(size_average, reduce, reduction, input) or target.shape != input.shape:
        return None
    each = logistic.binary_cross_entropy(input, target, 1.0 if pos_weight is None else pos_weight)
    return _reduced(each if weight is None else weight * each, reduction)


def soft_margin_loss(
    input: Tensor, target: Tensor, size_average: Any = None, reduce: Any = None, reduction: str = "mean"
) -> Tensor | None:
    """``torch.nn.functional.soft_margin_loss``."""
    return (
        _reduced(logistic.softplus(-target * input), reduction)
        if _plain(size_average, reduce, reduction, input)
        else None
    )


def log_softmax(input: Tensor, dim: int | None = None, *options: Any, **named: Any) -> Tensor | None:
    """``log_softmax`` as a function of torch, of ``torch.nn.functional``, or as a method."""
    if not isinstance(dim, int) or not _real(input):
        return None
    dtype = next((x for x in (*options, named.get("dtype")) if isinstance(x, torch.dtype)), input.dtype)
    return softmax.log_softmax(input.to(dtype), dim)


def softmaxed(input: Tensor, dim: int | None = None, *options: Any, **named: Any) -> Tensor | None:
    """``softmax``, likewise."""
    out = log_softmax(input, dim, *options, **named)
    return None if out is None else out.exp()


def logsumexp(input: Tensor, dim: Any, keepdim: bool = False, **named: Any) -> Tensor | None:
    """``logsumexp`` along one axis."""
    axes = (dim,) if isinstance(dim, int) else tuple(dim)
    return (
        softmax.log_sum_exp(input, axes[0], keepdim=keepdim) if len(axes) == 1 and _real(input) and not named else None
    )


def softplus(input: Tensor, beta: float = 1, threshold: float = 20) -> Tensor | None:
    """``softplus`` without its threshold, beyond which torch takes it for linear."""
    return logistic.softplus(beta * input) / beta if _real(input) else None


def logsigmoid(input: Tensor) -> Tensor | None:
    """``logsigmoid``."""
    return -logistic.softplus(-input) if _real(input) else None


def sigmoid(input: Tensor, **named: Any) -> Tensor | None:
    """``sigmoid``, but for calls with ``out=``."""
    return logistic.sigmoid(input) if _real(input) and not named else None


def logaddexp(input: Tensor, other: Tensor, **named: Any) -> Tensor | None:
    """``logaddexp``, likewise."""
    return logistic.log_add_exp(input, other) if _real(input) and _real(other) and not named else None


WRITTEN: dict[Any, Call] = {
    F.cross_entropy: cross_entropy,
    F.binary_cross_entropy_with_logits: binary_cross_entropy_with_logits,
    F.soft_margin_loss: soft_margin_loss,
    **dict.fromkeys((F.log_softmax, torch.log_softmax, Tensor.log_softmax, torch.special.log_softmax), log_softmax),
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax), softmaxed),
    **dict.fromkeys((torch.logsumexp, Tensor.logsumexp, torch.special.logsumexp), logsumexp),
    F.softplus: softplus,
    F.logsigmoid: logsigmoid,
    **dict.fromkeys((F.sigmoid, torch.sigmoid, Tensor.sigmoid, torch.special.expit), sigmoid),
    **dict.fromkeys((torch.logaddexp, Tensor.logaddexp), logaddexp),
}


def _real(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.numel() > 0


def _plain(size_average: Any, reduce: Any, reduction: str, input: Tensor) -> bool:
    return size_average is None and reduce is None and reduction in ("none", "sum", "mean") and _real(input)


def _differentiable(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _reduced(each: Tensor, reduction: str) -> Tensor:
    return each if reduction == "none" else each.sum() if reduction == "sum" else each.mean()
