"""Pulling cotangents of the outputs back to gradient edges, all at once or one by one, whichever is cheaper."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nngeom.capture.remedies import gradients
from nngeom.layers.use import Use

LOOP_BYTES = (
    2**18
)  # gradients of one cotangent above which, on a CPU, a pass a cotangent costs no more than a batched one
PRODUCT_BYTES = 2**23  # the same where a batched pass has larger products than a pass a cotangent, and no more copies


class Pile:
    """The gradients at one edge for ``count`` cotangents, put into one tensor as they come.

    In memory the cotangents lie before ``axis`` of the gradient. ``reduce``: kept is what it makes of each gradient.
    ``empty(sizes, like)`` gives the memory.
    """

    def __init__(
        self,
        count: int,
        axis: int = 0,
        empty: Callable[..., Tensor] | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ):
        self.count, self.axis, self.reduce = count, axis, reduce
        self._empty = empty or (lambda sizes, like: like.new_empty(sizes))
        self.all: Tensor | None = None

    def put(self, j: int, g: Tensor) -> None:
        """The gradient of cotangent ``j``."""
        if self.reduce is not None:
            g = self.reduce(g)
        if self.all is None:
            self.all = self._empty((*g.shape[: self.axis], self.count, *g.shape[self.axis :]), g).movedim(self.axis, 0)
        self.all[j] = g


def pull_back(
    outputs: Any,
    inputs: Sequence[Any],
    shapes: Sequence[torch.Size],
    v: Tensor,
    retain: bool,
    create_graph: bool = False,
    large: bool | None = None,
    piles: Sequence[Pile] | None = None,
) -> list[Tensor]:
    """``v [k, *outputs.shape] -> [k, *shape]`` for each of ``inputs`` (tensors or gradient edges); zeros where unused.

    ``large``: whether a pass a cotangent is cheaper than a batched one (:func:`one_by_one_pays`). ``piles`` say where
    its gradients are put.
    """
    if not inputs:
        return []
    k = v.shape[0]
    if large is None:
        large = one_by_one_pays(v.element_size() * sum(math.prod(s) for s in shapes), v.device, products=False)
    if k == 1:
        grads = [None if g is None else g.unsqueeze(0) for g in _grad(outputs, inputs, v[0], retain, create_graph)]
    elif create_graph:
        grads = _with_graph(outputs, inputs, v, large)
    elif large:
        grads = _one_by_one(outputs, inputs, v, retain, piles)
    else:
        try:
            grads = _batched(outputs, inputs, v, create_graph)
        except RuntimeError:
            grads = _one_by_one(outputs, inputs, v, retain, None)
    return [v.new_zeros(1).expand(k, *shape) if g is None else g for g, shape in zip(grads, shapes)]


def one_by_one_pays(bytes_each: int, device: torch.device, products: bool) -> bool:
    """Whether a pass a cotangent, whose gradients take ``bytes_each``, costs no more than a batched one.

    ``products``: the graph is one of matrix products, which gain from a batched pass (:func:`gains_from_batching`).
    """
    return device.type == "cpu" and bytes_each > (PRODUCT_BYTES if products else LOOP_BYTES)


def gains_from_batching(uses: Sequence[Use], create_graph: bool) -> bool:
    """Whether a batched pass through what lies between uses of parameters is faster as long as its memory is small.

    Not through a serial use: it fills the machine alone, or is copied. With a graph, nor through anything with
    positions: batched rules of second derivatives copy what they touch.
    """
    if create_graph:
        return all(use.product and len(use.lead) == 1 for use in uses)
    return not any(use.serial for use in uses)


def _with_graph(outputs: Any, inputs: Sequence[Any], v: Tensor, large: bool) -> list[Tensor | None]:
    if not large:
        with contextlib.suppress(RuntimeError):
            return _batched(outputs, inputs, v, True)
    rows = [_grad(outputs, inputs, c, True, True) for c in v]
    return [None if c[0] is None else _stacked(c) for c in zip(*rows)]


def _stacked(gradients: Sequence[Tensor]) -> Tensor:
    """``[k, ...]``, examples first in memory: products are batched over them."""
    dim = min(1, gradients[0].ndim)
    return torch.stack(list(gradients), dim).transpose(0, dim)


def _batched(outputs: Any, inputs: Sequence[Any], v: Tensor, create_graph: bool) -> list[Tensor | None]:
    """Raises :class:`RuntimeError` where an operation cannot be mapped (recurrent cells, custom functions)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _grad(outputs, inputs, v, True, create_graph, is_grads_batched=True)


def _one_by_one(
    outputs: Any, inputs: Sequence[Any], v: Tensor, retain: bool, piles: Sequence[Pile] | None
) -> list[Tensor | None]:
    piles = piles or [Pile(len(v)) for _ in inputs]
    for j, c in enumerate(v):
        for pile, g in zip(piles, _grad(outputs, inputs, c, retain or j + 1 < len(v), False)):
            if g is not None:
                pile.put(j, g)
    return [pile.all for pile in piles]


def _grad(
    outputs: Any, inputs: Any, v: Tensor, retain: bool, create_graph: bool, **options: Any
) -> list[Tensor | None]:
    grads = gradients(outputs, inputs, v, retain_graph=retain or create_graph, create_graph=create_graph, **options)
    return [dense(g) for g in grads]


def dense(g: Tensor | None) -> Tensor | None:
    """A gradient without gaps: those of embeddings with ``sparse=True`` have some."""
    return g.to_dense() if g is not None and g.is_sparse else g
