"""What is drawn of a matrix or kernel: eigenvalues, numbers of each layer, entries with names at their sides."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nngeom.analysis.spectrum import effective_rank
from nngeom.core.errors import ArgumentError, ArgumentTypeError
from nngeom.fmat.operator import FunctionOperator
from nngeom.pmat.implicit_inverse import ImplicitInverse
from nngeom.pmat.operator import ParameterOperator
from nngeom.pmat.pmat import PMat

TOP = 20  # eigenvalues of a matrix that is known by its products alone


@dataclass(frozen=True)
class Spectrum:
    """``values``, descending, of the ``size`` that there are; those at rounding level are zero."""

    values: Tensor
    size: int

    @property
    def zeros(self) -> int:
        """How many are at rounding level."""
        return int((self.values == 0).sum())


@dataclass(frozen=True)
class LayerReading:
    """Of the diagonal block of a layer: its ``parameters``, ``trace``, ``top`` eigenvalue, and ``rank``: the effective
    rank, NaN where only products are known.
    """

    parameters: int
    trace: float
    top: float
    rank: float


@dataclass(frozen=True)
class Side:
    """A run of rows ``[start, stop)`` that belongs together, and its ``name``."""

    name: str
    start: int
    stop: int


def require_matrix(M: Any) -> None:
    """Raise :class:`ArgumentTypeError` unless ``M`` is a matrix over parameters, or a kernel."""
    if not isinstance(M, (ParameterOperator, FunctionOperator)):
        raise ArgumentTypeError(
            f"got {type(M).__name__}; expected a matrix (FIM, GGN, Hessian, ...) or a kernel (GramMatrix)"
        )


def spectrum_of(M: Any, top: int | None = None) -> Spectrum:
    """The eigenvalues of ``M``: a matrix, a kernel, or a tensor of them; those at rounding level (``sqrt(d)``
    times epsilon of the largest absolute one) are zero.

    ``top``: the largest alone; by default all, or 20 of a matrix that is known by its products.
    """
    if top is not None and (isinstance(top, bool) or not isinstance(top, int) or top < 1):
        raise ArgumentError(f"top is {top!r}; expected how many eigenvalues to show, at least 1, or None for all")
    if isinstance(M, Tensor):
        values, size = M.detach().flatten(), M.numel()
    else:
        require_matrix(M)
        size = M.shape[0]
        values = M.lanczos(min(top or TOP, size))[0] if _is_known_by_products(M) else M.eigh()[0]
    if not len(values) or not bool(torch.isfinite(values).all()):
        raise ArgumentError("there are no eigenvalues, or some are not finite; expected at least one finite number")
    values = values.detach().double().cpu().sort(descending=True).values
    floor = size**0.5 * torch.finfo(M.dtype).eps * values.abs().max()
    values = torch.where(values.abs() <= floor, 0.0, values)
    return Spectrum(values[:top], size)


def _is_known_by_products(M: Any) -> bool:
    """Whether a matrix or kernel is not stored, so that all eigenvalues are more than one wants."""
    return hasattr(M, "lanczos") and not isinstance(M, (PMat, ImplicitInverse))


def layers_of(M: Any) -> dict[str, LayerReading]:
    """A reading of every layer of a matrix, or of every entry of ``{layer: matrix or kernel}``."""
    if not isinstance(M, Mapping) and not hasattr(M, "by_layer"):
        raise ArgumentTypeError(
            f"got {type(M).__name__}, which has no layers; expected a matrix over parameters, or {{layer: kernel}} as "
            "GramMatrices gives it"
        )
    return {name: _reading(block) for name, block in (M if isinstance(M, Mapping) else M.by_layer()).items()}


def _reading(block: Any) -> LayerReading:
    require_matrix(block)
    some = _is_known_by_products(block)
    values = spectrum_of(block, 1 if some else None).values
    rank = math.nan if some else float(effective_rank(values.clamp(min=0)))
    return LayerReading(block.shape[0], float(block.trace()), float(values[0]), rank)


def sides_of(M: Any) -> list[Side]:
    """What the rows of the dense matrix are: those of a matrix by layer, those of a kernel by output."""
    if isinstance(M, FunctionOperator):
        return [Side(f"output {k}", k * M.rows, (k + 1) * M.rows) for k in range(M.outputs)]
    sides: list[Side] = []
    for layer, (start, shape) in zip(M.layer_collection.layers, M.layer_collection.offsets().values()):
        stop = start + math.prod(shape)
        if sides and sides[-1].name == layer:
            sides[-1] = Side(layer, sides[-1].start, stop)
        else:
            sides.append(Side(layer, start, stop))
    return sides


def pooled(entries: Tensor, most: int) -> Tensor:
    """A matrix of at most ``most`` rows and columns: of each tile the entry of largest absolute value."""
    step = [-(-size // most) for size in entries.shape]
    if step == [1, 1]:
        return entries
    rows, columns = (-(-size // s) * s for size, s in zip(entries.shape, step))
    padded = entries.new_zeros(rows, columns)
    padded[: entries.shape[0], : entries.shape[1]] = entries
    tiles = padded.view(rows // step[0], step[0], columns // step[1], step[1]).transpose(1, 2).flatten(2)
    return tiles.gather(2, tiles.abs().argmax(2, keepdim=True)).squeeze(2)
