"""The softmax and its derivatives without cancellation, for rows of logits ``[r, c]``.

Where a model is confident, ``1 - p`` of its class and ``p_l x_l - p_l <p, x>`` are differences of nearly equal
numbers: in float32 nothing is left of them at margins of 18, in float64 at 37. Both are written as sums of small
numbers instead: ``1 - p_l`` is the sum of the others, and ``(diag p - p p^T) x`` does not change when the entry of
the arg-max is taken from all of ``x``. Rows are worked on some at a time, in float64, so that nothing but inputs and
results is as large as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NUMBERS = 2**18  # logits worked on at once: a few temporaries of 2 MiB, whatever the number of classes and positions


def wide(x: Tensor) -> Tensor:
    """In float64, or float32 on a device that has no other."""
    return x.float() if x.device.type == "mps" else x.double()


def probabilities(x: Tensor) -> Tensor:
    """The softmax of :func:`wide` logits ``x [*b, c]``."""
    return x.softmax(-1, torch.float32 if x.device.type == "mps" else torch.float64)


def in_rows(logits: Tensor, f: Callable[[slice], Tensor]) -> Tensor:
    """``f`` of all rows, some at a time."""
    rows, size = len(logits), max(1, NUMBERS // max(1, logits.shape[-1]))
    first = f(slice(0, min(rows, size)))
    if rows <= size:
        return first
    parts = [slice(lo, min(rows, lo + size)) for lo in range(size, rows, size)]
    if first.requires_grad or torch._C._functorch.is_batchedtensor(first):
        return torch.cat([first, *map(f, parts)])
    out = first.new_empty(rows, *first.shape[1:])  # filled, so that the results are held once
    out[:size] = first
    for part in parts:
        out[part] = f(part)
    return out


@dataclass(frozen=True)
class Labels:
    """What a softmax is compared with: rows ``s [r, c]``, such that the loss of a row is ``-sum_l s_l log p_l``.

    ``y``: classes ``[r]``, or probabilities ``[r, c]``. As in ``torch.nn.functional.cross_entropy``, a class ``y`` with
    ``weight [c]`` and ``smoothing`` has ``s = (1 - smoothing) w_y e_y + smoothing w / c``, one that is ``ignore_index``
    zero; probabilities are mixed with the uniform ones and then multiplied by the weights.
    """

    y: Tensor
    weight: Tensor | None = None
    smoothing: float = 0.0
    ignore_index: int = -100

    def rows(self, part: slice, like: Tensor) -> Tensor:
        """``s`` of some rows, in the shape ``[r, c]`` and dtype of ``like``."""
        y, c = self.y[part], like.shape[-1]
        weight = None if self.weight is None else self.weight.to(like)
        if y.is_floating_point():
            s = (1 - self.smoothing) * y.to(like) + self.smoothing / c
            return s if weight is None else s * weight
        counted = y != self.ignore_index
        y = y.where(counted, torch.zeros_like(y)).unsqueeze(-1)
        own = like.new_full((), 1 - self.smoothing) if weight is None else (1 - self.smoothing) * weight[y]
        s = torch.zeros_like(like).scatter(-1, y, own.expand(y.shape))
        if self.smoothing:
            s = s + self.smoothing / c * (1 if weight is None else weight)
        return s * counted.unsqueeze(-1)

    def totals(self, like: Tensor) -> Tensor | None:
        """``sum_l s_l`` of every row, ``[r]``; ``None`` where it is one."""
        if self.y.is_floating_point():
            return in_rows(like, lambda part: self.rows(part, wide(like[part])).sum(-1).to(like.dtype))
        counted = self.y != self.ignore_index
        if self.weight is None:
            mapped = torch._C._functorch.is_batchedtensor(counted)  # of which nothing can be asked
            return None if not mapped and bool(counted.all()) else counted.to(like.dtype)
        weight = self.weight.to(like)
        own = weight[self.y.where(counted, torch.zeros_like(self.y))]
        return ((1 - self.smoothing) * own + self.smoothing * weight.mean()) * counted


def log_softmax(z: Tensor, dim: int = -1) -> Tensor:
    """``log p`` whose first and second derivatives by autograd do not cancel: the arg-max is a constant that is
    subtracted first."""
    top = z.detach().argmax(dim, keepdim=True)
    u = (z - z.gather(dim, top)).scatter(dim, top, 0)
    return u - log_rest(u, top, dim)


def log_sum_exp(z: Tensor, dim: int = -1, *, keepdim: bool = False) -> Tensor:
    """``log sum exp z``, as :func:`log_softmax`."""
    top = z.detach().argmax(dim, keepdim=True)
    most = z.gather(dim, top)
    out = most + log_rest((z - most).scatter(dim, top, 0), top, dim)
    return out if keepdim else out.squeeze(dim)


def log_rest(u: Tensor, top: Tensor, dim: int) -> Tensor:
    """``log(1 + sum exp u)`` over all but the arg-max."""
    return u.exp().scatter(dim, top, 0).sum(dim, keepdim=True).log1p()


def others(x: Tensor) -> Tensor:
    """The sum of all other entries of the row, for every entry of ``x [r, c]``, not negative."""
    top = x.argmax(-1, keepdim=True)
    rest = x.scatter(-1, top, 0).sum(-1, keepdim=True)
    return (rest + x.gather(-1, top) - x).scatter(-1, top, rest)


def times(logits: Tensor, x: Tensor, scale: Tensor | None = None) -> Tensor:
    """``scale (diag p - p p^T) x``: with ``x' = x - x[top]``, ``v = p x' - p sum(p x')``, whose sum is zero to
    rounding.

    ``x [r, c]``, ``scale [r]``, the result in the dtype of the logits; differentiable in all.
    """

    def some(part: slice) -> Tensor:
        z = wide(logits[part])
        p, top = z.softmax(-1), z.detach().argmax(-1, keepdim=True)
        tangent = wide(x[part])
        a = p * (tangent - tangent.gather(-1, top))
        v = torch.addcmul(a, p, a.sum(-1, keepdim=True), value=-1)
        return (v if scale is None else v * scale[part].unsqueeze(-1)).to(logits.dtype)

    return in_rows(logits, some)


def root_times(logits: Tensor, r: Tensor, scale: Tensor | None = None) -> Tensor:
    """``scale (diag(sqrt p) - p sqrt(p)^T) r = a - p sum(a)`` with ``a = sqrt(p) r - p r[top] / sqrt(p[top])``, zero
    at the top."""

    def some(part: slice) -> Tensor:
        log_p = log_softmax(wide(logits[part]))
        p, root, noise = log_p.exp(), (0.5 * log_p).exp(), r[part].to(log_p)
        top = log_p.argmax(-1, keepdim=True)
        a = (root * noise - p * (noise.gather(-1, top) / root.gather(-1, top))).scatter(-1, top, 0)
        v = a - p * a.sum(-1, keepdim=True)
        return (v if scale is None else v * scale[part].unsqueeze(-1)).to(logits.dtype)

    return in_rows(logits, some)


def residual(logits: Tensor, labels: Labels) -> Tensor:
    """The gradient of the loss, ``p sum(s) - s = p_l (sum of the other s) - s_l (sum of the other p)``, ``[r, c]``."""

    single, totals = not (labels.y.is_floating_point() or labels.smoothing), labels.totals(logits)

    def some(part: slice) -> Tensor:
        z = wide(logits[part])
        p = z.softmax(-1)
        if not single:
            s = labels.rows(part, z)
            return (p * others(s) - s * others(p)).to(logits.dtype)
        y = labels.y[part].unsqueeze(-1)  # of one class: p, but for that class minus the sum of the others
        y = y.masked_fill(y == labels.ignore_index, 0)
        g = p.scatter(-1, y, -p.scatter(-1, y, 0).sum(-1, keepdim=True))
        return (g if totals is None else g * totals[part].unsqueeze(-1)).to(logits.dtype)

    return in_rows(logits, some)


def cross_entropy(logits: Tensor, labels: Labels) -> Tensor:
    """``-sum_l s_l log p_l`` of every row, ``[r]``, differentiable in the logits as often as one likes, the labels
    being constants."""
    return _CrossEntropy.apply(logits, labels.y, labels.weight, labels.smoothing, labels.ignore_index)


class _CrossEntropy(torch.autograd.Function):
    """The loss of rows, whose gradient is :class:`_Residual`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, *labels: Any) -> Tensor:
        known = Labels(*labels)

        def some(part: slice) -> Tensor:
            z = wide(logits[part])
            return -(known.rows(part, z) * log_softmax(z)).sum(-1).to(logits.dtype)

        return in_rows(logits, some)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _keep(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        logits, *labels = _kept(ctx)
        return g.unsqueeze(-1) * _Residual.apply(logits, *labels), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        logits, *labels = _kept(ctx)
        return (_Residual.apply(logits, *labels) * tangent).sum(-1)


class _Residual(torch.autograd.Function):
    """The gradient of the loss of rows, whose derivative is ``sum(s)`` times the Fisher information, symmetric."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, *labels: Any) -> Tensor:
        return residual(logits, Labels(*labels))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _keep(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> Any:
        logits, *labels = _kept(ctx)
        return times(logits, x, Labels(*labels).totals(logits)), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        logits, *labels = _kept(ctx)
        return times(logits, tangent, Labels(*labels).totals(logits))


def _keep(ctx: Any, inputs: Any) -> None:
    logits, y, weight, ctx.smoothing, ctx.ignore_index = inputs
    ctx.save_for_backward(logits, y, weight)
    ctx.save_for_forward(logits, y, weight)


def _kept(ctx: Any) -> Any:
    return *ctx.saved_tensors, ctx.smoothing, ctx.ignore_index
