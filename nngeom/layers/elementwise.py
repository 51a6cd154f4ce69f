"""A bare parameter that scales or shifts: ``x * w``, ``x / w`` (by the fallback), ``x + w``, ``x - w``, and expansions
of it.

The axes along which the parameter is broadcast hold examples and positions; the others are its groups.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from nngeom.core.layout import Arrangement
from nngeom.layers.adapter import Call, NotStructured, Use, adapts


def _split(call: Call, w: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Axes of the output along which ``w`` is broadcast, the other axes, and the sizes of the first."""
    out = call.out.shape
    missing = len(out) - w.ndim
    broadcast = tuple(j for j in range(len(out)) if j < missing or (w.shape[j - missing] == 1 and out[j] != 1))
    own = tuple(j for j in range(len(out)) if j not in broadcast)
    return broadcast, own, tuple(out[j] for j in broadcast)


def _rows(broadcast: tuple[int, ...], own: tuple[int, ...]):
    """``[*b, *out] -> [*b, *lead, s]``."""

    def move(x: Tensor, b: int) -> Tensor:
        x = x.permute(*range(b), *(b + j for j in broadcast), *(b + j for j in own))
        return x.reshape(*x.shape[: b + len(broadcast)], math.prod(x.shape[b + len(broadcast) :]))

    return move


def _operands(call: Call, x, y) -> tuple[Tensor, Tensor]:
    """The other operand and the parameter; both parameters, or neither a tensor, has no structure."""
    if call.is_parameter(x) == call.is_parameter(y):
        raise NotStructured
    x, w = (y, x) if call.is_parameter(x) else (x, y)
    return x, w


@adapts(torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__, torch.multiply, torch.Tensor.multiply)
def scale(call: Call, input, other) -> Use:
    """``input * other`` with one of them a parameter."""
    x, w = _operands(call, input, other)
    if not isinstance(x, Tensor):
        raise NotStructured
    broadcast, own, lead = _split(call, w)
    move, shape = _rows(broadcast, own), call.out.shape
    slot, kept = call.whole(w, Arrangement.plain(w.numel(), 1, 1)), call.keep(x)
    return Use(
        "scale",
        slot,
        None,
        lead,
        gradients=lambda g: move(g, 1).unsqueeze(-1),
        inputs=lambda: move(kept.expand(shape), 0).unsqueeze(-1),
        elementwise=True,
    )


# a shift of several axes with more entries is a table of positions, looked up; a smaller one is one exact block
TABLE_SIZE = 4096


def _shift(call: Call, w: Tensor, sign: float) -> Use:
    broadcast, own, lead = _split(call, w)
    move = _rows(broadcast, own)
    if w.numel() > TABLE_SIZE and len(own) > 1 and len(broadcast) > 0:
        return _table(call, w, sign, broadcast, own, lead)
    slot = call.vector(w)
    return Use(
        "shift", None, slot, lead, gradients=lambda g: (move(g, 1) * sign if sign != 1 else move(g, 1)).unsqueeze(-2)
    )


def _table(
    call: Call, w: Tensor, sign: float, broadcast: tuple[int, ...], own: tuple[int, ...], lead: tuple[int, ...]
) -> Use:
    """``w [rows, o]`` added to every example: each row of it is looked up once."""
    out = call.out.shape
    width, rows = out[own[-1]], w.numel() // out[own[-1]]
    move = _rows(broadcast, own)
    slot, first = call.table(w)
    device = w.device
    return Use(
        "shift",
        slot,
        None,
        (*lead, rows),
        gradients=lambda g: (sign * move(g, 1)).unflatten(-1, (rows, 1, width)),
        inputs=lambda: torch.arange(first, first + rows, device=device).expand(*lead, rows),
        lookup=True,
    )


ADDITIONS = (
    torch.add,
    torch.Tensor.add,
    torch.Tensor.__add__,
    torch.Tensor.__radd__,
    torch.Tensor.add_,
    torch.Tensor.__iadd__,
)


@adapts(*ADDITIONS)
def add(call: Call, input, other, *, alpha: float = 1) -> Use:
    """``input + alpha * other`` with one of them a parameter."""
    _, w = _operands(call, input, other)
    return _shift(call, w, alpha if w is other else 1)


@adapts(
    torch.sub, torch.Tensor.sub, torch.Tensor.__sub__, torch.Tensor.__rsub__, torch.Tensor.sub_, torch.Tensor.__isub__
)
def sub(call: Call, input, other, *, alpha: float = 1) -> Use:
    """``input - alpha * other`` with one of them a parameter."""
    _, w = _operands(call, input, other)
    return _shift(call, w, -alpha if w is other else 1)


@adapts(F.prelu, torch.prelu)
def prelu(call: Call, input: Tensor, weight: Tensor) -> Use:
    """``max(input, 0) + weight * min(input, 0)``, one weight or one a channel (axis 1)."""
    shape = call.out.shape
    along = (1,) if weight.numel() > 1 else ()
    broadcast = tuple(j for j in range(len(shape)) if j not in along)
    move, kept = _rows(broadcast, along), call.keep(input)
    return Use(
        "prelu",
        call.whole(weight, Arrangement.plain(weight.numel(), 1, 1)),
        None,
        tuple(shape[j] for j in broadcast),
        gradients=lambda g: move(g, 1).unsqueeze(-1),
        inputs=lambda: move(kept.clamp_max(0), 0).unsqueeze(-1),
        elementwise=True,
    )


@adapts(
    torch.Tensor.expand,
    torch.Tensor.expand_as,
    torch.broadcast_to,
    torch.Tensor.broadcast_to,
    torch.Tensor.repeat,
    torch.tile,
    torch.Tensor.tile,
)
def expand(call: Call, input: Tensor, *sizes) -> Use:
    """Copies of a parameter along new or unit axes, a class token for every example: the gradient of each copy is a
    row.
    """
    if any(a not in (1, b) for a, b in zip(reversed(input.shape), reversed(call.out.shape))):
        raise NotStructured  # repeated along an axis of its own
    return _shift(call, input, 1)
