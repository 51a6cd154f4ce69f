"""How much memory a pass and its gradients take, and what follows from it."""

from __future__ import annotations

import math

from torch import Tensor

from nngeom.capture.graph import shape
from nngeom.capture.recorder import Capture
from nngeom.pullback.backward import gains_from_batching, one_by_one_pays


def bytes_each_cotangent(capture: Capture, *, keep_graph: bool) -> int:
    """Gradients of all uses; where cotangents are pulled back together, what lies between as well."""
    size, outputs = _gradient_bytes(capture), capture.outputs
    one_by_one = not keep_graph and _one_by_one(capture, size, keep_graph=False)
    return (size + outputs.numel() * outputs.element_size()) * (1 if one_by_one else 2)


def looped(capture: Capture, *, keep_graph: bool) -> bool:
    """Whether cotangents are pulled back one by one."""
    return _one_by_one(capture, _gradient_bytes(capture), keep_graph=keep_graph)


def _one_by_one(capture: Capture, size: int, *, keep_graph: bool) -> bool:
    products = gains_from_batching([recorded.use for recorded in capture.uses], create_graph=keep_graph)
    return one_by_one_pays(size, capture.outputs.device, products=products)


def _gradient_bytes(capture: Capture) -> int:
    return sum([use.shape.numel() for use in capture.uses]) * capture.outputs.element_size()


def numbers(outputs: Tensor) -> int:
    """Of all that the operations behind ``outputs`` made."""
    waiting, met, total = [(outputs.grad_fn, 0)], set(), 0
    while waiting:
        edge = waiting.pop()
        if edge[0] is not None and edge not in met:
            met.add(edge)
            total += math.prod(shape(edge))
            waiting.extend(edge[0].next_functions)
    return total
