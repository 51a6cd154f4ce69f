"""How much memory a pass and its gradients take, and what follows from it."""

from __future__ import annotations

import math

from torch import Tensor

from nngeom.capture.graph import shape
from nngeom.capture.recorder import Capture
from nngeom.pullback.backward import gains_from_batching, one_by_one_pays


def bytes_each_cotangent(capture: Capture, *, keep_graph: bool) -> int:
    """Gradients of all uses; where cotangents are pulled back together, what lies between as well."""
    size = capture.gradient_bytes + capture.outputs.numel() * capture.outputs.element_size()
    return size if looped(capture, keep_graph=keep_graph) and not keep_graph else 2 * size


def looped(capture: Capture, *, keep_graph: bool) -> bool:
    """Whether cotangents are pulled back one by one."""
    products = gains_from_batching([recorded.use for recorded in capture.uses], create_graph=keep_graph)
    return one_by_one_pays(capture.gradient_bytes, capture.outputs.device, products=products)


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
