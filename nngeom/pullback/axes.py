"""Which axis holds the examples, asked of numbers.

A layer deep inside a model sees ``(n, t, i)``, ``(t, n, i)``, ``(n t, i)`` or ``(t n, i)``; shapes alone cannot tell
when ``n = t``, and a model may sort its examples on the way. The gradients do tell: pulling back a cotangent, and the
same with every example ``j`` multiplied by a weight ``w_j`` of its own, multiplies every row that belongs to example
``j`` by exactly ``w_j``. The weights are signs times powers of two, which are exact in floating point, and no two
examples have the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nngeom.capture.recorded import Recorded
from nngeom.core.draws import factors, outer
from nngeom.layers.use import Use
from nngeom.pullback.backward import pull_back
from nngeom.pullback.scattered import Scattered, Seen, scattered


@dataclass(frozen=True)
class ExampleAxis:
    """Axis ``dim`` of ``lead`` holds the examples: ``outer`` blocks of ``n`` runs of equal length.

    ``asked``: not the graph tells so, but the numbers of one batch; in others the rows may be scattered.
    """

    dim: int | None  # None: one example, every position is its own
    outer: int = 1
    asked: bool = field(default=False, compare=False)

    @property
    def at(self) -> int:
        """The axis, where there are several examples."""
        return self.dim or 0

    def split(self, x: Tensor, n: int, before: int, lead: int) -> Tensor:
        """``[*before, *lead, *rest] -> [*before, n, t, *rest]``."""
        if self.dim is None:
            head, tail = x.shape[:before], x.shape[before + lead :]
            return x.reshape(*head, 1, -1, *tail) if x.numel() else x.reshape(*head, 1, 0, *tail)
        axis = before + self.dim
        inner = x.shape[axis] // (self.outer * n)
        if self.outer > 1:
            x, axis, lead = x.unflatten(axis, (self.outer, n * inner)), axis + 1, lead + 1
        if inner > 1:
            x, lead = x.unflatten(axis, (n, inner)), lead + 1
        x = x if axis == before else x.movedim(axis, before)
        if lead == 1:
            return x.unsqueeze(before + 1)
        return x.flatten(before + 1, before + lead - 1) if lead > 2 else x


def candidates(lead: tuple[int, ...], n: int) -> list[ExampleAxis]:
    """Every axis that could hold ``n`` examples, the likeliest first."""
    if n == 1:
        return [ExampleAxis(None)]
    alone = [ExampleAxis(j) for j, size in enumerate(lead) if size == n]
    shared = [(j, size // n) for j, size in enumerate(lead) if size > n and size % n == 0]
    return alone + [ExampleAxis(j) for j, _ in shared] + [ExampleAxis(j, outer) for j, outer in shared]


def read_axis(recorded: Recorded, place: ExampleAxis, n: int, device: torch.device) -> ExampleAxis | None:
    """The axis of ``lead`` where a use reads examples that lie at ``place`` in its output; ``None`` where there is
    none.

    The numbers of the examples go the way that gradients go; along an axis of stride 0 all are the same. What comes out
    is compared with what comes out of ones: those themselves where it is a view.
    """
    use, shape = recorded.use, recorded.shape
    length, behind = shape[place.at], len(shape) - place.at - 1
    number = (torch.arange(length, device=device) // (length // (place.outer * n))) % n + 1.0
    whole = use.gradients(number.view(1, -1, *[1] * behind).expand(1, *shape))[0]
    is_view = whole.untyped_storage().data_ptr() == number.untyped_storage().data_ptr()
    ones = None if is_view else use.gradients(number.new_ones(()).expand(1, *shape))[0]
    numbers = torch.arange(1, n + 1, device=device)
    same = [ExampleAxis(j, place.outer) for j, size in enumerate(use.lead) if size and size % (place.outer * n) == 0]
    for axis in [*same, *candidates(use.lead, n)]:
        numbered = _distinct(axis.split(whole, n, 0, len(use.lead)))
        expected = numbers.view(n, *[1] * (numbered.ndim - 1))
        if ones is not None:
            expected = expected * _distinct(axis.split(ones, n, 0, len(use.lead)))
        if bool((numbered == expected).all()):
            return axis
    return None


def _distinct(x: Tensor) -> Tensor:
    """The first along every axis of stride 0."""
    return x[tuple(slice(None) if step else slice(1) for step in x.stride())]


Where = ExampleAxis | Scattered


def find_axes(
    outputs: Tensor, uses: Sequence[Recorded], asked: Sequence[int], *, scatter: bool = True
) -> dict[int, Where | None]:
    """The example axis of every use ``asked`` for, or with ``scatter`` the example of each of its rows; ``None`` where
    examples share the use, or are mixed.

    A random cotangent of all outputs is pulled back once as it is, and once for every digit of the number of an
    example. Where a row is zero, any axis is right for this batch.
    """
    n = outputs.shape[0]
    edges, shapes = [uses[j].edge for j in asked], [uses[j].shape for j in asked]
    generator = torch.Generator().manual_seed(next(_DRAWS))
    v = outer(factors(outputs.shape, generator, outputs.detach()))
    plain = pull_back(outputs, edges, shapes, v.unsqueeze(0), retain=True)
    left = {j: candidates(uses[j].use.lead, n) for j in asked}
    seen: dict[int, list[Seen]] = {j: [] for j in asked}
    for weight in weights(n, outputs, generator):
        weighted = (v * weight.view(-1, *[1] * (v.ndim - 1))).unsqueeze(0)
        for j, g, h in zip(asked, plain, pull_back(outputs, edges, shapes, weighted, retain=True)):
            x, y, size = _rows(uses[j].use, g, h)
            left[j] = [axis for axis in left[j] if _agrees(axis, x, y, size, weight)]
            seen[j].append((x, y, size, weight))
    found: dict[int, Where | None] = {j: next(iter(axes), None) for j, axes in left.items()}
    for j in (j for j in asked if found[j] is None and scatter and not uses[j].use.lookup):
        found[j] = scattered(seen[j], _ROUNDING.get(seen[j][0][0].dtype, 0.05))
    return found


_DRAWS = itertools.count()
_POWERS = {torch.float64: 30, torch.float32: 30, torch.bfloat16: 30}  # a part of a wider model may be narrower
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}


def weights(n: int, like: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Weights ``(n,)``, so many that no two examples have the same in all; drawn anew every time."""
    most = _POWERS.get(like.dtype, 6)
    base = 2 * (2 * most + 1)
    number = torch.randperm(n, generator=generator)
    while True:
        digit = number % base
        sign = 1.0 - 2.0 * (digit % 2)
        yield (sign * 2.0 ** (digit // 2 - most).double()).to(like)
        number = number // base
        if not bool(number.any()):
            return


def _rows(use: Use, g: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``[*lead]``: the features of every row of both in one number, and the size of what was added up for the second.

    The number is the product with a random vector, which powers of two pass through.
    """
    g, h = use.gradients(g)[0].flatten(-2), use.gradients(h)[0].flatten(-2)
    r = torch.randn(g.shape[-1], generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(g)
    return g @ r, h @ r, h.abs() @ r.abs()


def _agrees(axis: ExampleAxis, x: Tensor, y: Tensor, size: Tensor, weight: Tensor) -> bool:
    """Whether every row of ``y`` is that of ``x`` times the weight of its example; each by itself, however small it
    is.
    """
    n, lead = len(weight), x.ndim
    x, y, size = (axis.split(t, n, 0, lead) for t in (x, y, size))
    return bool(((y - x * weight.unsqueeze(1)).abs() <= _ROUNDING.get(x.dtype, 0.05) * size).all())
