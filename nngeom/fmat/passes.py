"""Forward passes of the batches of a kernel, kept from one product to the next while the budget has room for them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nngeom.capture.gathered import sharded_modules
from nngeom.capture.graph import operation, read
from nngeom.capture.network import Batch, Network, gradients_on
from nngeom.core import memory
from nngeom.pullback.sizes import numbers

SHARE = 2  # of the budget: the other half is that of the products


@dataclass
class _Kept:
    """``passes``: outputs with their graph, of a network on a batch; ``taken``: their bytes."""

    taken: int = 0
    passes: dict[tuple[int, int], tuple[Network, Batch, Tensor]] = field(default_factory=dict)


_KEPT: ContextVar[_Kept | None] = ContextVar("nngeom_kept_passes", default=None)


@contextlib.contextmanager
def kept_passes() -> Iterator[None]:
    """Within: a batch that fits is run once, not for every product."""
    if _KEPT.get() is not None:
        yield
        return
    token = _KEPT.set(_Kept())
    try:
        yield
    finally:
        _KEPT.reset(token)


def passed(network: Network, batch: Batch) -> tuple[Tensor, bool]:
    """The outputs of a batch with their graph, and whether this is kept: backward passes must retain it then."""
    kept, place = _KEPT.get(), (id(network), id(batch))
    if kept is not None and place in kept.passes:
        return kept.passes[place][2], True
    asked = _Hooks()
    with gradients_on():
        outputs = network.run(batch, None if kept is None else asked)
    if kept is None or asked.met or not _repeatable(network, outputs):
        return outputs, False
    size = numbers(outputs) * outputs.element_size()
    if kept.taken + size > memory.budget() // SHARE:
        return outputs, False
    kept.taken += size
    kept.passes[place] = network, batch, outputs
    return outputs, True


def _repeatable(network: Network, outputs: Tensor) -> bool:
    """Whether its backward pass may run several times: parameters stay whole, all operations are torch's own and run no
    functions of users'.

    What users wrote may change what it saved (fused losses multiply in place the gradients that they hold).
    """
    if network.hooked or network.distributed is not None or sharded_modules(network.model):
        return False
    graph = read(outputs, network.ids, network.registered)
    return all(node in graph.leaves or operation(node) is not None for node in graph.nodes)


class _Hooks(TorchFunctionMode):
    """``met``: some tensor was asked to run a function on its gradient."""

    met = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.met |= func is torch.Tensor.register_hook
        return func(*args, **(kwargs or {}))
