"""Which axis holds the examples.

A layer deep inside a model sees ``(n, t, i)``, ``(t, n, i)``, ``(n t, i)`` or ``(t n, i)``; shapes alone cannot tell when
``n = t``. Where they cannot, the gradients do: pulling back one random cotangent, and the same with example ``j``
multiplied by ``2**e_j``, multiplies every entry that belongs to example ``j`` by exactly ``2**e_j`` (powers of two are
exact in floating point). An axis is accepted when the entries agree.
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


def find_axes(outputs: Tensor, uses: list[Use], known: dict) -> list[ExampleAxis | None]:
    """The example axis of every use; ``None`` where there is none (examples share the use, or are mixed).

    ``known`` remembers answers by position in the forward pass and shapes, so that a probe is paid for once.
    """
    n = outputs.shape[0]
    keys = [(j, use.operation, use.lead, n) for j, use in enumerate(uses)]
    found: list[ExampleAxis | None] = []
    unclear = []
    for j, (use, key) in enumerate(zip(uses, keys)):
        options = candidates(use.lead, n)
        if key in known:
            found.append(known[key])
        elif len(options) == 1:
            found.append(options[0])
        else:
            found.append(options[0] if options else None)
            if options:
                unclear.append(j)
    if not unclear:
        return found
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
    powers = torch.randint(0, 4, (n,), generator=generator)
    powers[0], powers[-1] = 0, 3
    weight = (2.0**powers).to(outputs)
    g1, g2 = (
        pull_back(outputs, [uses[j].edge for j in unclear], [uses[j].shape for j in unclear], c.unsqueeze(0), retain=True)
        for c in (v, v * weight.view(n, *[1] * (outputs.ndim - 1)))
    )
    for j, x, y in zip(unclear, g1, g2):
        lead = len(uses[j].lead)
        x, y = (uses[j].gradients(g)[0].flatten(lead) for g in (x, y))
        if not bool(x.any()):
            continue  # no gradient here: any axis is right for this batch, ask again on the next
        ok = [a for a in candidates(uses[j].lead, n) if _agrees(a, x, y, weight, n, lead)]
        found[j] = known[keys[j]] = ok[0] if ok else None
    return found


def _agrees(axis: ExampleAxis, x: Tensor, y: Tensor, weight: Tensor, n: int, lead: int) -> bool:
    """Whether every entry of ``y`` is that of ``x`` times the weight of its example; each by itself, however small it is."""
    x, y = axis.split(x, n, 0, lead), axis.split(y, n, 0, lead)
    expected = x * weight.view(n, 1, 1)
    noise = 10 * torch.finfo(x.dtype).eps * expected.abs().max()
    return bool(((y - expected).abs() <= 1e-2 * expected.abs() + noise).all())
