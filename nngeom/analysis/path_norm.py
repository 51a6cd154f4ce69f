"""Path norm: the weights along every path from an input to an output, multiplied, and summed over all paths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nngeom.analysis.chain import chain_of, visited
from nngeom.core.errors import ArgumentError
from nngeom.sweep.run import Run


@torch.no_grad()
def path_norm(model: nn.Module, loader: Any, p: float = 2.0) -> Tensor:
    """``(sum over paths of prod |w|^p)^(1/p)``: a scalar, by one forward pass of ``|w|^p`` on an input of ones.

    ``model``: a chain of linear maps, convolutions, ReLU and leaky ReLU. ``loader``: of its first batch the shape of an
    input is taken, and the model is seen to be that chain. ``p``: 2 is the norm of Path-SGD, 1 the one of the bounds. A
    bias is the weight of a path of its own, which begins at the unit that has it. Multiplying the weights into a unit
    and dividing those out of it changes nothing. In double precision, whatever the model's.

    Raises :class:`StructureError` for a model that is no such chain, :class:`ArgumentError` for ``p < 1``. Source:
    Neyshabur, Salakhutdinov and Srebro 2015, Path-SGD, section 3; Neyshabur, Tomioka and Srebro 2015, section 4.
    """
    if not 1 <= p < float("inf"):
        raise ArgumentError(f"p is {p}; expected a finite number of at least 1")
    run = Run.of(model, loader)
    with run.within():
        chain, _, x, _ = next(visited(run, chain_of(model)))
        ones = torch.ones_like(x[:1], dtype=torch.float64)
        return chain.forward(ones, lambda w: w.double().abs() ** p).sum() ** (1 / p)
