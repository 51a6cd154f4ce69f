"""Functions of a matrix: of its eigenvalues, in the eigenbasis it has, block by block."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nngeom.core.damping import Tikhonov
from nngeom.core.errors import ArgumentError, ArgumentTypeError, NonFiniteError, SingularError
from nngeom.core.given_plainly import require_callable, require_real
from nngeom.core.layout import Layout
from nngeom.pmat.block import Block
from nngeom.pmat.block_algebra import largest
from nngeom.pmat.damped import damped, require_added
from nngeom.pmat.eigenvalues import require_positive

if TYPE_CHECKING:
    from nngeom.pmat.pmat import PMat


def applied(matrix: PMat, f: Callable[[Tensor], Tensor]) -> dict[Layout, Block]:
    """The blocks of ``f(M)``: ``f`` is called once, on all eigenvalues ``(d,)``, ascending."""
    parts = {layout: block.spectrum() for layout, block in matrix.blocks.items()}
    flat = matrix.flattened({layout: values for layout, (values, _) in parts.items()})
    order = flat.argsort(stable=True)
    out = torch.empty_like(flat)
    out[order] = _values(f, flat[order])
    return {layout: remake(layout.gather(out)) for layout, (_, remake) in parts.items()}


def _values(f: Any, values: Tensor) -> Tensor:
    require_callable(f, "the function of the eigenvalues")
    new = f(values)
    if not isinstance(new, Tensor) or new.shape != values.shape or not new.is_floating_point():
        given = f"{new.dtype} {tuple(new.shape)}" if isinstance(new, Tensor) else f"a {type(new).__name__}"
        raise ArgumentError(f"the function returned {given}; expected as many real numbers, {tuple(values.shape)}")
    if not bool(torch.isfinite(new).all()):
        at = values[~torch.isfinite(new)][0].item()
        raise NonFiniteError(
            f"the function is NaN or infinite at the eigenvalue {at:.3e}; the eigenvalues lie in "
            f"[{values[0].item():.3e}, {values[-1].item():.3e}], expected a function finite there"
        )
    return new.to(values.dtype)


def powered(matrix: PMat, p: Any, damping: Any) -> dict[Layout, Block]:
    """The blocks of ``(M + damping I)^p``."""
    if isinstance(p, bool) or not isinstance(p, numbers.Real):
        raise ArgumentTypeError(f"the power is {p!r}; expected a number")
    require_real(p, "the power")
    out = {}
    for layout, (block, d) in damped(matrix, damping).items():
        out[layout] = _power(block, float(p), require_added(d, "a power"))
    return out


def _power(block: Block, p: float, damping: Tikhonov) -> Block:
    plain = not isinstance(damping.value, Tensor) and damping.value == 0
    own = block.factor_power(p) if plain else None
    if own is not None:
        return own
    values, remake = block.spectrum()
    return remake(powers(values, p, damping.value, f"a {type(block).__name__}"))


def powers(values: Tensor, p: float, shift: float | Tensor, what: str) -> Tensor:
    """``(values + shift)^p``: negative powers of positive ones alone, fractional ones of none below rounding error."""
    shifted = values + shift
    if p < 0:
        require_positive(shifted, values, what)
    elif p != int(p) and values.numel():
        floor = max(4, values.shape[-1]) * torch.finfo(values.dtype).eps * largest(values)
        if bool(shifted.min() < -floor):
            need = -shifted.min().item()
            raise SingularError(
                f"{what} has negative eigenvalues, down to {-need:.3e}: there is no real power {p:g}; use a larger "
                f"damping, by {need:.3e}, or an integer power",
                need,
            )
        shifted = shifted.clamp_min(0)
    return shifted**p
