"""The gradient of a random combination of the outputs of a batch, as a sum over parts of it and as that of the whole.

Equal outputs do not tell what parts lack where a factor is zero; gradients of that factor do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from nngeom.capture.recorder import Capture
from nngeom.capture.remedies import gradients
from nngeom.core.draws import factors, outer
from nngeom.pullback.backward import dense

TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-3}  # of a model, parts of which may compute in float32


class AddedUp:
    """Gradients of all parameters, added up over runs of a model on parts of a batch, or on others in its place.

    ``kept``: the places of the examples that are asked of, all by default.
    """

    def __init__(self, capture: Capture, kept: Sequence[int] | None = None) -> None:
        outputs = capture.outputs.detach()
        self.capture, self.answered = capture, True
        self._v = outer(factors(outputs.shape, torch.Generator().manual_seed(8), outputs))
        if kept is not None:
            others = torch.ones(len(outputs), dtype=torch.bool, device=outputs.device)
            others[list(kept)] = False
            self._v[others] = 0
        like = capture.leaves.tensors.values()
        self._total = [torch.zeros(p.shape, dtype=p.dtype, device=p.device) for p in like]

    def add(self, outputs: Tensor, leaves: Sequence[Tensor], part: Sequence[int] | slice = slice(None)) -> None:
        """Those of another run, whose ``outputs`` of ``leaves`` stand in the places ``part`` of the batch."""
        _add(self._total, gradients(outputs, leaves, self._v[part]))

    def are_of(self, outputs: Tensor, leaves: Iterable[Tensor]) -> bool:
        """Whether these sums, which are used up, are the gradient of the batch, whose ``outputs`` of ``leaves`` are
        given. ``answered``, afterwards: no gradient that arrives at a parameter is zero or not finite, which would tell
        nothing of what it is multiplied by.
        """
        own = list(leaves)
        pull = lambda factor: gradients(outputs, own, factor * self._v, retain_graph=True)
        whole = [dense(g) for g in pull(1.0)]
        arrived = torch.stack([_norm(self._v), *(_norm(g) for g in whole if g is not None and g.numel())])
        self.answered = bool(((arrived > 0) & arrived.isfinite()).all())
        return _is_gradient(self._total, whole, pull, TOLERANCE.get(self._v.dtype, 0.1))


def _is_gradient(
    total: list[Tensor], whole: Sequence[Tensor | None], pull: Callable[[float], Sequence[Tensor | None]], most: float
) -> bool:
    """Whether sums over parts, which are overwritten, are the ``whole``, up to a relative error of ``most``.

    Gradients that cancel, as those of the biases of keys in an attention over equal tokens, are rounding alone: how
    large that is, those of cotangents multiplied by a ``factor`` tell, ``pull(factor)``. Those that are not finite are
    refused elsewhere.
    """
    if not total:
        return True
    sizes = torch.stack([_norm(p) for p in total])
    finite = torch.stack([sizes.new_zeros(()) if g is None else _norm(g) for g in whole]).isfinite()
    _add(total, [None if g is None else -g for g in whole])
    differ = ~(torch.stack([_norm(p) for p in total]) <= most * sizes)
    off = (differ & finite).nonzero().flatten().tolist()
    if not off:
        return True
    third = pull(1 / 3)
    noise = [0.0 if (g := whole[j]) is None else (g - 3 * dense(third[j])).norm() for j in off]
    return all(bool(total[j].norm() <= 100 * x) for j, x in zip(off, noise))


def _norm(x: Tensor) -> Tensor:
    """In float32 at least, so that those of unlike parameters stand beside each other."""
    return x.norm().to(torch.float32 if x.device.type == "mps" else torch.float64)


def _add(total: list[Tensor], some: Sequence[Tensor | None]) -> None:
    for p, g in zip(total, map(dense, some)):
        if g is not None:
            p += g
