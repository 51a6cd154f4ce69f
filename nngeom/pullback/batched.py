"""Several cotangents in one pass of torch's engine, without what ``torch.autograd.grad`` does around it.

It takes containers apart and puts them together again, three times as long as a pass through a small net.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import graph

from nngeom.capture.remedies import gradients

_PARTS = (torch, "_add_batch_dim"), (torch, "_remove_batch_dim"), (graph, "_engine_run_backward")
_OWN = all(hasattr(module, name) for module, name in _PARTS)


def batched_gradients(
    outputs: Any, inputs: Sequence[Any], v: Tensor, *, create_graph: bool
) -> tuple[Tensor | None, ...]:
    """``v [k, *outputs.shape] -> [k, *shape]`` for each of ``inputs``, ``None`` where unused; the graph stays.

    Raises :class:`RuntimeError` where an operation cannot be mapped.
    """
    if not (_OWN and isinstance(outputs, Tensor) and v.shape[1:] == outputs.shape):
        return gradients(outputs, inputs, v, retain_graph=True, create_graph=create_graph, is_grads_batched=True)
    level = torch._C._vmapmode_increment_nesting()
    try:
        pulled = graph._engine_run_backward(
            (outputs,),
            (torch._add_batch_dim(v, 0, level),),
            keep_graph=True,
            create_graph=create_graph,
            inputs=tuple(inputs),
            allow_unreachable=True,
            accumulate_grad=False,
        )
        count = v.shape[0]
        return tuple([None if g is None else torch._remove_batch_dim(g, level, count, 0) for g in pulled])
    finally:
        torch._C._vmapmode_decrement_nesting()
