"""Pulling cotangents of the outputs back to gradient edges, all at once or one by one, whichever is cheaper."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from nngeom.capture.remedies import gradients
from nngeom.core.whole import whole
from nngeom.layers.use import Use
from nngeom.pullback.batched import batched_gradients

# Bytes of the gradients of one cotangent above which, on a CPU, a pass a cotangent is preferred to a batched one.
# Measured on 29 November 2026 with 10 cotangents of 4 to 256 examples (AMD EPYC, one thread, two shared cores, torch
# 2.13.0, float32; dense nets 64 to 1024 wide, transformer layers, two convolutions): up to 2**17 a pass a cotangent
# took 1.2 to 2.9 times as long; through convolutions 1.07 to 1.3 times from 2**18 to 2**22, holding a tenth of the
# gradients at once, and 0.7 times from 2**23 on. Of 35 choices the worst took 1.4 times as long as the other way.
LOOP_BYTES = 2**18
# The same where a batched pass has larger products and no more copies: a pass a cotangent took 0.8 to 1.8 times as long
# from 2**18 to 2**21, 0.7 and 1.04 at 2**22, 0.5 and 0.6 times at 2**24.
PRODUCT_BYTES = 2**23


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
    *,
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
        grads = [
            None if g is None else g.unsqueeze(0)
            for g in _grad(outputs, inputs, v[0], retain=retain, create_graph=create_graph)
        ]
    elif create_graph:
        grads = _with_graph(outputs, inputs, v, large=large)
    elif large:
        grads = _one_by_one(outputs, inputs, v, retain=retain, piles=piles)
    else:
        try:
            grads = _batched(outputs, inputs, v, create_graph=create_graph)
        except RuntimeError:
            grads = _one_by_one(outputs, inputs, v, retain=retain)
    return [v.new_zeros(1).expand(k, *shape) if g is None else g for g, shape in zip(grads, shapes)]


def one_by_one_pays(bytes_each: int, device: torch.device, *, products: bool) -> bool:
    """Whether a pass a cotangent, whose gradients take ``bytes_each``, costs no more than a batched one.

    ``products``: the graph is one of matrix products, which gain from a batched pass (:func:`gains_from_batching`).
    """
    return device.type == "cpu" and bytes_each > (PRODUCT_BYTES if products else LOOP_BYTES)


def gains_from_batching(uses: Sequence[Use], *, create_graph: bool) -> bool:
    """Whether a batched pass through what lies between uses of parameters is faster as long as its memory is small.

    Not through a serial use: it fills the machine alone, or is copied. With a graph, nor through anything with
    positions: batched rules of second derivatives copy what they touch.
    """
    if create_graph:
        return all(use.product and len(use.lead) == 1 for use in uses)
    return not any(use.serial for use in uses)


def _with_graph(outputs: Any, inputs: Sequence[Any], v: Tensor, *, large: bool) -> list[Tensor | None]:
    if not large:
        with contextlib.suppress(RuntimeError):
            return _batched(outputs, inputs, v, create_graph=True)
    rows = [_grad(outputs, inputs, c, retain=True, create_graph=True) for c in v]
    return [None if c[0] is None else _stacked(c) for c in zip(*rows)]


def _stacked(gradients: Sequence[Tensor]) -> Tensor:
    """``[k, ...]``, examples first in memory: products are batched over them."""
    dim = min(1, gradients[0].ndim)
    return torch.stack(list(gradients), dim).transpose(0, dim)


def _batched(outputs: Any, inputs: Sequence[Any], v: Tensor, *, create_graph: bool) -> list[Tensor | None]:
    """Raises :class:`RuntimeError` where an operation cannot be mapped (recurrent cells, custom functions)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [dense(g) for g in batched_gradients(outputs, inputs, v, create_graph=create_graph)]


def _one_by_one(
    outputs: Any, inputs: Sequence[Any], v: Tensor, *, retain: bool, piles: Sequence[Pile] | None = None
) -> list[Tensor | None]:
    piles = piles or [Pile(len(v)) for _ in inputs]
    for j, c in enumerate(v):
        grads = _grad(outputs, inputs, c, retain=retain or j + 1 < len(v), create_graph=False)
        for pile, g in zip(piles, grads):
            if g is not None:
                pile.put(j, g)
    return [pile.all for pile in piles]


def _grad(outputs: Any, inputs: Any, v: Tensor, *, retain: bool, create_graph: bool) -> list[Tensor | None]:
    grads = gradients(outputs, inputs, v, retain_graph=retain or create_graph, create_graph=create_graph)
    return [dense(g) for g in grads]


@overload
def dense(g: Tensor) -> Tensor: ...
@overload
def dense(g: Tensor | None) -> Tensor | None: ...
def dense(g: Tensor | None) -> Tensor | None:
    """A gradient whole and without gaps: those of embeddings with ``sparse=True`` have some."""
    g = None if g is None else whole(g)
    return g.to_dense() if g is not None and g.is_sparse else g
