"""What a damping means for each block: one number for all, or one a block, a layer, a parameter."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nngeom.core.damping import Cutoff, Damping, FactoredTikhonov, Relative, Tikhonov, as_damping
from nngeom.core.errors import (
    ArgumentError,
    ArgumentTypeError,
    DampingError,
    DeviceError,
    NonFiniteError,
    SingularError,
)
from nngeom.core.layout import Layout
from nngeom.pmat.block import Block
from nngeom.pmat.shifted import factors_shifted
from nngeom.space.collection import LayerCollection
from nngeom.space.pvector import PVector

if TYPE_CHECKING:
    from nngeom.pmat.operator import ParameterOperator
    from nngeom.pmat.pmat import PMat

Damped = dict[Layout, tuple[Block, Damping]]


def damped(matrix: PMat, damping: Any, *, indefinite: bool = False) -> Damped:
    """Every block, with what is added to its diagonal beforehand, and the damping left to add.

    ``indefinite``: what is inverted may have negative eigenvalues.
    """
    parts = _parts(matrix, damping)
    if not indefinite:
        return parts
    return {
        layout: (block, replace(require_added(d, "indefinite=True"), indefinite=True))
        for layout, (block, d) in parts.items()
    }


def require_added(damping: Damping, what: str) -> Tikhonov:
    """Only a number added to the diagonal; others raise :class:`ArgumentError`."""
    if not isinstance(damping, Tikhonov):
        raise ArgumentError(
            f"{what} takes what is added to the diagonal as damping (a number, Relative(x), a PVector, {{pattern: "
            f"number}}), got {damping!r}"
        )
    return damping


@contextlib.contextmanager
def worst_block(parts: Damped) -> Iterator[None]:
    """Where one block is singular, the error of the block that needs the largest damping."""
    try:
        yield
    except SingularError as first:
        worst = first
        for block, damping in parts.values():
            try:
                block.inverse(damping)
            except SingularError as error:
                worst = max(worst, error, key=lambda e: e.needed or 0.0)
        raise worst from None


def _parts(matrix: PMat, damping: Any) -> Damped:
    blocks = matrix.blocks
    if isinstance(damping, PVector):
        return _by_parameter(matrix, damping)
    if isinstance(damping, Mapping):
        return _by_pattern(matrix, damping)
    if isinstance(damping, Relative):
        return {layout: damped_by(block, damping, layout) for layout, block in blocks.items()}
    if isinstance(damping, Cutoff) and damping.top is not None:
        least = top_cutoff(matrix.eigh()[0], damping)
        return {layout: (block, least) for layout, block in blocks.items()}
    d = as_damping(damping)
    return {layout: (block, d) for layout, block in blocks.items()}


def damped_by(block: Block, damping: Relative, layout: Layout) -> tuple[Block, Damping]:
    """The ``block`` of a ``layout`` with its factors damped, where they are to be, and the ``damping`` left to add."""
    x = as_damping(Tikhonov(damping.value)).value
    if damping.factored and (shifted := factors_shifted(block, x**0.5)) is not None:
        return shifted, FactoredTikhonov(0.0, balanced=False)
    return block, relative(block, damping, layout)


def relative(block: Block, damping: Relative, layout: Layout) -> Damping:
    """``x`` times the mean eigenvalue of a block."""
    x = as_damping(Tikhonov(damping.value)).value
    mean = block.trace() / layout.numel if layout.numel else block.trace()
    if bool(mean < 0):
        raise DampingError(
            f"the mean eigenvalue of the block of {list(layout.names)[:4]} is {mean.item():.3e}, so that Relative(x) "
            "would be negative; expected a number as damping for an indefinite matrix"
        )
    return as_damping(x * (mean if isinstance(x, Tensor) or mean.requires_grad else float(mean)))


def top_cutoff(values: Tensor, damping: Cutoff) -> Cutoff:
    """Below the ``top``-th of the ascending eigenvalues, and above those that are rounding error of zero."""
    d, k = len(values), int(damping.top or 0)
    noise = d * torch.finfo(values.dtype).eps * values.abs().max() if d else values.sum()
    kth = values[-k] if k <= d else values[0] if d else values.sum()
    least = torch.maximum(kth - noise, noise)
    return Cutoff(max(float(least), damping.value))


def _by_parameter(matrix: PMat, precisions: PVector) -> Damped:
    return _plus(matrix, entries_of(matrix, precisions), matrix.blocks)


def entries_of(matrix: ParameterOperator, precisions: PVector) -> Tensor:
    """``(d,)``: a number for each parameter of a ``matrix``, checked, in its dtype."""
    matrix.layer_collection.require(precisions.layer_collection, "the damping")
    x = precisions.flat()
    if x.ndim != 1:
        raise ArgumentError(f"the damping is a batch of vectors {tuple(x.shape)}; expected one number a parameter")
    if x.device != matrix.device:
        raise DeviceError(f"the damping is on {x.device} and the matrix on {matrix.device}; move one with .to(device)")
    if not bool(torch.isfinite(x).all()):
        raise NonFiniteError("the damping contains NaN or infinity; expected finite numbers >= 0")
    if bool((x < 0).any()):
        raise DampingError(f"the damping is down to {x.min().item():.3e}; expected finite numbers >= 0")
    return x.to(matrix.dtype)


def _plus(matrix: PMat, x: Tensor, blocks: Iterable[Layout]) -> Damped:
    """Blocks with numbers ``x (d,)`` added to their diagonals."""
    out: Damped = {}
    for layout in blocks:
        block = matrix.blocks[layout].plus_diagonal(layout.gather(x))
        if block is None:
            raise ArgumentError(
                f"{type(matrix).__name__} takes one damping a block: with numbers of their own for parameters "
                f"{list(layout.names)[:4]} their block would not be of its kind; expected a number, PMatDense, "
                "PMatBlockDiag or PMatDiag, or a matrix that is added, M + PMatDiag.from_vector(damping)"
            )
        out[layout] = (block, Tikhonov(0.0))
    return out


def chosen_numbers(lc: LayerCollection, given: Mapping[Any, Any]) -> dict[str, float | Tensor]:
    """``{parameter: the number of the first pattern that matches}``, for every one of ``lc``; the name of a layer does
    not match layers inside of it that are named too.
    """
    chosen: dict[str, float | Tensor] = {}
    layers = dict(zip(lc.names, lc.layers))
    for pattern, value in given.items():
        if not isinstance(value, numbers.Real) and not (isinstance(value, Tensor) and value.ndim == 0):
            raise ArgumentTypeError(
                f"the damping of {pattern!r} is {type(value).__name__}; expected {{pattern: number}}, or a PVector for "
                "one number a parameter"
            )
        number = as_damping(Tikhonov(value)).value  # type: ignore[arg-type]
        for name in lc.subset(pattern, "damping").names:
            if layers[name] == pattern or layers[name] not in given or pattern not in lc.layers:
                chosen.setdefault(name, number)
    without = [name for name in lc.names if name not in chosen]
    if without:
        raise ArgumentError(
            f"no pattern of the damping matches parameters {without[:4]}; expected a number for each, such as a last "
            "pattern '*'"
        )
    return chosen


def _by_pattern(matrix: PMat, given: Mapping[Any, Any]) -> Damped:
    chosen = chosen_numbers(matrix.layer_collection, given)
    out: Damped = {}
    for layout, block in matrix.blocks.items():
        numbers_ = [chosen[name] for name in layout.names]
        if all(x is numbers_[0] or (not isinstance(x, Tensor) and x == numbers_[0]) for x in numbers_):
            out[layout] = (block, Tikhonov(numbers_[0]))
        else:
            out |= _plus(matrix, _spread(matrix, chosen), [layout])
    return out


def _spread(matrix: PMat, chosen: dict[str, float | Tensor]) -> Tensor:
    """``(d,)``: the number of its parameter at each place."""
    like = torch.zeros((), dtype=matrix.dtype, device=matrix.device)
    table = matrix.layer_collection.offsets().items()
    return torch.cat([(like + chosen[name]).expand(torch.Size(shape).numel()) for name, (_, shape) in table])
