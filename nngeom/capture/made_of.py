"""Whether batches are data: what was computed from the parameters belongs in the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nngeom.capture.batch import Batch, tensors
from nngeom.core.errors import ArgumentError


def require_data(batch: Batch, names: Mapping[int, str]) -> None:
    """Raise :class:`ArgumentError` where tensors of a ``batch`` are parameters, or were computed from them with a
    graph: derivatives of outputs would lack the way through them. ``names``: of the parameters, by id.
    """
    waiting: list[Any] = []
    for x in tensors(batch):
        if x.requires_grad:
            waiting.append(x.grad_fn or x)
    met = set(waiting)
    for node in waiting:
        leaf = getattr(node, "variable", node)
        if id(leaf) in names:
            raise ArgumentError(
                f"a batch holds a tensor that was computed from the parameter {names[id(leaf)]!r}, which is taken for "
                "data: its derivatives would be lost. Compute it in the model or in function=, or pass x.detach()"
            )
        following = {f for f, _ in getattr(node, "next_functions", ()) if f is not None} - met
        met |= following
        waiting.extend(following)
