"""Which axis holds the examples.

A layer deep inside a model sees ``(n, t, i)``, ``(t, n, i)``, ``(n t, i)`` or ``(t n, i)``; shapes alone cannot tell when
``n = t``, and a model may sort its examples on the way. The gradients do tell: pulling back a cotangent, and the same with
example ``j`` multiplied by ``2**e_j``, multiplies every row that belongs to example ``j`` by exactly ``2**e_j`` (powers of
two are exact in floating point). An axis is accepted when all rows agree.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nngeom.generator.backward import pull_back
from nngeom.layers.adapter import Use


@dataclass(frozen=True)
class ExampleAxis:
    """Axis ``dim`` of ``lead`` holds the examples: alone, or outside (``major``) or inside of positions."""

    dim: int | None  # None: one example, every position is its own
    major: bool = True

    def split(self, x: Tensor, n: int, before: int, lead: int) -> Tensor:
        """``[*before, *lead, *rest] -> [*before, n, t, *rest]``."""
        if self.dim is None:
            head, tail = x.shape[:before], x.shape[before + lead :]
            return x.reshape(*head, 1, -1, *tail) if x.numel() else x.reshape(*head, 1, 0, *tail)
        axis = before + self.dim
        size = x.shape[axis]
        if size != n:
            x = x.unflatten(axis, (n, size // n) if self.major else (size // n, n))
            axis, lead = (axis, lead + 1) if self.major else (axis + 1, lead + 1)
        x = x.movedim(axis, before)
        if lead == 1:
            return x.unsqueeze(before + 1)
        return x.flatten(before + 1, before + lead - 1) if lead > 2 else x


def candidates(lead: tuple[int, ...], n: int) -> list[ExampleAxis]:
    """Every axis that could hold ``n`` examples, the likeliest first."""
    if n == 1:
        return [ExampleAxis(None)]
    alone = [ExampleAxis(j) for j, size in enumerate(lead) if size == n]
    shared = [(j, size) for j, size in enumerate(lead) if size > n and size % n == 0]
    return alone + [ExampleAxis(j) for j, _ in shared] + [ExampleAxis(j, major=False) for j, _ in shared]


def find_axes(outputs: Tensor, uses: list[Use], known: dict[int, ExampleAxis | None], v: Tensor | None = None) -> list[ExampleAxis | None]:
    """The example axis of every use; ``None`` where there is none (examples share the use, or are mixed).

    With cotangents ``v [k, n, *out]`` every use is put to the proof, at the price of two passes; else those only whose shape
    leaves a choice. ``known`` remembers answers by place in the forward pass.
    """
    n = outputs.shape[0]
    options = [candidates(use.lead, n) for use in uses]
    found = [known[use.place] if use.place in known else next(iter(o), None) for use, o in zip(uses, options)]
    open_ = [j for j, (use, o) in enumerate(zip(uses, options)) if use.place not in known and o and n > 1 and (v is not None or len(o) > 1)]
    for j, axes in _agreeing(outputs, uses, {j: options[j] for j in open_}, v).items() if open_ else ():
        if axes is not None:  # else no gradient here: any axis is right for this batch, ask again on the next
            found[j] = next(iter(axes), None)
            if len(axes) < 2:  # of several that agree, any is right for this batch
                known[uses[j].place] = found[j]
    return found


def _agreeing(outputs: Tensor, uses: list[Use], options: dict[int, list[ExampleAxis]], v: Tensor | None) -> dict[int, list[ExampleAxis] | None]:
    """The options that no row of a random mixture of cotangents contradicts; ``None`` where every row is zero."""
    generator, n = torch.Generator().manual_seed(0), outputs.shape[0]
    powers = torch.randint(0, 4, (n,), generator=generator)
    powers[0], powers[-1] = 0, 3
    weight = (2.0**powers).to(outputs)
    if v is None:
        mixture = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
    else:
        u = torch.randn(len(v), generator=generator, dtype=torch.float64) if len(v) > 1 else outputs.new_ones(1)
        mixture = torch.tensordot(u.to(outputs), v.to(outputs.dtype), 1)
    places = list(options)
    edges, shapes = [uses[j].edge for j in places], [uses[j].shape for j in places]
    plain, weighted = (pull_back(outputs, edges, shapes, w.unsqueeze(0), retain=True) for w in (mixture, mixture * weight.view(-1, *[1] * (outputs.ndim - 1))))
    found: dict[int, list[ExampleAxis] | None] = {}
    for j, g, h in zip(places, plain, weighted):
        x, y = _rows(uses[j], g), _rows(uses[j], h)
        found[j] = [a for a in options[j] if _agrees(a, x, y, weight)] if bool(x.any()) or bool(y.any()) else None
    return found


def _rows(use: Use, g: Tensor) -> Tensor:
    """``[*lead]``: the features of every row in one number, their product with a random vector, which powers of two pass through."""
    g = use.gradients(g)[0].flatten(-2)
    r = torch.randn(g.shape[-1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return g @ r.to(g)


def _agrees(axis: ExampleAxis, x: Tensor, y: Tensor, weight: Tensor) -> bool:
    """Whether every row of ``y`` is that of ``x`` times the weight of its example; each by itself, however small it is."""
    n, lead = len(weight), x.ndim
    x, y = axis.split(x, n, 0, lead), axis.split(y, n, 0, lead)
    expected = x * weight.unsqueeze(1)
    noise = min(10 * torch.finfo(x.dtype).eps, 0.1) * expected.abs().max()
    return bool(((y - expected).abs() <= 1e-2 * expected.abs() + noise).all())
