"""Eigenvalues with a damping: which of them count as zero, their reciprocals and their logarithms."""

from __future__ import annotations

import torch
from torch import Tensor

from nngeom.core.damping import Cutoff, Damping, Tikhonov
from nngeom.core.errors import SingularError


def reciprocal(values: Tensor, damping: Damping, what: str) -> Tensor:
    """``1 / (values + damping)``, or the pseudo-inverse under :class:`Cutoff`; raises :class:`SingularError`.

    ``what``: what the error calls the matrix.
    """
    if isinstance(damping, Cutoff):
        keep = values >= max(damping.value, torch.finfo(values.dtype).tiny)
        return torch.where(keep, 1 / torch.where(keep, values, torch.ones_like(values)), torch.zeros_like(values))
    shifted = values + damping.value
    if isinstance(damping, Tikhonov) and damping.indefinite:
        require_nonzero(shifted, values, what)
    else:
        require_positive(shifted, values, what)
    return 1 / shifted


def require_positive(shifted: Tensor, values: Tensor, what: str) -> None:
    """Raise unless all of ``shifted`` is above rounding error of ``values``."""
    if not values.numel():
        return
    floor, least = rounding(values), shifted.min()
    if bool(least <= floor):
        need = ((shifted - values).max() - least + floor).item()
        raise SingularError(
            f"{what} is singular or indefinite at this damping: its smallest eigenvalue is {least.item():.3e}; "
            f"use a damping above {max(need, 0.0):.3e}, or Cutoff(x) for a pseudo-inverse",
            max(need, 0.0),
        )


def require_nonzero(shifted: Tensor, values: Tensor, what: str) -> None:
    """Raise unless all of ``shifted`` differ from zero by more than rounding error of ``values``."""
    if values.numel() and bool(shifted.abs().min() <= rounding(values)):
        raise SingularError(f"{what} is singular at this damping; use another, or Cutoff(x) for a pseudo-inverse")


def rounding(values: Tensor) -> Tensor:
    """What of eigenvalues counts as zero: their rounding error, 4 units in the last place of the largest."""
    return 4 * torch.finfo(values.dtype).eps * values.abs().max()


def shifted_logdet(values: Tensor, damping: Tikhonov) -> Tensor:
    """``sum log(values + damping)``; without damping ``-inf`` where :func:`require_positive` raises."""
    shifted = values + damping.value
    if values.numel() and not damping.value > 0:
        shifted = torch.where(values <= rounding(values), torch.zeros_like(values), shifted)
    return log_sum(shifted)


def log_sum(shifted: Tensor) -> Tensor:
    """``sum log``; ``-inf`` where one is not positive."""
    return shifted.clamp_min(0).log().sum()


def zero_small(values: Tensor) -> Tensor:
    """Eigenvalues within rounding error of zero set to it: the log-determinant of a singular matrix is ``-inf``."""
    floor = values.shape[-1] * torch.finfo(values.dtype).eps * values.abs().amax(-1, keepdim=True)
    return torch.where(values.abs() <= floor, torch.zeros_like(values), values)
