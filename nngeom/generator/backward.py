"""Pulling cotangents of the outputs back to gradient edges, all at once where ``vmap`` goes through, else one by one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def pull_back(
    outputs: Tensor, inputs: Sequence[Any], shapes: Sequence[torch.Size], v: Tensor, retain: bool, create_graph: bool = False
) -> list[Tensor]:
    """``v [k, *outputs.shape] -> [k, *shape]`` for each of ``inputs`` (tensors or gradient edges); zeros where unused."""
    if not inputs:
        return []
    if v.shape[0] == 1:
        grads = _grad(outputs, inputs, v[0], retain, create_graph)
        grads = [None if g is None else g.unsqueeze(0) for g in grads]
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                grads = _grad(outputs, inputs, v, True, create_graph, is_grads_batched=True)
        except RuntimeError:  # vmap has no rule for some operation (recurrent cells, custom functions)
            rows = [_grad(outputs, inputs, v[j], True, create_graph) for j in range(v.shape[0])]
            grads = [None if c[0] is None else torch.stack(c) for c in zip(*rows)]
    return [v.new_zeros(1).expand(v.shape[0], *shape) if g is None else g for g, shape in zip(grads, shapes)]


def _grad(outputs, inputs, v, retain, create_graph, **options):
    return torch.autograd.grad(
        outputs, inputs, v, retain_graph=retain or create_graph, create_graph=create_graph, allow_unused=True, **options
    )
